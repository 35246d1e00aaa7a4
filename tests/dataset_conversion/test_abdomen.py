"""BTCV, FLARE22, FLARE23 and AMOS22 in their public layouts, compared with what was put into the trees.

The comparison reads everything with nibabel and shares nothing with the converters: label values are those of the data
sets' own tables.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from diffseg_nnunet import registry
from diffseg_nnunet.dataset_conversion.description import ConversionPlan
from diffseg_nnunet.dataset_conversion.selection import prepared
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import RawDataset
from diffseg_nnunet.verification import verify_dataset
from diffseg_nnunet.workspace import Workspace

SHARED_DATA = Path(os.environ.get("DIFFSEG_TEST_DATA") or Path(__file__).resolve().parents[2] / "../shared/data")
BTCV = [
    "spleen",
    "right_kidney",
    "left_kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior_vena_cava",
    "portal_and_splenic_veins",
    "pancreas",
    "right_adrenal_gland",
    "left_adrenal_gland",
]
FLARE22 = [
    "liver",
    "right_kidney",
    "spleen",
    "pancreas",
    "aorta",
    "inferior_vena_cava",
    "right_adrenal_gland",
    "left_adrenal_gland",
    "gallbladder",
    "esophagus",
    "stomach",
    "duodenum",
    "left_kidney",
]
FLARE23 = [*FLARE22, "lesion"]
AMOS22 = [
    "spleen",
    "right_kidney",
    "left_kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior_vena_cava",
    "pancreas",
    "right_adrenal_gland",
    "left_adrenal_gland",
    "duodenum",
    "bladder",
    "prostate_or_uterus",
]
AMOS22_JSON = """background,spleen,right kidney,left kidney,gall bladder,esophagus,liver,stomach,arota,postcava,
    pancreas,right adrenal gland,left adrenal gland,duodenum,bladder,prostate/uterus"""
BTCV_NUMBERS = [*range(1, 11), *range(21, 41)]


class Tree:
    """A download under construction; every case has a grid and voxels of its own."""

    def __init__(self, root: Path, structures: list[str]):
        self.root, self.structures, self.seed = root, structures, 0

    def case(self, image: str, label: str | None = None, values: tuple[int, ...] | None = None) -> None:
        """Write an image and its label, which holds `values` (else some of all), and macOS's hidden twins."""
        self.seed += 1
        rng = np.random.default_rng(self.seed)
        affine = np.eye(4)
        rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        affine[:3, :3] = rotation * rng.uniform(0.5, 4, 3)
        affine[:3, 3] = rng.uniform(-300, 300, 3)
        shape = tuple(rng.integers(5, 9, 3))
        self.write(image, rng.integers(-1000, 1000, shape).astype(np.int16), affine)
        if label is not None:
            drawn = rng.choice(values or range(len(self.structures) + 1), shape)
            drawn.flat[: len(values or ())] = values or ()
            self.write(label, drawn.astype(np.uint8), affine)

    def write(self, name: str, voxels: np.ndarray, affine: np.ndarray) -> None:
        path = self.root / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, affine), path)
        path.with_name(f"._{path.name}").write_bytes(b"Mac OS X")

    def check(self, folder: Path, subfolder: str, identifier: str, image: str, label: str | None = None) -> None:
        """The written case against the files of the tree: voxels, places in mm, and structures by name."""
        written = nib.load(folder / f"images{subfolder}" / f"{identifier}_0000.nii.gz")
        source = nib.load(self.root / f"{image}.nii.gz")
        np.testing.assert_array_equal(np.asanyarray(written.dataobj), np.asanyarray(source.dataobj))
        np.testing.assert_allclose(written.affine, source.affine, atol=1e-3)
        label_path = folder / f"labels{subfolder}" / f"{identifier}.nii.gz"
        if label is None:
            assert not label_path.exists()
            return
        written, source = nib.load(label_path), nib.load(self.root / f"{label}.nii.gz")
        np.testing.assert_allclose(written.affine, source.affine, atol=1e-3)
        values = json.loads((folder / "dataset.json").read_text())["labels"]
        for value, name in enumerate(["background", *self.structures]):
            same = (np.asanyarray(source.dataobj) == value) == (np.asanyarray(written.dataobj) == values[name])
            assert same.all(), (identifier, name)


def plan(name: str, source: Path, **options: Any) -> ConversionPlan:
    return registry.load("converters", name)().plan(source, **options)


def convert(name: str, source: Path, workspace: Workspace, **options: Any) -> Path:
    report = plan(name, source, **options).execute(dataset_id=1, workspace=workspace, workers=2)
    findings = verify_dataset(RawDataset.open(report.folder), workers=2)
    assert [finding for finding in findings if finding.severity == "error"] == []
    return report.folder


