"""``diffseg verify`` and ``diffseg dataset``: exit codes, tables, files, and what is not read again."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Source
    from tests.conftest import CommandLine

NAME = "Dataset005_B"


@pytest.fixture
def raw(diffseg: CommandLine, source: Source) -> Path:
    folder = diffseg.folder / "diffseg_workspace" / "nnUNet_raw" / NAME
    source.as_raw_data_set(folder)
    return folder


def test_a_clean_pool(diffseg: CommandLine, raw: Path) -> None:
    (raw / "imagesTr").rename(raw / "imagesUn")
    shutil.rmtree(raw / "labelsTr")
    content = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**content, "numTraining": 0}))
    clean, shown = diffseg.in_one_process([["verify", 5], ["dataset", 5]])
    assert clean.ok().out.splitlines()[-1] == f"{NAME}: 0 labelled, 3 unlabelled, 0 test cases, no errors"
    assert "orientation (where x, y, z point to): 3 LPS" in shown.ok().out
    assert "verify …" not in shown.out, "what was read is read again"
    assert "ml, median" not in shown.out


def test_warned_of_and_refused(diffseg: CommandLine, source: Source, raw: Path) -> None:
    label = raw / "labelsTr/b.nii.gz"
    source.write(label, np.zeros((10, 9, 8), np.float32))
    options = ("--json", "one.json", "--csv", "one.csv", "-o", "both")
    warned, again = diffseg.in_one_process([["verify", 5, *options], ["verify", 5]])
    assert warned.code == again.code == 1
    assert "2 warning(s), no errors" in warned.out
    assert "label_float" in warned.out
    assert "empty_label" in again.out

    found = json.loads((diffseg.folder / "one.json").read_text())
    assert found == json.loads((diffseg.folder / "both/findings.json").read_text())
    assert found["counts"] == {"error": 0, "warning": 2, "note": 0}
    assert [case["case"] for case in found["cases"]] == ["a", "b", "c"]
    rows = list(csv.DictReader((diffseg.folder / "both/findings.csv").open()))
    assert [(row["case"], row["code"], row["severity"]) for row in rows] == [
        *(("b", "label_float", "warning"), ("b", "empty_label", "warning")),
    ]
    assert (diffseg.folder / "one.csv").read_text() == (diffseg.folder / "both/findings.csv").read_text()

    (raw / "imagesTs").mkdir()
    copy = raw / "imagesTs/t_0000.nii.gz"
    copy.write_bytes((raw / "imagesTr/a_0000.nii.gz").read_bytes())
    copied = diffseg("verify", 5)
    copied.refused("has 1 error(s)")
    assert "duplicate_case" in copied.out
    copy.unlink()

    label.write_bytes(b"")
    refused = diffseg("verify", 5, "--json", "bad.json")
    refused.refused(f"{NAME} has 1 error(s) and 0 warning(s)", "diffseg verify 5")
    bad = json.loads((diffseg.folder / "bad.json").read_text())
    assert [(found["code"], found["case"]) for found in bad["findings"]] == [("unreadable", "b")]


def test_dataset_shows_what_is_there(diffseg: CommandLine, raw: Path) -> None:
    cache = diffseg.folder / "diffseg_workspace/nnUNet_results" / NAME / "verification.json"
    shown, as_json, refused = diffseg.in_one_process(
        [["dataset", 5, "--pictures", "sheet.png"], ["dataset", 5, "--json"], ["dataset", 5, "--pictures", "sheet.gif"]]
    )
    assert f"{NAME}: 3 training case(s)" in shown.ok().out
    for word in ("organ", "spacing, mm", "stored as", "ml, median [range]", "pictures: sheet.png"):
        assert word in shown.out
    assert (diffseg.folder / "sheet.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads(as_json.ok().out)
    assert summary["dataset"] == NAME
    assert summary["cases"] == {"training": 3, "unlabelled": 0, "test": 0}
    assert summary["spacing_mm"]["z"] == {"median": 2.0, "lowest": 2.0, "highest": 2.0}
    refused.refused("sheet.gif does not end in .png")
    cache.write_text("{}")
    path = raw / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"same_patient": [["a", "c"]]}))
    assert "2 of them show 1 patient(s) who have several scans" in diffseg("dataset", 5).ok().out
    assert len(json.loads(cache.read_text())["cases"]) == 3


def test_a_data_set_that_cannot_be_read_and_one_case_of_it(diffseg: CommandLine, raw: Path) -> None:
    (raw / "imagesTr/a_0000.nii.gz").write_bytes(b"")
    shown = diffseg("dataset", 5).ok()
    assert "1 error(s) were found" in shown.out
    assert "2 training case(s)" in shown.out
    for path in raw.glob("imagesTr/*"):
        path.write_bytes(b"")
    diffseg("dataset", 5).refused("has no case that can be read", "`diffseg verify 5`")
