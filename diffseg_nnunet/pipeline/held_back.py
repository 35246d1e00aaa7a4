"""Unlabelled scans that a fold is not pretrained on, because they show what it is validated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffseg_nnunet.patients import others_of
from diffseg_nnunet.pipeline.preprocessing import pool_datasets
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.starting import Fold
from diffseg_nnunet.pipeline.verifying import remembered_records
from diffseg_nnunet.raw_dataset import SPLITS_FILE
from diffseg_nnunet.verification import listed


def held_back(project: Project, fold: Fold, validation: Sequence[str]) -> list[str]:
    """Unlabelled scans of validation patients, copies of scans of theirs, and what shows the same patients as these.

    Who is shown where is told by each data set's own dataset.json (``same_patient``).

    Copies are known by the voxels that the last verification of each data set found; no image is read.

    Args:
        fold: "all" validates on what it trains on, and holds nothing back.
        validation: its labelled cases.

    Returns:
        ``source/case`` of each, sorted, as pools name them.
    """
    if fold == "all":
        return []
    own = Project(project.workspace, project.name)
    shown = {*validation, *others_of(validation, own.same_patient())}
    voxels = {record.voxels for record in remembered_records(own) if record.case in shown and record.role != "test"}
    found = {f"{own.name}/{case}" for case in _of_patients(own, voxels, shown) & _unlabelled(own)}
    for dataset in pool_datasets(project):
        source = Project(project.workspace, dataset.name)
        found |= {f"{source.name}/{case}" for case in _of_patients(source, voxels, set())}
    return sorted(found)


def _of_patients(source: Project, voxels: set[tuple[str, ...]], known: set[str]) -> set[str]:
    """The scans of a data set with any of these `voxels`, the `known` ones, and all others of the same patients."""
    copies = {each.case for each in remembered_records(source) if each.voxels in voxels and each.role != "test"}
    found = copies | known
    return found | others_of(found, source.same_patient())


def _unlabelled(project: Project) -> set[str]:
    return {case.identifier for case in project.raw().unlabelled_cases()}


def warn_of_divided_patients(project: Project, fold: Fold, cases: Mapping[str, Sequence[str]]) -> None:
    """Say where a fold, of a user's own splits, trains on other scans of patients that it validates on."""
    if fold == "all":
        return
    if divided := sorted(others_of(cases["val"], project.same_patient()) & set(cases["train"])):
        places = (project.preprocessed / SPLITS_FILE, project.workspace.raw / project.name / SPLITS_FILE)
        there = " and ".join(str(path) for path in places if path.is_file())
        project.reporter.warn(
            f"fold {fold} trains on {len(divided)} other scan(s) of patients that it validates on, e.g. {divided[0]}: "
            f"its scores are no estimate for unseen patients. Without {there} the folds are drawn by patient"
        )


def shown(identifiers: Sequence[str]) -> str:
    """What is told of those held back."""
    return (
        f"{len(identifiers)} unlabelled scan(s) are not pretrained on, since they show patients whom the fold "
        f"validates on, or are copies of their images: {listed(identifiers, 5)}"
    )
