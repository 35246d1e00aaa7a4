"""ACDC in its public trees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nnunetv2.dataset_conversion.Dataset027_ACDC import create_ACDC_split

from .trees import SIZE, Convert, Tree, certain, plan, refusal

HEART = {"right_ventricle": 1, "myocardium": 2, "left_ventricle": 3}


def patient(tree: Tree, part: str, number: int, ed: int = 1, es: int = 12, labelled: bool = True) -> dict[str, tuple]:
    name = f"patient{number:03d}"
    folder = f"{part}/{name}"
    tree.text(f"{folder}/Info.cfg", f"ED: {ed}\nES: {es}\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n")
    tree.text(f"{folder}/MANDATORY_CITATION.md", "")
    tree.write(f"{folder}/{name}_4d.nii.gz", name, np.zeros((*SIZE, 2), np.int16))
    truth = {}
    for phase, frame in (("ED", ed), ("ES", es)):
        stem, case = f"{folder}/{name}_frame{frame:02d}", f"{name}_{phase}"
        label = tree.label(f"{stem}_gt.nii.gz", case, HEART) if labelled else None
        truth[case] = (tree.image(f"{stem}.nii.gz", case), label)
    return truth


@pytest.mark.parametrize("new", [True, False])
def test_acdc(tmp_path: Path, convert: Convert, new: bool) -> None:
    tree = Tree(tmp_path / "ACDC/database")
    training = {}
    for number in range(1, 8):
        training |= patient(tree, "training", number)
    # of patient090 the end of systole comes first
    training |= patient(tree, "training", 90, ed=11, es=4)
    test = patient(tree, "testing", 101, es=14, labelled=new)
    tree.text("training/MANDATORY_CITATION.md", "")
    made = plan("acdc", tmp_path / "ACDC")
    written = convert(made)
    assert written.json["channel_names"] == {"0": "MRI"}
    assert written.cases("labelsTr") == sorted(training)
    for case, (image, label) in training.items():
        written.check("Tr", case, tree, image, label)
    for case, (image, label) in test.items():
        written.check("Ts", case, tree, image, label)
    (folds,) = made.splits
    own = create_ACDC_split(str(written.folder / "labelsTr"))
    assert [{part: sorted(cases) for part, cases in fold.items()} for fold in folds.folds] == [
        {part: sorted(cases) for part, cases in fold.items()} for fold in own
    ]
    for fold in folds.folds:
        sides = [{case.split("_")[0] for case in fold[part]} for part in ("train", "val")]
        assert not sides[0] & sides[1]
    assert certain(tmp_path / "ACDC") == {"acdc": 1.0}


def test_acdc_from_inside_and_without_testing(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "ACDC")
    for number in range(1, 3):
        patient(tree, "training", number)
    patient(tree, "testing", 101)
    for source in (tree.root / "training", tree.root / "testing", tmp_path):
        assert len(plan("acdc", source).cases) == 6
    (tree.root / "training").rename(tmp_path / "patients")
    made = plan("acdc", tmp_path / "patients")
    assert [case.role for case in made.cases] == ["training"] * 4
    assert made.splits == ()


def test_acdc_half_downloaded(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "ACDC")
    patient(tree, "training", 1)
    patient(tree, "training", 2)
    folder = tree.root / "training/patient002"
    (folder / "patient002_frame12_gt.nii.gz").unlink()
    assert "lacks patient002_frame12_gt" in refusal("acdc", tree.root)
    (folder / "patient002_frame12.nii.gz").unlink()
    assert "lacks patient002_frame12, patient002_frame12_gt" in refusal("acdc", tree.root)
    (folder / "Info.cfg").write_text("ED: one\n")
    assert f"{folder / 'Info.cfg'} does not tell the frames" in refusal("acdc", tree.root)
    (folder / "Info.cfg").unlink()
    assert f"have no Info.cfg: {folder}" in refusal("acdc", tree.root)