def refusal(name: str, source: Path, **options: Any) -> str:
    with pytest.raises(BadInputError) as caught:
        plan(name, source, **options)
    assert caught.value.mend
    return str(caught.value)


def count(folder: Path, subfolder: str) -> int:
    return len(list((folder / subfolder).glob("*"))) if (folder / subfolder).is_dir() else 0


def notes(name: str, source: Path, **options: Any) -> str:
    return "\n".join(plan(name, source, **options).notes)


# --- BTCV -------------------------------------------------------------------------------------------------------------

BTCV_LAYOUTS = {
    "RawData": ("RawData/Training/img/img{0}", "RawData/Training/label/label{0}", "RawData/Testing/img/img{0}"),
    "renamed": ("data/bcv/Training/img/img{0}", "data/bcv/Training/label/label{0}", "data/bcv/Testing/img/img{0}"),
    "nested": (
        "RawData/Training/img/{0}/img{0}",
        "RawData/Training/label/{0}/label{0}",
        "RawData/Testing/img/{0}/img{0}",
    ),
    "MONAI": ("imagesTr/img{0}", "labelsTr/label{0}", "imagesTs/img{0}"),
}


def btcv(root: Path, layout: str = "RawData", numbers: list[int] = BTCV_NUMBERS) -> tuple[Tree, list[str]]:
    tree = Tree(root, BTCV)
    images, labels, tests = patterns = list(BTCV_LAYOUTS[layout])
    for number in numbers:
        tree.case(images.format(f"{number:04d}"), labels.format(f"{number:04d}"))
    for number in (61, 80):
        tree.case(tests.format(f"{number:04d}"))
    return tree, patterns


@pytest.mark.parametrize("layout", BTCV_LAYOUTS)
def test_btcv(tmp_path: Path, workspace: Workspace, layout: str) -> None:
    tree, (image, label, test) = btcv(tmp_path / "btcv", layout)
    folder = convert("btcv", tmp_path / "btcv", workspace)
    assert (count(folder, "imagesTr"), count(folder, "labelsTr"), count(folder, "imagesTs")) == (30, 30, 2)
    for number in (f"{number:04d}" for number in BTCV_NUMBERS):
        tree.check(folder, "Tr", f"btcv_{number}", image.format(number), label.format(number))
    for number in ("0061", "0080"):
        tree.check(folder, "Ts", f"btcv_{number}", test.format(number))
    assert json.loads((folder / "dataset.json").read_text())["channel_names"] == {"0": "CT"}


def test_btcv_splits_name_its_cases(tmp_path: Path) -> None:
    btcv(tmp_path / "btcv")
    made = plan("btcv", tmp_path / "btcv")
    assert [scheme.name for scheme in made.splits][:2] == ["24/6", "18/12"]
    assert made.splits[0].folds[0]["val"] == tuple(f"btcv_00{number}" for number in range(35, 41))
    training = {case.identifier for case in made.cases if case.role == "training"}
    assert all({*fold["train"], *fold["val"]} <= training for scheme in made.splits for fold in scheme.folds)


@pytest.mark.parametrize("start", ["RawData", "RawData/Training", "RawData/Training/img", ".."])
def test_btcv_one_level_too_low_or_too_high(tmp_path: Path, start: str) -> None:
    btcv(tmp_path / "btcv")
    assert len(plan("btcv", tmp_path / "btcv" / start).cases) == 32


def test_btcv_half_a_download(tmp_path: Path, workspace: Workspace) -> None:
    source = tmp_path / "btcv"
    btcv(source, numbers=BTCV_NUMBERS[:24])
    shutil.rmtree(source / "RawData/Testing")
    said = notes("btcv", source)
    assert "24 training image(s) found as Training/img/img{case}, a whole download has 30." in said
    assert "offered whole or not at all: 24/6, 18/12" in said
    assert "btcv_0035" in said
    assert [scheme.name for scheme in plan("btcv", source).splits] == ["5-fold"]
    assert count(convert("btcv", source, workspace), "imagesTr") == 24


def test_btcv_missing_labels_and_images(tmp_path: Path) -> None:
    btcv(tmp_path / "btcv", numbers=[1, 2, 3])
    (tmp_path / "btcv/RawData/Training/label/label0002.nii.gz").unlink()
    message = refusal("btcv", tmp_path / "btcv")
    assert "1 file(s) have no label" in message
    assert "img0002.nii.gz" in message
    (tmp_path / "btcv/RawData/Training/img/img0002.nii.gz").unlink()
    (tmp_path / "btcv/RawData/Training/img/img0003.nii.gz").unlink()
    assert "1 file(s) have no image" in refusal("btcv", tmp_path / "btcv")


