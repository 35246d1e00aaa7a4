"""Small volumes on randomly turned grids, a case, and a data set, to be broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from diffseg_nnunet.raw_dataset import Case

SIZE = (9, 8, 7)


def oblique(seed: int) -> tuple[list[float], list[float], list[float]]:
    """Spacing, origin (mm) and direction cosines of a grid that is turned a little against the patient."""
    rng = np.random.default_rng(seed)
    rotation = Rotation.from_euler("xyz", rng.uniform(-12, 12, 3), degrees=True).as_matrix()
    return rng.uniform(0.5, 4, 3).tolist(), rng.uniform(-300, 300, 3).tolist(), rotation.ravel().tolist()


def write(path: Path, voxels: np.ndarray, seed: int = 0, **geometry: list[float]) -> Path:
    """Write `voxels` (z, y, x) with the geometry of `seed`, single properties of it replaced."""
    volume = sitk.GetImageFromArray(voxels)
    spacing, origin, direction = oblique(seed)
    volume.SetSpacing(geometry.get("spacing", spacing))
    volume.SetOrigin(geometry.get("origin", origin))
    volume.SetDirection(geometry.get("direction", direction))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(volume, str(path), True)
    return path


def noise(seed: int = 0, size: tuple[int, ...] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def organs(dtype: type = np.uint8) -> np.ndarray:
    label = np.zeros(SIZE, dtype)
    label[2:4], label[4:6] = 1, 2
    return label


def truncate(path: Path, fraction: float = 0.6) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])


def make_dataset(root: Path, **changes: object) -> Path:
    folder = root / "Dataset003_Liver"
    for number in (1, 2):
        write(folder / f"imagesTr/liver_{number}_0000.nii.gz", noise(number), seed=number)
        write(folder / f"labelsTr/liver_{number}.nii.gz", organs(), seed=number)
    write(folder / "imagesUn/pool_1_0000.nii.gz", noise(3))
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "tumour": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
        **changes,
    }
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def case(tmp_path: Path) -> Case:
    image = write(tmp_path / "imagesTr/liver_1_0000.nii.gz", noise())
    return Case("liver_1", (image,), write(tmp_path / "labelsTr/liver_1.nii.gz", organs()))
