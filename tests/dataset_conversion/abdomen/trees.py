"""Downloads under construction, compared with what was put into them.

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
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import RawDataset
from diffseg_nnunet.verification import verify_dataset
from diffseg_nnunet.workspace import Workspace

SHARED_DATA = Path(os.environ.get("DIFFSEG_TEST_DATA") or Path(__file__).resolve().parents[3] / "../shared/data")
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
