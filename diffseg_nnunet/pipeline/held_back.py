"""Unlabelled scans that a fold is not pretrained on, because they show what it is validated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffseg_nnunet.patients import others_of
from diffseg_nnunet.pipeline.preprocessing import pool_datasets
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.starting import Fold
from diffseg_nnunet.pipeline.verifying import examined, is_verified
from diffseg_nnunet.verification import CaseRecord, listed


def held_back(project: Project, fold: Fold, validation: Sequence[str]) -> list[str]:
    """Unlabelled scans of validation patients (dataset.json's ``same_patient``), and copies of validation images.

    Copies are known by their voxels where a data set has been verified; nothing is read for it.

    Args:
        fold: "all" validates on what it trains on, and holds nothing back.
        validation: its labelled cases.

    Returns:
        ``source/case`` of each, sorted, as pools name them.
    """
    if fold == "all":
        return []
    of_patients = others_of(validation, project.same_patient())
    unlabelled = {case.identifier for case in project.raw().unlabelled_cases()}
    found = {f"{project.name}/{case}" for case in of_patients & unlabelled}
    return sorted(found | _copies(project, set(validation)))


def warn_of_divided_patients(project: Project, fold: Fold, cases: Mapping[str, Sequence[str]]) -> None:
    """Say where a fold, of a user's own splits, trains on other scans of patients that it validates on."""
    if fold == "all":
        return
    if divided := sorted(others_of(cases["val"], project.same_patient()) & set(cases["train"])):
        project.reporter.warn(
            f"fold {fold} trains on {len(divided)} other scan(s) of patients that it validates on, e.g. {divided[0]}: "
            f"its scores are no estimate for unseen patients. Without {project.preprocessed / 'splits_final.json'} the "
            "folds are drawn by patient"
        )


def _copies(project: Project, validation: set[str]) -> set[str]:
    names = [project.name, *(dataset.name for dataset in pool_datasets(project))]
    sources = [Project(project.workspace, name) for name in names]  # silent ones: nothing is verified here
    records = {each.name: examined(each).records for each in sources if is_verified(each)}
    validated = {record.voxels for record in records.get(project.name, ()) if _is_of(record, validation)}
    return {
        f"{name}/{record.case}"
        for name, known in records.items()
        for record in known
        if record.voxels in validated and (name != project.name or record.role == "unlabelled")
    }


def _is_of(record: CaseRecord, cases: set[str]) -> bool:
    return record.role == "training" and record.case in cases


def shown(identifiers: Sequence[str]) -> str:
    """What is told of those held back."""
    return (
        f"{len(identifiers)} unlabelled scan(s) are not pretrained on, since they show patients whom the fold "
        f"validates on, or are copies of their images: {listed(identifiers, 5)}"
    )
