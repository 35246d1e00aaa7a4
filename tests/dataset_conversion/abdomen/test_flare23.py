"""FLARE23 in its public layouts."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from diffseg_nnunet.dataset_conversion.selection import prepared
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import RawDataset
from diffseg_nnunet.workspace import Workspace

from .trees import (
    FLARE23,
    convert,
    count,
    flare23,
    notes,
    plan,
    refusal,
)


def backgrounds(folder: Path) -> dict[int, str]:
    """Number of a FLARE23 case -> what became of its background; checks that nothing else is ignored."""
    values = json.loads((folder / "dataset.json").read_text())["labels"]
    assert list(values) == ["background", *FLARE23, *(["ignore"] if "ignore" in values else [])]
    assert list(values.values()) == list(range(len(values)))
    found = {}
    for number in range(1, 5):
        voxels = np.asanyarray(nib.load(folder / f"labelsTr/FLARE23_000{number}.nii.gz").dataobj)
        kinds = {int(value) for value in np.unique(voxels)} & {0, values.get("ignore", 0)}
        assert len(kinds) == 1
        found[number] = "kept" if kinds == {0} else "ignored"
    return found


@pytest.mark.parametrize("suffix", ["_0000", ""])
def test_flare23_by_content(tmp_path: Path, workspace: Workspace, suffix: str) -> None:
    tree = flare23(tmp_path / "MICCAI-FLARE23", suffix)
    folder = convert("flare23", tree.root, workspace)
    assert [count(folder, name) for name in ("imagesTr", "imagesUn", "imagesTs")] == [4, 1, 1]
    assert backgrounds(folder) == {1: "kept", 2: "kept", 3: "ignored", 4: "ignored"}
    for number in (1, 2):
        name = f"FLARE23_000{number}"
        tree.check(folder, "Tr", name, f"imagesTr2200/{name}_0000", f"labelsTr2200/{name}")
    source = np.asanyarray(nib.load(tree.root / "labelsTr2200/FLARE23_0003.nii.gz").dataobj)
    written = np.asanyarray(nib.load(folder / "labelsTr/FLARE23_0003.nii.gz").dataobj)
    np.testing.assert_array_equal(written, np.where(source == 0, 15, source))
    tree.check(folder, "Un", "FLARE23_2201", f"unlabeledTr1800/FLARE23_2201{suffix}")
    tree.check(folder, "Ts", "validation_FLARE23Ts_0001", "validation/FLARE23Ts_0001_0000")
    assert "in 4 training case(s) is not known: where a label lacks any of the 13 organs" in notes("flare23", tree.root)


def test_flare23_with_fewer_labels_asks_for_these_alone(tmp_path: Path, workspace: Workspace) -> None:
    tree = flare23(tmp_path / "MICCAI-FLARE23")
    chosen = prepared(plan("flare23", tree.root), labels=("liver", "spleen"))
    folder = chosen.execute(dataset_id=1, workspace=workspace, workers=2).folder
    assert RawDataset.open(folder).labels == {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
    for number, background in ((1, 0), (2, 0), (3, 0), (4, 3)):
        source = np.asanyarray(nib.load(tree.root / f"labelsTr2200/FLARE23_000{number}.nii.gz").dataobj)
        written = np.asanyarray(nib.load(folder / f"labelsTr/FLARE23_000{number}.nii.gz").dataobj)
        expected = np.select([source == 1, source == 3, source == 0], [1, 2, background], 0)
        np.testing.assert_array_equal(written, expected)


def test_flare23_assumed_complete(tmp_path: Path, workspace: Workspace) -> None:
    tree = flare23(tmp_path / "flare")
    folder = convert("flare23", tree.root, workspace, assume="complete")
    assert set(backgrounds(folder).values()) == {"kept"}
    assert "ignore" not in RawDataset.open(folder).labels
    assert "labels were taken as complete" in notes("flare23", tree.root, assume="complete")
    assert "Choose complete, by-content" in refusal("flare23", tree.root, assume="nothing")


ALL = ", ".join(f'"{name}"' for name in FLARE23)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("annotated.json", f'{{"FLARE23_0001": ["lesion", 1], "FLARE23_0002": [{ALL}], "FLARE23_0009": []}}'),
        (
            "annotated.csv",
            f"case,structures\nFLARE23_0001,Tumor;liver\nFLARE23_0002,{ALL.replace(chr(34), '')}\n\nFLARE23_0009\n",
        ),
    ],
)
def test_flare23_listing(tmp_path: Path, workspace: Workspace, name: str, text: str) -> None:
    tree = flare23(tmp_path / "flare")
    (tmp_path / name).write_text(text)
    folder = convert("flare23", tree.root, workspace, annotated=tmp_path / name)
    assert backgrounds(folder) == {1: "ignored", 2: "kept", 3: "ignored", 4: "ignored"}
    said = notes("flare23", tree.root, annotated=tmp_path / name, assume="complete")
    assert "2 training case(s) are listed with what was annotated; in 1 of them something was not" in said
    assert "1 listed case(s) are not here: FLARE23_0009" in said
    assert "in 2 training case(s) is not known: their labels were taken as complete" in said


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "FLARE23_0001,liver\nFLARE23_0002,hand", "a.csv, line 2: there is no structure 'hand'"),
        ("a.csv", "FLARE23_0001,liver\nFLARE23_0001,liver", "'FLARE23_0001' is listed twice"),
        ("a.csv", "case,structures\n", "lists no case"),
        ("a.json", '{"FLARE23_0001": "liver"}', 'has "liver" instead of a list'),
        ("a.json", "{", "is not valid JSON"),
    ],
)
def test_flare23_bad_listings(tmp_path: Path, name: str, text: str, words: str) -> None:
    tree = flare23(tmp_path / "flare")
    (tmp_path / name).write_text(text)
    assert words in refusal("flare23", tree.root, annotated=tmp_path / name)


def test_flare23_without_any_background_warns(tmp_path: Path) -> None:
    tree = flare23(tmp_path / "flare")
    (tmp_path / "a.json").write_text(json.dumps({f"FLARE23_000{number}": ["liver"] for number in range(1, 5)}))
    assert "No training case has a background that is known" in notes(
        "flare23", tree.root, annotated=tmp_path / "a.json"
    )


def test_flare23_corrected_labels_are_used(tmp_path: Path, workspace: Workspace) -> None:
    tree = flare23(tmp_path / "flare")
    tree.seed = 0  # the grid of the first case
    tree.case("imagesTr2200/FLARE23_0001_0000", "labelsTr2200/20230507-fix/FLARE23_0001", tuple(range(14)))
    folder = convert("flare23", tree.root, workspace)
    fixed = "labelsTr2200/20230507-fix/FLARE23_0001"
    tree.check(folder, "Tr", "FLARE23_0001", "imagesTr2200/FLARE23_0001_0000", fixed)
    assert "1 label(s) were taken from labelsTr2200/20230507-fix" in notes("flare23", tree.root)


def test_flare23_a_value_that_it_does_not_have(tmp_path: Path, workspace: Workspace) -> None:
    tree = flare23(tmp_path / "flare")
    tree.seed = 0
    tree.case("imagesTr2200/FLARE23_0001_0000", "labelsTr2200/FLARE23_0001", (0, 1, 15))
    with pytest.raises(BadInputError, match="it holds the value 15, which names no structure"):
        convert("flare23", tree.root, workspace)
