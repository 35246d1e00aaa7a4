"""Folds of ``splits_final.json`` that are label budgets of other folds, and their record ``label_budgets.json``.

To all of nnU-Net such a fold is one like any other. What is annotated within its cases stands in the record alone:
our trainers heed it, stock trainers would learn from every label of these cases.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffseg_nnunet.atomic import write_json
from diffseg_nnunet.budgets.annotation import Annotation, SliceAnnotation, VoxelAnnotation
from diffseg_nnunet.budgets.budget import LabelBudget
from diffseg_nnunet.errors import BadInputError

LABEL_BUDGETS = "label_budgets.json"


@dataclass(frozen=True)
class BudgetFold:
    """A fold that is a label budget of another one.

    Attributes:
        fold: its number in ``splits_final.json``.
        base: the fold it was drawn from.
        labels: the budget, as :class:`LabelBudget` writes it.
        seed: of the draw.
        train: cases with labels.
        unlabelled: the base fold's other training cases. Their images may be pretrained on; their labels are unseen.
        val: the base fold's validation cases, with all their labels.
        slices: case -> the slices annotated, as numbers along `axis`; None unless it is a budget of slices.
        axis: of the images as nnU-Net reads them (0, 1, 2 are z, y, x), along which slices lie.
        missing: structures without any label in the budget.
    """

    fold: int
    base: int
    labels: str
    seed: int
    train: tuple[str, ...]
    unlabelled: tuple[str, ...]
    val: tuple[str, ...]
    slices: Mapping[str, tuple[int, ...]] | None
    axis: int
    missing: tuple[str, ...]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> BudgetFold:
        """Raises KeyError, TypeError, ValueError or BadInputError where `content` is none."""
        lists = {name: tuple(map(str, content[name])) for name in ("train", "unlabelled", "val", "missing")}
        numbers = {name: int(content[name]) for name in ("fold", "base", "seed", "axis")}
        slices = content["slices"]
        if slices is not None:
            slices = {str(case): tuple(map(int, each)) for case, each in slices.items()}
            if set(slices) != set(lists["train"]):
                raise ValueError("slices of other cases than those that train")
        read = cls(labels=str(content["labels"]), slices=slices, **numbers, **lists)
        if (read.budget.kind == "slices") != (slices is not None):
            raise ValueError("a budget of slices names them, and no other does")
        return read

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def budget(self) -> LabelBudget:
        return LabelBudget.parse(self.labels)

    def annotations(self) -> dict[str, Annotation] | None:
        """What is annotated in each of the training cases; None where whole cases are."""
        if self.slices is not None:
            return {case: SliceAnnotation(tuple(numbers)) for case, numbers in self.slices.items()}
        if self.budget.kind == "voxels":
            share = self.budget.amount / 100
            return {case: VoxelAnnotation.of_case(share, self.seed, case) for case in self.train}
        return None

    def require_axis(self, axis: int) -> None:
        """Raises BadInputError if what is annotated was drawn along another axis than slices now lie along.

        Args:
            axis: of the images as nnU-Net reads them, that is the first of the preprocessed ones.
        """
        if self.budget.is_sparse and axis != self.axis:
            raise BadInputError(
                f"Fold {self.fold}, {self.labels} of fold {self.base}, was drawn while slices lay along axis "
                f"{self.axis} of the images; by the present plan they lie along axis {axis}, and others would be "
                "learnt from.",
                "Plan as before, ask for the labels with another --label-seed, or draw them in another workspace.",
            )

    def agrees_with(self, splits: Sequence[Mapping[str, Sequence[str]]]) -> bool:
        """Whether the splits still have this fold, and the one it was drawn from, as they were."""
        if not 0 <= self.base < len(splits):
            return False
        own, base = splits[self.fold], splits[self.base]
        same_own = set(own["train"]) == set(self.train) and set(own["val"]) == set(self.val)
        return same_own and set(base["train"]) == {*self.train, *self.unlabelled} and set(base["val"]) == set(self.val)


def read_budget_folds(folder: Path, splits: Sequence[Mapping[str, Sequence[str]]]) -> dict[int, BudgetFold]:
    """Fold -> its record, of those folds of the splits that are label budgets.

    A record of a fold that the splits do not have was never finished, and does not count.

    Args:
        folder: the data set's in nnUNet_preprocessed.
        splits: the content of its splits_final.json.

    Raises:
        BadInputError: the record cannot be read, or disagrees with the splits: a fold would be trained on labels that
            its budget does not hold.
    """
    path = folder / LABEL_BUDGETS
    if not path.is_file():
        return {}
    try:
        folds = [BudgetFold.from_json(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError, AttributeError, BadInputError) as error:
        raise BadInputError(f"{path} is no record of label budgets: {error}.", _mend(path)) from error
    found = {one.fold: one for one in folds if 0 <= one.fold < len(splits)}
    for one in found.values():
        if not one.agrees_with(splits):
            raise BadInputError(
                f"{path} and the splits beside it disagree about fold {one.fold} ({one.labels} of fold {one.base}).",
                _mend(path),
            )
    return found


def write_budget_folds(folder: Path, folds: Iterable[BudgetFold]) -> None:
    """Write the record, whole or not at all."""
    write_json(folder / LABEL_BUDGETS, [one.to_json() for one in sorted(folds, key=lambda one: one.fold)])


def _mend(path: Path) -> str:
    return f"Take the budgets' folds out of the splits, remove {path}, and ask for the budgets again."
