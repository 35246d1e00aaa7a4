"""Make a label budget of a fold a further fold of the splits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from diffseg_nnunet.atomic import write_json
from diffseg_nnunet.budgets.annotation import ScanGrid, VoxelAnnotation
from diffseg_nnunet.budgets.budget import LabelBudget
from diffseg_nnunet.budgets.draws import draw_slices, seeded_order
from diffseg_nnunet.budgets.folds import LABEL_BUDGETS, BudgetFold, read_budget_folds, write_budget_folds
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline.preprocessing import require_preprocessed
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.splits import check_fold, ensure_splits, read_splits
from diffseg_nnunet.raw_dataset import SPLITS_FILE, values_of_labels

Fold = int | str


def budget_of(project: Project, configuration: str, fold: Fold) -> BudgetFold | None:
    """The label budget that a fold is, None if it is an ordinary one."""
    if fold == "all" or not project.labelled_preprocessed(configuration):
        return None
    splits = ensure_splits(project, configuration)
    return read_budget_folds(project.preprocessed, splits).get(int(fold))


def budget_folds(project: Project) -> dict[int, BudgetFold]:
    """Fold -> the label budget that it is, of all that are one."""
    path = project.preprocessed / SPLITS_FILE
    if not path.is_file():
        return {}
    return read_budget_folds(project.preprocessed, read_splits(path))


def base_fold(project: Project, configuration: str, fold: Fold) -> Fold:
    """The fold that a label budget was drawn from; of an ordinary fold itself. Their pretraining is one: images are no
    labels."""
    budget = budget_of(project, configuration, fold)
    return fold if budget is None else budget.base


def check_budget(project: Project, fold: Fold, labels: str) -> LabelBudget:
    """The budget, if it is one and can be drawn from the fold, as far as can be told before preprocessing.

    Raises:
        BadInputError: it is no budget; the fold is "all" or a budget itself.
    """
    budget = LabelBudget.parse(labels)
    if fold == "all":
        raise BadInputError(
            "A label budget is drawn from a fold's training cases, and 'all' leaves none to validate on.",
            "Give a fold with -f.",
        )
    if (own := budget_folds(project).get(int(fold))) is not None:
        raise BadInputError(
            f"Fold {fold} of {project.name} is itself a label budget, {own.labels} of fold {own.base}.",
            f"Draw from fold {own.base}.",
        )
    return budget


def draw_budget(project: Project, configuration: str, fold: Fold, labels: str, seed: int = 0) -> BudgetFold:
    """The fold that is a label budget of `fold`, made and recorded if it is not there yet.

    Of one base fold and seed, a smaller budget's annotation is part of a larger one's of the same kind (cases and share
    of cases are one kind). Which cases and voxels are drawn depends on no label. Slices are drawn among those that show
    a labelled structure, as somebody who annotates chooses them, and a case's second slice only after every case has
    given one.

    Args:
        configuration: preprocessed; which one does not matter to what is drawn.
        labels: as in :meth:`LabelBudget.parse`.
        seed: of the draw.

    Raises:
        BadInputError: it is no budget; the fold does not exist, is "all" or a budget itself; the budget exceeds what
            there is.
    """
    budget = check_budget(project, fold, labels)
    check_fold(project, configuration, fold)
    with FileLock(project.preprocessed / f"{LABEL_BUDGETS}.lock"):
        splits = ensure_splits(project, configuration)
        known, labelled = read_budget_folds(project.preprocessed, splits), _Labels(project, configuration)
        for one in known.values():
            if (one.base, one.labels, one.seed) == (int(fold), str(budget), seed):
                one.require_axis(labelled.slice_axis)
                return one
        base = splits[int(fold)]
        drawn = _draw(labelled, budget, int(fold), base["train"], seed)
        drawn = replace(drawn, fold=len(splits), val=tuple(base["val"]))
        write_budget_folds(project.preprocessed, [*known.values(), drawn])
        splits.append({"train": list(drawn.train), "val": list(drawn.val)})
        write_json(project.preprocessed / SPLITS_FILE, splits)
    return drawn


def fold_of_budget(project: Project, configuration: str, fold: Fold, labels: str, seed: int) -> int:
    """The number of what :func:`draw_budget` draws, with a word on what it holds."""
    require_preprocessed(project, configuration)
    drawn = draw_budget(project, configuration, fold, labels, seed)
    cases = f"{len(drawn.train)} of {len(drawn.train) + len(drawn.unlabelled)} training cases"
    slices = "" if drawn.slices is None else f"{sum(map(len, drawn.slices.values()))} slices in "
    voxels = f"{drawn.budget.amount:g} % of the voxels of " if drawn.budget.kind == "voxels" else ""
    project.reporter.info(
        f"fold {drawn.fold} is {drawn.labels} of fold {drawn.base}, label seed {drawn.seed}: {slices}{voxels}{cases}"
    )
    if drawn.missing:
        project.reporter.warn(f"fold {drawn.fold} has no label of {', '.join(drawn.missing)}")
    return drawn.fold


class _Labels:
    """The labels of preprocessed cases, in their scans' own voxels."""

    def __init__(self, project: Project, configuration: str):
        self.project = project
        self._folder = project.preprocessed_folder(configuration)
        self._dataset_json = project.dataset_json()
        self._transposition: list[int] = project.plans()["transpose_forward"]

    @property
    def slice_axis(self) -> int:
        return self._transposition[0]

    @cached_property
    def structures(self) -> dict[str, set[int]]:
        """Name -> label values, of all but the background."""
        names = {name: value for name, value in self._dataset_json["labels"].items() if name != "ignore"}
        values = {name: values_of_labels({name: value}) for name, value in names.items()}
        return {name: each for name, each in values.items() if each != {0}}

    @cached_property
    def _reader(self) -> Any:
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        return PlansManager(self.project.plans()).image_reader_writer_class()

    def properties(self, case: str) -> dict[str, Any]:
        """nnU-Net's own pickle, written by this workspace's preprocessing."""
        from batchgenerators.utilities.file_and_folder_operations import load_pickle

        return load_pickle(str(self._folder / f"{case}.pkl"))

    def volume(self, case: str) -> tuple[np.ndarray, ScanGrid]:
        """Labels of what the crop to nonzero intensities kept, in the axes of the preprocessed array."""
        grid = ScanGrid.of(self.properties(case))
        path: Path = self.project.preprocessed / "gt_segmentations" / f"{case}{self._dataset_json['file_ending']}"
        volume = self._reader.read_seg(str(path))[0][0].transpose(self._transposition)
        if volume.shape != grid.scan:
            raise BadInputError(
                f"{path} is of shape {volume.shape}, and its preprocessed image of {grid.scan}.",
                f"Run `diffseg preprocess {self.project.id}` again.",
            )
        box = tuple(slice(start, start + size) for start, size in zip(grid.corner, grid.crop, strict=True))
        return volume[box], grid

    def slices(self, case: str) -> list[int]:
        """Those that show a labelled structure."""
        volume, grid = self.volume(case)
        values = [value for values in self.structures.values() for value in values if value != 0]
        return [int(z) + grid.corner[0] for z in np.flatnonzero(np.isin(volume, values).any(axis=(1, 2)))]

    def missing(self, cases: Sequence[str], present: Callable[[str], set[str]]) -> tuple[str, ...]:
        """Structures `present` in none of the cases; looks no further than it needs to."""
        missing = set(self.structures)
        for done, case in enumerate(cases, start=1):
            missing -= present(case)
            self.project.reporter.progress("labels", len(cases) if not missing else done, len(cases))
            if not missing:
                break
        return tuple(name for name in self.structures if name in missing)

    def named(self, values: np.ndarray) -> set[str]:
        """The structures among label values."""
        there = set(np.unique(values).tolist())
        return {name for name, own in self.structures.items() if own & there}

    def sampled(self, case: str) -> set[str]:
        """The structures of a whole case, as preprocessing has sampled them for nnU-Net: reads no voxel."""
        sampled = self.properties(case)["class_locations"]
        keys = [set(key) if isinstance(key, tuple) else {key} for key, voxels in sampled.items() if len(voxels)]
        return {name for name, own in self.structures.items() if own in keys}