def test_btcv_is_not_the_cardiac_set_beside_it(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "syn3193805", ["heart"])
    tree.case("averaged-training-images/DET0000101_avg", "averaged-training-labels/DET0000101_avg_seg")
    for start in (tree.root, tree.root / "averaged-training-images"):
        message = refusal("btcv", start)
        assert "cardiac set, not the 30 abdominal CTs" in message
        assert "RawData.zip" in message
    btcv(tree.root / "Abdomen")
    assert len(plan("btcv", tree.root).cases) == 32


def test_btcv_something_else(tmp_path: Path) -> None:
    Tree(tmp_path / "other", BTCV).case("images/a", "labels/a")
    assert "Training/img/img0001.nii.gz" in refusal("btcv", tmp_path / "other")
    assert "There is no folder" in refusal("btcv", tmp_path / "nowhere")


@pytest.mark.skipif(not (SHARED_DATA / "BTCV_3mm").is_dir(), reason=f"no BTCV_3mm in {SHARED_DATA} (DIFFSEG_TEST_DATA)")
def test_real_btcv(workspace: Workspace) -> None:
    tree = Tree(SHARED_DATA / "BTCV_3mm/RawData/Training", BTCV)
    folder = convert("btcv", SHARED_DATA / "BTCV_3mm", workspace)
    numbers = [f"{number:04d}" for number in [*range(1, 11), *range(21, 35)]]
    assert count(folder, "imagesTr") == count(folder, "labelsTr") == len(numbers) == 24
    for number in numbers:
        tree.check(folder, "Tr", f"btcv_{number}", f"img/img{number}", f"label/label{number}")


# --- FLARE22 ----------------------------------------------------------------------------------------------------------


def flare22(root: Path, training: str = "Training/") -> Tree:
    tree = Tree(root, FLARE22)
    for number in (1, 2, 3, 50):
        name = f"{training}FLARE22_LabeledCase50/{{}}/FLARE22_Tr_{number:04d}"
        tree.case(f"{name.format('images')}_0000", name.format("labels"))
    tree.case(f"{training}FLARE22_UnlabeledCase1-1000/Case_00001_0000")
    tree.case(f"{training}FLARE22_UnlabeledCase1001-2000/Case_02000_0000")
    for number in (1, 2):
        tree.case(f"Tuning/images/FLARETs_000{number}_0000", f"Tuning/labels/FLARETs_000{number}")
    tree.case("Testing/FLARETs_0001_0000")
    return tree


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


def hugging_face(root: Path) -> Tree:
    tree = Tree(root, FLARE22)
    for number in range(1, 7):
        name = f"train_gt_label/{{}}/FLARE22_Tr_000{number}"
        tree.case(f"{name.format('imagesTr')}_0000", name.format("labelsTr"))
    pool = "train_pseudo_label"
    # as the two teams named their files
    tree.case(f"{pool}/imagesTr/Case_00001_0000", f"{pool}/pseudo_label_blackbean_flare22/Case_00001")
    shutil.copytree(tree.root / pool / "pseudo_label_blackbean_flare22", tree.root / pool / "flare22_aladdin5_pseudo")
    (tree.root / pool / "flare22_aladdin5_pseudo/Case_00001.nii.gz").rename(
        tree.root / pool / "flare22_aladdin5_pseudo/Case1.nii.gz"
    )
    tree.case(f"{pool}/imagesTr/Case_00010_0000", f"{pool}/flare22_aladdin5_pseudo/Case_00010")
    tree.case(f"{pool}/imagesTr/Case_01999_0000")
    tree.case(
        "validation/Validation-Public-Images/FLARETs_0001_0000", "validation/Validation-Public-Labels/FLARETs_0001"
    )
    tree.case("validation/Validation-Hidden-Images/FLARETs_0001_0000")
    return tree


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


# --- FLARE23 ----------------------------------------------------------------------------------------------------------


def flare23(root: Path, suffix: str = "_0000") -> Tree:
    """Case 1 has everything, 2 all organs, 3 five organs and a lesion, 4 a lesion alone."""
    tree = Tree(root, FLARE23)
    contents = (range(15), range(14), (0, 1, 2, 3, 4, 13, 14), (0, 14))
    for number, values in enumerate(contents, start=1):
        name = f"FLARE23_000{number}"
        tree.case(f"imagesTr2200/{name}_0000", f"labelsTr2200/{name}", tuple(values))
    tree.case(f"unlabeledTr1800/FLARE23_2201{suffix}")
    tree.case("validation/FLARE23Ts_0001_0000")
    return tree


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


