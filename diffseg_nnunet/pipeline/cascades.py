"""Cascades: what a last stage reads of the one before it, and what it cannot do; said before hours of training."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from diffseg_nnunet.budgets.budget import LabelBudget
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.splits import ensure_splits
from diffseg_nnunet.pipeline.starting import Fold

CASCADE = "3d_cascade_fullres"
"""nnU-Net's name of it."""


def refuse_cascade(configuration: str, strategy: str, pretrained: Path | None, budget: LabelBudget | None) -> None:
    """Raises BadInputError if a cascade's last stage cannot be trained like this.

    Args:
        configuration: that reads a previous stage's segmentations.
        pretrained: checkpoint that was given.
        budget: of labels; None: all.
    """
    if strategy != "scratch" and pretrained is None:
        raise BadInputError(
            f"'{configuration}' is not pretrained: besides the image it reads the previous stage's segmentation.",
            "Train it, and the stage before it, with `--strategy scratch`.",
        )
    if budget is not None and budget.is_sparse:
        raise BadInputError(
            f"'{configuration}' is a cascade, which does not learn from cases annotated in part ({budget}).",
            "Give a budget of cases, or train 3d_fullres.",
        )


def previous_stage_folder(project: Project, configuration: str, strategy: str) -> Path | None:
    """Where a cascade's later stage finds what its first says of training cases; None of what is no later stage."""
    previous = project.configuration(configuration).previous_stage_name
    return previous and project.model_folder(strategy, previous) / "predicted_next_stage" / configuration


def previous_stage_inputs(
    project: Project, configuration: str, fold: Fold, cases: Mapping[str, list[str]], strategy: str
) -> dict[str, Any]:
    """What a cascade's later stage depends on of its first; nothing of other configurations.

    Args:
        cases: of the fold.

    Raises:
        BadInputError: the first has not segmented all of them.
    """
    from diffseg_nnunet.training.checkpoint import file_digest  # with torch

    folder = previous_stage_folder(project, configuration, strategy)
    if folder is None:
        return {}
    require_previous_stage(project, configuration, fold, cases, strategy)
    return {"previous_stage": {case: file_digest(folder / f"{case}.b2nd") for case in _all_of(cases)}}


def require_previous_stage(
    project: Project,
    configuration: str,
    fold: Fold,
    cases: Mapping[str, list[str]],
    strategy: str,
    coming: Collection[str] = (),
) -> None:
    """Raises BadInputError if cases of a fold are missing that a cascade's first stage should have segmented.

    Args:
        configuration: the cascade's later stage.
        coming: cases that it will have segmented by then.
    """
    folder = previous_stage_folder(project, configuration, strategy)
    missing = {case for case in _all_of(cases) if not (case in coming or (folder / f"{case}.b2nd").is_file())}
    if not missing:
        return
    previous = project.configuration(configuration).previous_stage_name
    splits = ensure_splits(project, configuration)
    # of a case that validates several folds the first speaks: label budgets come after what they are drawn from
    first = {case: number for number in reversed(range(len(splits))) for case in splits[number]["val"]}
    if fold != "all" and (never := sorted(missing - first.keys())):
        raise BadInputError(
            f"'{configuration}' reads what {previous} says of each case, and no fold of {project.name} validates on "
            f"{len(never)} case(s) that fold {fold} trains on, e.g. {never[0]}: none of {previous} would segment them.",
            "A cascade needs folds that validate on every case between them; or train 3d_fullres.",
        )
    wanted = "all" if fold == "all" else " ".join(map(str, sorted({first[case] for case in missing})))
    raise BadInputError(
        f"'{configuration}' reads what {previous} says of each case, and {previous} has not segmented {len(missing)} "
        f"case(s) of fold {fold}, e.g. {min(missing)}: each of its folds segments the cases it validates on.",
        f"Train {previous} first, with -f {wanted} --strategy {strategy}; or both for all folds in one `diffseg run`.",
    )


def _all_of(cases: Mapping[str, Iterable[str]]) -> list[str]:
    return [case for part in ("train", "val") for case in cases[part]]