def _draw(labels: _Labels, budget: LabelBudget, base: int, cases: Iterable[str], seed: int) -> BudgetFold:
    """The fold, but for its number and its validation cases."""
    cases = sorted(cases)
    slices: Mapping[str, tuple[int, ...]] | None = None
    train: Sequence[str] = cases
    if budget.kind == "slices":
        slices, missing = _draw_slices(labels, int(budget.amount), base, cases, seed)
        train = list(slices)
    elif budget.kind == "voxels":
        missing = labels.missing(cases, lambda case: _scribbled(labels, budget, seed, case))
    else:
        count = budget.case_count(len(cases))
        if count > len(cases):
            raise BadInputError(
                f"Fold {base} of {labels.project.name} has {len(cases)} training case(s), not {count}.",
                "Ask for fewer labels.",
            )
        train = sorted(seeded_order(cases, seed)[:count])
        missing = labels.missing(train, labels.sampled)
    unlabelled = tuple(case for case in cases if case not in set(train))
    return BudgetFold(
        *(-1, base, str(budget), seed, tuple(train), unlabelled, (), slices),
        axis=labels.slice_axis,
        missing=missing,
    )


def _draw_slices(
    labels: _Labels, count: int, base: int, cases: Sequence[str], seed: int
) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """The slices of a budget, and the structures that none of them shows."""
    drawn = draw_slices(cases, count, seed, labels.slices)
    there = sum(map(len, drawn.values()))
    if there < count:
        raise BadInputError(
            f"The {len(cases)} training case(s) of fold {base} of {labels.project.name} have {there} slices that show "
            f"a labelled structure, not {count}.",
            "Ask for fewer labels.",
        )

    def shown(case: str) -> set[str]:
        volume, grid = labels.volume(case)
        return labels.named(volume[np.asarray(drawn[case]) - grid.corner[0]])

    return {case: tuple(numbers) for case, numbers in drawn.items()}, labels.missing(list(drawn), shown)


def _scribbled(labels: _Labels, budget: LabelBudget, seed: int, case: str) -> set[str]:
    """The structures of which a budget of voxels holds any in a case."""
    volume, grid = labels.volume(case)
    annotation = VoxelAnnotation.of_case(budget.amount / 100, seed, case)
    return labels.named(volume[annotation.mask(grid, [np.arange(size) for size in grid.shape])])
