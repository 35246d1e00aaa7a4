"""KiTS in its public trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffseg_nnunet.errors import BadInputError

from .trees import Convert, Tree, certain, plan, refusal

KITS = {"kidney": 1, "tumor": 2, "cyst": 3}
KITS19 = {"kidney": 1, "tumor": 2}


def kits(tree: Tree, numbers: tuple[int, ...], names: dict[str, int], label: str = "segmentation") -> dict[str, tuple]:
    truth = {}
    for case in (f"case_{number:05d}" for number in numbers):
        named = tree.label(f"{case}/{label}.nii.gz", case, names)
        truth[case] = (tree.image(f"{case}/imaging.nii.gz", case), named)
    return truth


def test_kits19(tmp_path: Path, convert: Convert) -> None:
    tree = Tree(tmp_path / "kits19/data")
    truth = kits(tree, (0, 209), KITS19)
    hidden = tree.image("case_00210/imaging.nii.gz", "case_00210")
    tree.text("kits.json", "[]")
    written = convert(plan("kits", tmp_path / "kits19"))
    assert written.folder.name == "Dataset001_KiTS19"
    assert written.json["labels"] == {"background": 0, **KITS19}
    for case, (image, label) in truth.items():
        written.check("Tr", case, tree, image, label)
    written.check("Ts", "case_00210", tree, hidden, None)
    assert certain(tree.root) == {"kits": 1.0}


def test_kits21(tmp_path: Path, convert: Convert) -> None:
    tree = Tree(tmp_path / "kits21/data")
    truth = kits(tree, (0, 299), KITS, "aggregated_MAJ_seg")
    for case in truth:
        for other in ("aggregated_OR_seg", "aggregated_AND_seg", "segmentations/kidney_instance-1_annotation-1"):
            tree.label(f"{case}/{other}.nii.gz", case, {"kidney": 1})
    written = convert(plan("kits", tree.root))
    assert written.folder.name == "Dataset001_KiTS21"
    for case, (image, label) in truth.items():
        written.check("Tr", case, tree, image, label)


@pytest.mark.parametrize("sign", ["instances", "kits23.json", "number"])
def test_kits23(tmp_path: Path, convert: Convert, sign: str) -> None:
    tree = Tree(tmp_path / "kits23/dataset")
    truth = kits(tree, (0, 588 if sign == "number" else 1), KITS)
    if sign == "instances":
        tree.label("case_00000/instances/cyst_instance-1_annotation-1.nii.gz", "case_00000", {"cyst": 1})
    elif sign == "kits23.json":
        tree.text("kits23.json", "[]")
    made = plan("kits", tree.root, name="Kidneys")
    written = convert(made)
    assert "Taken for KiTS23" in made.notes[-1]
    assert written.folder.name == "Dataset001_Kidneys"
    for case, (image, label) in truth.items():
        written.check("Tr", case, tree, image, label)


def test_kits_of_unknown_release(tmp_path: Path, convert: Convert) -> None:
    """Without any sign it is taken for KiTS19, and a cyst then stops the conversion instead of vanishing."""
    tree = Tree(tmp_path / "dataset")
    truth = kits(tree, (3,), KITS)
    made = plan("kits", tree.root)
    assert "give --release" in made.notes[-1]
    with pytest.raises(BadInputError, match=r"that have no name: 3 \(named are 0, 1, 2\)"):
        convert(made)
    convert(plan("kits", tree.root, release="23")).check("Tr", "case_00003", tree, *truth["case_00003"])
    assert "no release '20'" in refusal("kits", tree.root, release="20")


def test_kits_half_downloaded(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "data")
    kits(tree, (0, 1, 250), KITS)
    (tree.root / "case_00001/imaging.nii.gz").unlink()
    assert "have no image" in refusal("kits", tree.root)
    tree.image("case_00001/imaging.nii.gz", "case_00001")
    tree.image("case_00251/imaging.nii.gz", "case_00251")
    assert "KiTS21 has one for each: case_00251" in refusal("kits", tree.root)
    tree.image("case_00005/imaging.nii.gz", "case_00005")
    assert "have no label" in refusal("kits", tree.root)
    for path in tree.root.glob("*/imaging.nii.gz"):
        path.unlink()
    assert "has segmentations, but no imaging.nii.gz" in refusal("kits", tree.root)
