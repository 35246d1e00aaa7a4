"""Series of one patient are told in dataset.json, by PatientID or by study; no PatientID is written for it."""

from __future__ import annotations

import json
from pathlib import Path

from pydicom.uid import generate_uid

from diffseg_nnunet.dataset_conversion.dicom.converter import DicomConverter
from diffseg_nnunet.workspace import Workspace

from .written import stored_values, write_series


def written(tree: Path, *tags: dict[str, object]) -> None:
    for number, each in enumerate(tags):
        write_series(tree / f"{number}", stored_values(number, size=(4, 12, 10)), SeriesNumber=number, **each)


def test_series_of_one_patient(tmp_path: Path, workspace: Workspace) -> None:
    tree, study = tmp_path / "tree", generate_uid()
    # P1 in two studies, one patient without an id in one study, and two patients of one series each
    anonymous = {"PatientID": "", "StudyInstanceUID": study}
    written(
        tree, {"PatientID": "P1"}, {"PatientID": "P1"}, anonymous, anonymous, {"PatientID": "P2"}, {"PatientID": ""}
    )
    plan = DicomConverter().plan(tree, identify="folder")
    report = plan.execute(dataset_id=7, workspace=workspace, workers=2)
    assert json.loads((report.folder / "dataset.json").read_text())["same_patient"] == [["0", "1"], ["2", "3"]]
    assert any("2 patient(s) have several series or stacks, 4 in all" in note for note in plan.notes)
    assert not [path for path in report.folder.glob("*.json") if "P1" in path.read_text()]


def test_a_placeholder_for_all_is_no_patient(tmp_path: Path) -> None:
    tree, study = tmp_path / "tree", generate_uid()
    same = {"PatientID": "ANONYMOUS", "StudyInstanceUID": study}
    written(tree, same, same, {"PatientID": ""})
    plan = DicomConverter().plan(tree, identify="folder")
    assert plan.same_patient == [["0", "1"]]
    words = "have one PatientID or none, which is taken for a placeholder: each of their 2 studies counts as a patient"
    assert any(words in note for note in plan.notes)


def test_patients_of_one_series_each_are_not_told_of(tmp_path: Path) -> None:
    written(tmp_path / "tree", {"PatientID": "P1"}, {"PatientID": "P2"})
    plan = DicomConverter().plan(tmp_path / "tree")
    assert plan.same_patient == []
    assert not any("patient" in note for note in plan.notes)
