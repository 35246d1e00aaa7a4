"""TotalSegmentator, WORD, KiTS and ACDC in their public trees; the truth is kept, written and read with nibabel."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nnunetv2.dataset_conversion.Dataset027_ACDC import create_ACDC_split

from diffseg_nnunet import registry
from diffseg_nnunet.dataset_conversion import totalsegmentator_classes
from diffseg_nnunet.dataset_conversion.description import ConversionPlan
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.workspace import Workspace

SIZE = (6, 7, 8)
Named = dict[str, np.ndarray]


class Tree:
    """A download of tiny volumes; every case has a grid of its own, which its files share."""

    def __init__(self, root: Path, seed: int = 0):
        self.root = root
        self.rng = np.random.default_rng(seed)
        self.affines: dict[str, np.ndarray] = {}

    def affine(self, case: str) -> np.ndarray:
        if case not in self.affines:
            rotation, _ = np.linalg.qr(self.rng.normal(size=(3, 3)))
            self.affines[case] = np.eye(4)
            self.affines[case][:3, :3] = rotation * self.rng.uniform(0.5, 4, 3)
            self.affines[case][:3, 3] = self.rng.uniform(-300, 300, 3)
        return self.affines[case]

    def write(self, path: str, case: str, voxels: np.ndarray) -> np.ndarray:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, self.affine(case)), self.root / path)
        hidden = (self.root / path).with_name("._" + Path(path).name)
        hidden.write_bytes(b"macOS")
        return voxels

    def image(self, path: str, case: str) -> np.ndarray:
        return self.write(path, case, self.rng.integers(-1000, 1000, SIZE).astype(np.int16))

    def label(self, path: str, case: str, names: dict[str, int]) -> Named:
        """A random label map with all values; its masks by name."""
        voxels = self.rng.choice([0, *names.values()], SIZE).astype(np.uint8)
        voxels.flat[: len(names)] = list(names.values())
        self.write(path, case, voxels)
        return {name: voxels == value for name, value in names.items()}

    def text(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)


class Written:
    """A converted data set, read with nibabel."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.json = json.loads((folder / "dataset.json").read_text())

    def cases(self, subfolder: str) -> list[str]:
        return sorted(path.name.removesuffix(".nii.gz") for path in (self.folder / subfolder).glob("*"))

    def check(self, role: str, case: str, tree: Tree, image: np.ndarray, truth: Named | None) -> None:
        """Voxels, place and the mask of each name are those of the source."""
        written = nib.load(self.folder / f"images{role}/{case}_0000.nii.gz")
        np.testing.assert_array_equal(np.asanyarray(written.dataobj), image)
        np.testing.assert_allclose(written.affine, tree.affines[case], atol=1e-4)
        path = self.folder / f"labels{role}/{case}.nii.gz"
        if truth is None:
            assert not path.exists()
            return
        label = nib.load(path)
        voxels = np.asanyarray(label.dataobj)
        np.testing.assert_allclose(label.affine, tree.affines[case], atol=1e-4)
        for name, value in self.json["labels"].items():
            expected = truth.get(name, np.zeros(SIZE, bool)) if value else ~np.any(list(truth.values()), axis=0)
            np.testing.assert_array_equal(voxels == value, expected, err_msg=name)


Convert = Callable[..., Written]


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    workspace = Workspace.locate(tmp_path / "workspace")

    def convert(plan: ConversionPlan) -> Written:
        return Written(plan.execute(dataset_id=1, workspace=workspace, workers=2).folder)

    return convert


def plan(format_name: str, source: Path, **options: object) -> ConversionPlan:
    return registry.load("converters", format_name)().plan(source, **options)


def refusal(format_name: str, source: Path, **options: object) -> str:
    with pytest.raises(BadInputError) as caught:
        plan(format_name, source, **options)
    assert caught.value.mend
    return str(caught.value)


def certain(source: Path) -> dict[str, float]:
    """Format -> certainty, of all that recognise the folder."""
    found = {name: registry.load("converters", name)().recognise(source) for name in registry.names("converters")}
    assert all(name == each.format_name and each.reason for name, each in found.items() if each)
    return {name: each.certainty for name, each in found.items() if each}


# --- TotalSegmentator -------------------------------------------------------------------------------------------------

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


# --- WORD -------------------------------------------------------------------------------------------------------------

WORD_NAMES = (
    "liver spleen left_kidney right_kidney stomach gallbladder esophagus pancreas duodenum colon intestine "
    "adrenal_glands rectum bladder left_femur right_femur"
)
WORD_LABELS = {name: value for value, name in enumerate(WORD_NAMES.split(), start=1)}


def word(tree: Tree) -> dict[str, tuple]:
    truth = {}
    for role, case in (("Tr", "word_0002"), ("Tr", "word_0003"), ("Val", "word_0001"), ("Ts", "word_0014")):
        label = tree.label(f"labels{role}/{case}.nii.gz", case, WORD_LABELS)
        truth[case] = (tree.image(f"images{role}/{case}.nii.gz", case), label)
    return truth


def test_word(tmp_path: Path, convert: Convert) -> None:
    tree = Tree(tmp_path / "WORD-V0.1.0")
    truth = word(tree)
    made = plan("word", tree.root)
    written = convert(made)
    for case in ("word_0001", "word_0002", "word_0003"):
        written.check("Tr", case, tree, *truth[case])
    written.check("Ts", "word_0014", tree, *truth["word_0014"])
    assert made.splits[0].folds == ({"train": ("word_0002", "word_0003"), "val": ("word_0001",)},)
    assert made.splits[0].name == "official-part"
    assert certain(tree.root) == {"word": 1.0}
    # one level too high, and one too low
    assert len(plan("word", tmp_path).cases) == len(plan("word", tree.root / "imagesTr").cases) == 4


def test_word_half_downloaded(tmp_path: Path, convert: Convert) -> None:
    tree = Tree(tmp_path / "WORD")
    word(tree)
    (tree.root / "labelsTr/word_0002.nii.gz").unlink()
    assert "1 file(s) have no label" in refusal("word", tree.root)
    tree.write("labelsTr/word_0002.nii.gz", "word_0002", np.full(SIZE, 17, np.uint8))
    with pytest.raises(BadInputError, match="17"):
        convert(plan("word", tree.root))
    tree.label("labelsTr/word_0002.nii.gz", "word_0002", WORD_LABELS)
    tree.image("imagesVal/word_0002.nii.gz", "word_0002")
    tree.label("labelsVal/word_0002.nii.gz", "word_0002", WORD_LABELS)
    with pytest.raises(BadInputError, match="Two cases are called 'word_0002'"):
        convert(plan("word", tree.root))
    assert "does not look like WORD" in refusal("word", _elsewhere(tmp_path))


def _elsewhere(folder: Path) -> Path:
    (folder / "elsewhere/deep/deeper/deepest").mkdir(parents=True)
    (folder / "elsewhere/deep/deeper/deepest/notes.txt").touch()
    return folder / "elsewhere/deep/deeper/deepest"


# --- KiTS -------------------------------------------------------------------------------------------------------------

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


# --- ACDC -------------------------------------------------------------------------------------------------------------

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
