"""--patients finds in the cases' names whom they show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffseg_nnunet.dataset_conversion.folder import FolderConverter
from diffseg_nnunet.dataset_conversion.nnunet import NNUNetConverter
from diffseg_nnunet.dataset_conversion.selection import prepared
from diffseg_nnunet.workspace import Workspace

from .sources import Run, organs, refusal, scan, write


@pytest.fixture
def more(source: Path) -> Path:
    """Further scans of the first and of a third patient, the last without a label."""
    for seed, case in enumerate(("liver_1b", "liver_3", "liver_3b"), start=3):
        write(source / f"images/{case}.nii.gz", scan(seed), seed)
        if case != "liver_3b":
            write(source / f"labels/{case}.nii.gz", organs(), seed)
    return source


@pytest.mark.parametrize("pattern", [r"liver_(\d)", r"^liver_\d"])
def test_scans_of_one_patient(run: Run, more: Path, workspace: Workspace, pattern: str) -> None:
    report = run(patients=pattern, rest_unlabelled=True)
    expected = [["liver_1", "liver_1b"], ["liver_3", "liver_3b"]]
    assert json.loads((report.folder / "dataset.json").read_text())["same_patient"] == expected
    assert "5 cases are of 3 patient(s)." in report.notes
    # and are kept where the data set is converted once more, as far as its cases are taken
    again = NNUNetConverter().plan(report.folder)
    assert again.same_patient == expected
    assert prepared(again, cases=["liver_1", "liver_3", "liver_3b"]).same_patient == expected[1:]


def test_drawn_folds_divide_no_patient(more: Path) -> None:
    plan = FolderConverter().plan(more, modality="CT", patients=r"liver_(\d)", rest_unlabelled=True)
    folds = prepared(plan, splits="5-fold").splits[0].folds
    assert sorted(fold["val"] for fold in folds) == [("liver_1", "liver_1b"), ("liver_2",), ("liver_3",)]
    few = prepared(plan, splits="n=1").splits[0]
    assert few.folds == ({"train": ("liver_1",), "val": ("liver_2", "liver_3")},)
    assert "the other 2 validate but for 1 of the same patients" in few.source


def test_cases_in_whose_names_there_is_none(run: Run, more: Path) -> None:
    notes = run(patients=r"liver_1", rest_unlabelled=True).notes
    assert "5 cases are of 4 patient(s)." in notes
    assert "No patient was found in the names of 3 case(s): liver_2, liver_3, liver_3b." in notes


def test_an_empty_match_is_none(run: Run, more: Path) -> None:
    notes = run(patients=r"^liver_1b|", rest_unlabelled=True).notes
    assert "5 cases are of 5 patient(s)." in notes
    assert "No patient was found in the names of 4 case(s): liver_1, liver_2, liver_3, liver_3b." in notes


def test_patterns_that_cannot_be(run: Run, workspace: Workspace) -> None:
    assert "--patients '(' is no regular expression" in refusal(run, workspace, patients="(")
    assert "--patients 'spleen' finds nothing in any case's name, such as liver_1." in refusal(
        run, workspace, patients="spleen"
    )
