"""Which cases train and which validate a fold: nnU-Net's splits_final.json, kept true to the cases there are."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from pathlib import Path

from diffseg_nnunet.atomic import write_json
from diffseg_nnunet.budgets.folds import LABEL_BUDGETS, read_budget_folds
from diffseg_nnunet.cross_validation import FOLDS, cross_validation
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.patients import Groups, by_patient, others_of
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.raw_dataset import SPLITS_FILE

Splits = list[dict[str, list[str]]]

_DRAWN = "drawn_folds.json"
"""What was drawn last: splits that are still the same are nobody's own."""


def ensure_splits(project: Project, configuration: str) -> Splits:
    """The splits of the preprocessed labelled cases, written atomically where there are none.

    Where there are none, those of the raw data set are taken, which its conversion chose, else nnU-Net's rule makes
    them, with the scans of a patient on one side (dataset.json's ``same_patient``). Splits that this rule made are made
    anew when cases have come or gone, or when they divide a patient by now. A user's own (a published split) are never
    touched: cases they leave out are warned of, cases that do not exist are refused. Folds that are label budgets go
    with the folds they were drawn from.

    Raises:
        BadInputError: too few cases for a split; the file is no splits file; it names cases that do not exist, or
            disagrees with the record of label budgets.
    """
    path = project.preprocessed / SPLITS_FILE
    cases = sorted(project.labelled_preprocessed(configuration))
    chosen, groups = project.workspace.raw / project.name / SPLITS_FILE, project.same_patient()
    if not path.is_file() and chosen.is_file():
        write_json(path, read_splits(chosen))
    if path.is_file():
        splits = read_splits(path)
        budgets = read_budget_folds(project.preprocessed, splits)
        named, drawn_from = _named(splits, budgets)
        divides = _divides(drawn_from, groups)
        if named == cases and not divides:
            return splits
        if not _is_drawn(project, drawn_from, named, groups):
            _check_own(project, path, named, cases)
            return splits
        reason = "its folds divide patients" if named == cases else "cases have come or gone since it was written"
        project.reporter.warn(f"{path}: {reason}, and they are drawn anew")
        for budget in budgets.values():
            project.reporter.warn(f"fold {budget.fold} is no longer {budget.labels} of fold {budget.base}: ask again")
    if len(cases) < 2:
        raise BadInputError(
            f"{project.name} has {len(cases)} labelled case(s) preprocessed for {configuration}: too few for a split.",
            "Label more, or train on everything with `-f all`.",
        )
    _refuse_one_patient(project, cases, groups)
    splits = cross_validation(cases, groups=groups)
    write_json(path, splits)
    write_json(project.preprocessed / _DRAWN, splits)
    (project.preprocessed / LABEL_BUDGETS).unlink(missing_ok=True)
    return splits


def check_fold(project: Project, configuration: str, fold: int | str) -> None:
    """Raises BadInputError if the splits have no such fold; nnU-Net would make up another split."""
    if fold != "all":
        refuse_unknown_fold(project, len(ensure_splits(project, configuration)), fold)


def expected_folds(project: Project, labelled: Sequence[str]) -> int:
    """How many folds there are, or will be once the `labelled` cases are preprocessed.

    Raises:
        BadInputError: they will have to be drawn, and all cases are of one patient; or as :func:`read_splits`.
    """
    groups = project.same_patient()
    for folder in (project.preprocessed, project.workspace.raw / project.name):
        if (folder / SPLITS_FILE).is_file():
            splits = read_splits(folder / SPLITS_FILE)
            budgets = read_budget_folds(folder, splits)
            named, drawn_from = _named(splits, budgets)
            divides = _divides(drawn_from, groups)
            drawn = (named != sorted(labelled) or divides) and _is_drawn(project, drawn_from, named, groups)
            if not drawn:
                return len(splits)
            break
    _refuse_one_patient(project, labelled, groups)
    return min(FOLDS, len(by_patient(labelled, groups)))


def _refuse_one_patient(project: Project, cases: Sequence[str], groups: Groups) -> None:
    if len(cases) > 1 and len(by_patient(cases, groups)) < 2:
        raise BadInputError(
            f"All {len(cases)} labelled cases of {project.name} are of one patient by dataset.json ('same_patient'): "
            "no fold would validate on another.",
            "Label scans of others, correct the entry, or train on everything with `-f all`.",
        )


def _named(splits: Splits, budgets: Container[int]) -> tuple[list[str], Splits]:
    """The cases of all folds but those of label budgets, and these folds."""
    drawn_from = [split for fold, split in enumerate(splits) if fold not in budgets]
    return sorted({case for split in drawn_from for part in ("train", "val") for case in split[part]}), drawn_from


def refuse_unknown_fold(project: Project, count: int, fold: int | str) -> None:
    """Raises BadInputError if `fold` is neither "all" nor one of `count`."""
    if fold != "all" and not 0 <= int(fold) < count:
        raise BadInputError(
            f"{project.name} has folds 0 to {count - 1}, not {fold}.",
            f"Choose one of them or 'all', or add it to {project.preprocessed / SPLITS_FILE}.",
        )


def _divides(splits: Splits, groups: Groups) -> bool:
    """Whether scans of one patient are on both sides of a fold."""
    return any(others_of(split["val"], groups) & set(split["train"]) for split in splits)


def _is_drawn(project: Project, splits: Splits, named: list[str], groups: Groups) -> bool:
    """Whether they were drawn here, whatever is known of patients by now, or are nnU-Net's folds of their cases."""
    path = project.preprocessed / _DRAWN
    if path.is_file() and splits == read_splits(path):
        return True
    grouped = len(by_patient(named, groups)) >= 2 and splits == cross_validation(named, groups=groups)
    return grouped or (len(named) >= 2 and splits == cross_validation(named))


def read_splits(path: Path) -> Splits:
    """Raises BadInputError if the file is no splits file."""
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
        valid = bool(splits) and all(isinstance(split[part], list) for split in splits for part in ("train", "val"))
    except (ValueError, TypeError, KeyError):
        valid = False
    if not valid:
        raise BadInputError(
            f"{path} is no nnU-Net splits file.", 'Write it as [{"train": [...], "val": [...]}, ...], or remove it.'
        )
    return splits


def _check_own(project: Project, path: Path, named: list[str], cases: list[str]) -> None:
    missing, left_out = sorted(set(named) - set(cases)), sorted(set(cases) - set(named))
    if missing:
        raise BadInputError(
            f"{path} names {len(missing)} case(s) that {project.name} does not have preprocessed, e.g. {missing[0]}.",
            "Mend the file, or remove it to have nnU-Net's folds drawn.",
        )
    if left_out:
        project.reporter.warn(f"{path} leaves out {len(left_out)} labelled case(s), e.g. {left_out[0]}")
