"""TotalSegmentator in its public trees."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from diffseg_nnunet.dataset_conversion import totalsegmentator_classes
from diffseg_nnunet.errors import BadInputError

from .trees import SIZE, Convert, Named, Tree, certain, plan, refusal

V2_SOME = ("liver", "kidney_left", "kidney_right", "rib_left_1", "urinary_bladder", "heart")


def total(tree: Tree, cases: dict[str, str], classes: tuple[str, ...] = V2_SOME, image: str = "ct") -> dict[str, tuple]:
    """Disjoint masks; case -> (image, masks by class)."""
    lines = ["image_id;age;gender;institute;study_type;split"]
    truth = {}
    for case, part in cases.items():
        lines.append(f"{case};60;m;A;ct thorax;{part}")
        voxels = tree.rng.integers(0, len(classes) + 1, SIZE)
        masks = {name: voxels == value for value, name in enumerate(classes, start=1)}
        for name, mask in masks.items():
            tree.write(f"{case}/segmentations/{name}.nii.gz", case, mask.astype(np.uint8))
        truth[case] = (tree.image(f"{case}/{image}.nii.gz", case), masks)
    tree.text("meta.csv", "\ufeff" + "\n".join(lines) + "\n")
    return truth


def unified(masks: Named) -> Named:
    """Spelled anew here: the side to the front."""
    new = {"kidney_left": "left_kidney", "kidney_right": "right_kidney", "urinary_bladder": "bladder"}
    return {new.get(name, name): mask for name, mask in masks.items()}


def test_totalsegmentator_v2(tmp_path: Path, convert: Convert) -> None:
    tree = Tree(tmp_path / "Totalsegmentator_dataset_v201")
    truth = total(tree, {"s0000": "train", "s0001": "val", "s0011": "test"})
    made = plan("totalsegmentator", tree.root)
    written = convert(made)
    # in the order of the published values: right kidney 2, left kidney 3, liver 5, bladder 21, heart 51, rib 92
    assert list(written.json["labels"]) == [
        "background",
        "right_kidney",
        "left_kidney",
        "liver",
        "bladder",
        "heart",
        "rib_left_1",
    ]
    assert written.json["channel_names"] == {"0": "CT"}
    assert (written.cases("labelsTr"), written.cases("labelsTs")) == (["s0000", "s0001"], ["s0011"])
    for case, role in (("s0000", "Tr"), ("s0001", "Tr"), ("s0011", "Ts")):
        written.check(role, case, tree, truth[case][0], unified(truth[case][1]))
    (official,) = made.splits
    assert (official.name, official.folds) == ("official", ({"train": ("s0000",), "val": ("s0001",)},))
    assert "6 class(es) of TotalSegmentator v2" in " ".join(made.notes)
    assert certain(tree.root) == {"totalsegmentator": 1.0}


def test_totalsegmentator_overlaps_and_missing_masks(tmp_path: Path, convert: Convert) -> None:
    tree = Tree(tmp_path / "total")
    truth = total(tree, {"s0000": "train", "s0001": "train"})
    # liver (5) under heart (51): the heart wins; of s0001 nobody drew the heart
    image, masks = truth["s0000"]
    both = masks["liver"] | masks["heart"]
    tree.write("s0000/segmentations/liver.nii.gz", "s0000", both.astype(np.uint8) * 255)
    (tree.root / "s0001/segmentations/heart.nii.gz").unlink()
    made = plan("totalsegmentator", tree.root, classes="heart, liver,left_kidney")
    written = convert(made)
    assert list(written.json["labels"]) == ["background", "left_kidney", "liver", "heart"]
    kept = ("left_kidney", "liver", "heart")
    written.check("Tr", "s0000", tree, image, {name: unified(masks)[name] for name in kept})
    image, masks = truth["s0001"]
    written.check("Tr", "s0001", tree, image, {name: unified(masks)[name] for name in kept[:2]})
    assert "1 case(s) lack the mask of one or more classes, which are background there (s0001: heart)" in made.notes[-1]
    assert made.splits == ()


def test_totalsegmentator_groups_and_a_case_without_any(tmp_path: Path, convert: Convert) -> None:
    tree = Tree(tmp_path / "total")
    truth = total(tree, {"s0000": "train", "s0001": "train"})
    (tree.root / "s0001/segmentations/rib_left_1.nii.gz").unlink()
    written = convert(plan("totalsegmentator", tree.root, group="ribs"))
    assert written.json["labels"] == {"background": 0, "rib_left_1": 1}
    written.check("Tr", "s0000", tree, truth["s0000"][0], {"rib_left_1": truth["s0000"][1]["rib_left_1"]})
    written.check("Tr", "s0001", tree, truth["s0001"][0], {"rib_left_1": np.zeros(SIZE, bool)})


def test_totalsegmentator_v1_and_mr(tmp_path: Path) -> None:
    old = Tree(tmp_path / "v1")
    total(old, {"s0004": "train"}, ("face", "heart_myocardium", "liver", "urinary_bladder"))
    labels = plan("totalsegmentator", old.root).labels
    assert list(labels) == ["background", "liver", "heart_myocardium", "face", "bladder"]
    assert list(plan("totalsegmentator", old.root, group="cardiac").labels)[1:] == [
        "heart_myocardium",
        "bladder",
        "face",
    ]
    mr = Tree(tmp_path / "mr")
    total(mr, {"s0001": "train", "s0002": "test"}, ("lung_left", "vertebrae"), "mri")
    made = plan("totalsegmentator", mr.root)
    assert (made.channel_names, list(made.labels)) == ({0: "MRI"}, ["background", "left_lung", "vertebrae"])
    assert "TotalSegmentator MR has no group 'ribs'" in refusal("totalsegmentator", mr.root, group="ribs")


def test_totalsegmentator_class_lists() -> None:
    counts = {"v1": (17, 24, 18, 21, 24), "v2": (24, 26, 18, 23, 26)}
    for release, classes in (("v1", totalsegmentator_classes.V1), ("v2", totalsegmentator_classes.V2)):
        assert tuple(len(classes[group]) for group in totalsegmentator_classes.GROUPS) == counts[release]
        everything = totalsegmentator_classes.all_classes(classes)
        assert len(everything) == len(set(everything)) == sum(counts[release])
        assert len({totalsegmentator_classes.unified(name) for name in everything}) == len(everything)
    v1, v2 = (
        totalsegmentator_classes.all_classes(each)
        for each in (totalsegmentator_classes.V1, totalsegmentator_classes.V2)
    )
    # single values of the published maps
    for value, name in {
        7: "aorta",
        18: "vertebrae_L5",
        41: "vertebrae_C1",
        57: "colon",
        92: "sacrum",
        93: "face",
    }.items():
        assert v1[value - 1] == name
    for value, name in {
        7: "pancreas",
        26: "vertebrae_S1",
        52: "aorta",
        79: "spinal_cord",
        117: "costal_cartilages",
    }.items():
        assert v2[value - 1] == name


def test_totalsegmentator_refusals(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "total")
    total(tree, {"s0000": "train", "s0001": "val"})
    assert "No case has a mask of livr" in refusal("totalsegmentator", tree.root, classes="livr")
    assert "no group 'bones'" in refusal("totalsegmentator", tree.root, group="bones")
    assert "Give --classes or --group" in refusal("totalsegmentator", tree.root, group="ribs", classes="liver")
    tree.text("meta.csv", "image_id,split\ns0000,training\n")
    assert "'training'" in refusal("totalsegmentator", tree.root)
    (tree.root / "meta.csv").unlink()
    assert "no meta.csv" in " ".join(plan("totalsegmentator", tree.root).notes)
    (tree.root / "s0001/ct.nii.gz").unlink()
    assert "1 case(s)" in refusal("totalsegmentator", tree.root)
    for path in (tree.root / "s0000/segmentations").iterdir():
        path.unlink()
    tree.image("s0001/ct.nii.gz", "s0001")
    assert "have no file in segmentations: s0000" in refusal("totalsegmentator", tree.root)


def test_totalsegmentator_a_mask_out_of_place(tmp_path: Path, convert: Convert) -> None:
    tree = Tree(tmp_path / "total")
    total(tree, {"s0000": "train", "s0001": "train"})
    path = tree.root / "s0001/segmentations/heart.nii.gz"
    mask = nib.load(path)
    spacing = np.linalg.norm(mask.affine[:3, :3], axis=0).min()
    for shift, stops in ((0.4, False), (0.6, True)):
        moved = mask.affine.copy()
        moved[0, 3] += shift * spacing
        nib.save(nib.Nifti1Image(np.asanyarray(mask.dataobj), moved), path)
        if stops:
            with pytest.raises(BadInputError, match=r"heart\.nii\.gz cannot be used: it lies up to"):
                convert(plan("totalsegmentator", tree.root, name="Moved"))


def test_totalsegmentator_one_image_twice(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "total")
    total(tree, {"s0000": "train"})
    tree.image("s0000/ct.nii", "s0000")
    assert "are one case twice" in refusal("totalsegmentator", tree.root)


def test_totalsegmentator_subset_of_the_official_cases(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "total")
    total(tree, {"s0000": "train", "s0001": "val"})
    with (tree.root / "meta.csv").open("a") as file:
        file.write("s0002;1;m;A;x;train\n")
    made = plan("totalsegmentator", tree.root)
    assert made.splits[0].name == "official-part"
    assert "1 case(s) of meta.csv are not here: s0002" in " ".join(made.notes)
