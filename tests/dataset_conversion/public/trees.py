"""Public downloads under construction, and what was converted of them: kept, written and read with nibabel."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from diffseg_nnunet import registry
from diffseg_nnunet.dataset_conversion.description import ConversionPlan
from diffseg_nnunet.errors import BadInputError

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