# --- AMOS22 -----------------------------------------------------------------------------------------------------------


def amos22(root: Path) -> Tree:
    """Two CTs and an MR a folder, at the edges of their ranges."""
    tree = Tree(root, AMOS22)
    listed: dict[str, list[dict[str, str]]] = {"training": [], "validation": [], "test": []}
    ids = {"Tr": (1, 410, 507), "Va": (8, 409, 555), "Ts": (2, 500, 571)}
    for (part, numbers), key in zip(ids.items(), listed, strict=True):
        for number in numbers:
            image, label = f"images{part}/amos_{number:04d}", f"labels{part}/amos_{number:04d}"
            tree.case(image, None if part == "Ts" else label)
            listed[key].append({"image": f"./{image}.nii.gz", "label": f"./{label}.nii.gz"})
    names = [name.strip() for name in AMOS22_JSON.split(",")]
    content = {"name": "AMOS", "labels": {str(value): name for value, name in enumerate(names)}, **listed}
    (root / "dataset.json").write_text(json.dumps(content))
    return tree


@pytest.mark.parametrize(
    ("modality", "name", "channel", "training", "validation", "test"),
    [
        (None, "AMOS22CT", "CT", ("0001", "0410"), ("0008", "0409"), ("0002", "0500")),
        ("mr", "AMOS22MR", "MR", ("0507",), ("0555",), ("0571",)),
        (
            "both",
            "AMOS22",
            "either_CT_or_MR",
            ("0001", "0410", "0507"),
            ("0008", "0409", "0555"),
            ("0002", "0500", "0571"),
        ),
    ],
)
def test_amos22(
    tmp_path: Path,
    workspace: Workspace,
    modality: str | None,
    name: str,
    channel: str,
    training: tuple[str, ...],
    validation: tuple[str, ...],
    test: tuple[str, ...],
) -> None:
    tree = amos22(tmp_path / "amos22")
    folder = convert("amos22", tree.root, workspace, modality=modality)
    assert folder.name == f"Dataset001_{name}"
    assert json.loads((folder / "dataset.json").read_text())["channel_names"] == {"0": channel}
    for part, numbers in (("Tr", training), ("Va", validation), ("Ts", test)):
        for number in numbers:
            label = None if part == "Ts" else f"labels{part}/amos_{number}"
            target = "Ts" if part == "Ts" else "Tr"
            tree.check(folder, target, f"amos_{number}", f"images{part}/amos_{number}", label)
    assert count(folder, "imagesTr") == len(training) + len(validation)
    assert count(folder, "imagesTs") == len(test)
    official = plan("amos22", tree.root, modality=modality).splits[0]
    assert official.name == "official"
    assert official.folds[0] == {
        "train": tuple(f"amos_{number}" for number in training),
        "val": tuple(f"amos_{number}" for number in validation),
    }


def test_amos22_half_a_download_and_wrong_options(tmp_path: Path) -> None:
    tree = amos22(tmp_path / "amos22")
    for gone in ("imagesVa", "labelsVa", "imagesTs"):
        shutil.rmtree(tree.root / gone)
    said = notes("amos22", tree.root)
    assert "6 image(s) that" in said
    assert "dataset.json lists are not there: amos_0002.nii.gz" in said
    assert [scheme.name for scheme in plan("amos22", tree.root / "labelsTr").splits] == ["2-fold"]
    assert "Choose CT, MR or both" in refusal("amos22", tree.root, modality="PET")
    (tree.root / "imagesTr/amos_0507.nii.gz").unlink()
    (tree.root / "labelsTr/amos_0507.nii.gz").unlink()
    assert "has no labelled MR" in refusal("amos22", tree.root, modality="MR")
    shutil.rmtree(tree.root / "labelsTr")
    assert "2 file(s) have no label" in refusal("amos22", tree.root)


def test_amos22_with_other_labels(tmp_path: Path) -> None:
    tree = amos22(tmp_path / "amos22")
    content = json.loads((tree.root / "dataset.json").read_text())
    content["labels"] = {"0": "background", "1": "liver"}
    (tree.root / "dataset.json").write_text(json.dumps(content))
    assert "has other labels than AMOS22: spleen" in refusal("amos22", tree.root)


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [btcv, flare22, hugging_face, flare23, amos22])
def test_each_format_recognises_its_own_alone(tmp_path: Path, made: Any) -> None:
    made(tmp_path / "download")
    formats = {name: registry.load("converters", name)() for name in ("btcv", "flare22", "flare23", "amos22")}
    recognised = [name for name, converter in formats.items() if converter.recognise(tmp_path / "download")]
    assert recognised == [{"hugging_face": "flare22"}.get(made.__name__, made.__name__)]
