"""FLARE22 in its public layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from diffseg_nnunet.dataset_conversion.selection import prepared
from diffseg_nnunet.workspace import Workspace

from .trees import (
    convert,
    count,
    flare22,
    hugging_face,
    notes,
    plan,
    refusal,
)


@pytest.mark.parametrize("training", ["Training/", ""])
def test_flare22(tmp_path: Path, workspace: Workspace, training: str) -> None:
    tree = flare22(tmp_path / "FLARE2022", training)
    folder = convert("flare22", tmp_path / "FLARE2022", workspace)
    assert [count(folder, name) for name in ("imagesTr", "imagesUn", "imagesTs", "labelsTs")] == [4, 2, 3, 2]
    for number in ("0001", "0050"):
        name = f"{training}FLARE22_LabeledCase50/{{}}/FLARE22_Tr_{number}"
        tree.check(folder, "Tr", f"FLARE22_Tr_{number}", f"{name.format('images')}_0000", name.format("labels"))
    tree.check(folder, "Un", "Case_02000", f"{training}FLARE22_UnlabeledCase1001-2000/Case_02000_0000")
    tree.check(folder, "Ts", "tuning_FLARETs_0001", "Tuning/images/FLARETs_0001_0000", "Tuning/labels/FLARETs_0001")
    tree.check(folder, "Ts", "testing_FLARETs_0001", "Testing/FLARETs_0001_0000")


def test_flare22_labelled_part_alone_says_what_is_missing(tmp_path: Path, workspace: Workspace) -> None:
    shutil.move(flare22(tmp_path / "all").root / "Training/FLARE22_LabeledCase50", tmp_path / "FLARE22Train")
    for start in (tmp_path / "FLARE22Train", tmp_path / "FLARE22Train/images", tmp_path):
        shutil.rmtree(tmp_path / "all", ignore_errors=True)
        assert len(plan("flare22", start).cases) == 4
    assert count(convert("flare22", tmp_path / "FLARE22Train", workspace), "imagesTr") == 4
    tree = flare22(tmp_path / "all")
    for gone in (
        "Tuning",
        "Testing",
        "Training/FLARE22_UnlabeledCase1-1000",
        "Training/FLARE22_UnlabeledCase1001-2000",
    ):
        shutil.rmtree(tree.root / gone)
    said = notes("flare22", tree.root)
    assert "0 unlabelled image(s) found as Training/FLARE22_UnlabeledCase1-1000/{case}_0000, a whole" in said
    assert "0 test image(s) found as Testing/{case}_0000, a whole download has 200." in said
    assert "4 training image(s)" in said


def test_flare22_tuning_without_labels_and_as_validation(tmp_path: Path, workspace: Workspace) -> None:
    tree = flare22(tmp_path / "FLARE2022")
    made = plan("flare22", tree.root, tuning_as_validation=True)
    first = made.splits[0]
    assert (first.name, first.folds[0]["val"]) == ("tuning", ("tuning_FLARETs_0001", "tuning_FLARETs_0002"))
    assert first.folds[0]["train"] == tuple(f"FLARE22_Tr_{number}" for number in ("0001", "0002", "0003", "0050"))
    assert not any("tuning" in case for fold in made.splits[1].folds for part in fold.values() for case in part)
    assert "`-f all` would train on them" in made.notes[-1]
    shutil.rmtree(tree.root / "Tuning/labels")
    assert "No tuning scan has a label here" in refusal("flare22", tree.root, tuning_as_validation=True)
    assert count(convert("flare22", tree.root, workspace), "imagesTs") == 3


def test_flare22_of_hugging_face(tmp_path: Path, workspace: Workspace) -> None:
    tree = hugging_face(tmp_path / "FLARE-Task2-LaptopSeg")
    folder = convert("flare22", tree.root, workspace)
    assert [count(folder, name) for name in ("imagesTr", "imagesUn", "imagesTs", "labelsTs")] == [6, 3, 2, 1]
    tree.check(folder, "Un", "Case_00001", "train_pseudo_label/imagesTr/Case_00001_0000")
    tree.check(folder, "Ts", "hidden_FLARETs_0001", "validation/Validation-Hidden-Images/FLARETs_0001_0000")
    assert "pseudo_labelled" not in json.loads((folder / "dataset.json").read_text())


@pytest.mark.parametrize(
    ("wanted", "origin", "expected"),
    [
        ("blackbean", "blackbean", {"Case_00001": "pseudo_label_blackbean_flare22/Case_00001"}),
        (
            "aladdin5",
            "aladdin5",
            {"Case_00001": "flare22_aladdin5_pseudo/Case1", "Case_00010": "flare22_aladdin5_pseudo/Case_00010"},
        ),
        (
            "pseudo_label_blackbean_flare22",
            "pseudo_label_blackbean_flare22",
            {"Case_00001": "pseudo_label_blackbean_flare22/Case_00001"},
        ),
    ],
)
def test_flare22_pseudo_labels_are_marked_and_never_validate(
    tmp_path: Path, workspace: Workspace, wanted: str, origin: str, expected: dict[str, str]
) -> None:
    tree = hugging_face(tmp_path / "flare")
    folder = convert("flare22", tree.root, workspace, pseudo_labels=wanted)
    names = [f"pseudo_{origin}_{case}" for case in expected]
    assert json.loads((folder / "dataset.json").read_text())["pseudo_labelled"]["cases"] == names
    assert [count(folder, name) for name in ("imagesTr", "imagesUn")] == [6 + len(names), 3 - len(names)]
    for name, (case, label) in zip(names, expected.items(), strict=True):
        tree.check(folder, "Tr", name, f"train_pseudo_label/imagesTr/{case}_0000", f"train_pseudo_label/{label}")
    made = plan("flare22", tree.root, pseudo_labels=wanted)
    assert [scheme.name for scheme in made.splits] == ["5-fold"]
    for fold in made.splits[0].folds:
        assert {*names} <= {*fold["train"]}
        assert not {*names} & {*fold["val"]}
    assert any("that a model made" in note for note in made.notes)
    few = prepared(made, splits="n=2").splits[0].folds[0]
    assert (few["train"][0], few["val"][-1]) == ("FLARE22_Tr_0001", "FLARE22_Tr_0006")
    kept = prepared(made, cases=["FLARE22_Tr_0001", names[0]])
    assert kept.extra["pseudo_labelled"]["cases"] == names[:1]


def test_flare22_pseudo_labels_that_are_not_there(tmp_path: Path) -> None:
    tree = flare22(tmp_path / "FLARE2022")
    assert "known names are blackbean, aladdin5" in refusal("flare22", tree.root, pseudo_labels="blackbean")
    (tmp_path / "mine").mkdir()
    message = refusal("flare22", tree.root, pseudo_labels=str(tmp_path / "mine"))
    assert "belongs to an unlabelled scan" in message
    for name in ("Case1", "Case_00001"):
        (tmp_path / f"mine/{name}.nii.gz").touch()
    assert "are labels of one case" in refusal("flare22", tree.root, pseudo_labels=str(tmp_path / "mine"))
