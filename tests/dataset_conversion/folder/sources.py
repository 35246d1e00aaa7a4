"""Folders of images and labels, and what the tests of their conversion ask of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from diffseg_nnunet.dataset_conversion.core import ConversionReport
from diffseg_nnunet.errors import EXIT_BAD_INPUT, BadInputError
from diffseg_nnunet.workspace import Workspace

SIZE = (7, 8, 9)

Run = Callable[..., ConversionReport]
"""Plans and converts, with defaults that its arguments change."""


def write(path: Path, voxels: np.ndarray, seed: int = 0) -> Path:
    """Write `voxels` (z, y, x) on a randomly rotated, shifted and scaled grid, the same for the same seed."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    volume = sitk.GetImageFromArray(voxels)
    volume.SetDirection((rotation * np.sign(np.linalg.det(rotation))).ravel().tolist())
    volume.SetSpacing(rng.uniform(0.5, 4, 3).tolist())
    volume.SetOrigin(rng.uniform(-300, 300, 3).tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(volume, str(path), True)
    return path


def scan(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(40, 100, SIZE).astype(np.float32)


def organs(dtype: type = np.uint8) -> np.ndarray:
    label = np.zeros(SIZE, dtype)
    label[2:4], label[4:6] = 1, 2
    return label


def assert_same_volume(written: Path, source: sitk.Image) -> None:
    """Equal voxels, and every corner at the same place in the patient (mm)."""
    volume = sitk.ReadImage(str(written))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(volume), sitk.GetArrayFromImage(source))
    for corner in np.ndindex(2, 2, 2):
        index = [int(side * (extent - 1)) for side, extent in zip(corner, source.GetSize(), strict=True)]
        places = [each.TransformIndexToPhysicalPoint(index) for each in (volume, source)]
        np.testing.assert_allclose(*places, atol=1e-4)


def refusal(run: Run, workspace: Workspace, **changes: object) -> str:
    """The message a user gets; nothing may be left behind."""
    before = sorted(workspace.raw.rglob("*")) if workspace.raw.exists() else []
    with pytest.raises(BadInputError) as caught:
        run(**changes)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert caught.value.mend
    assert (sorted(workspace.raw.rglob("*")) if workspace.raw.exists() else []) == before
    return str(caught.value)
