"""Segmentations of a folder, and whether another folder has the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

SHARE = 1e-5
"""Of the voxels, that may differ from stock nnU-Net's: those where two classes are as likely to the last digit."""


def segmentations(folder: Path) -> dict[str, np.ndarray]:
    """File name -> voxels."""
    return {path.name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted(folder.glob("*.nii.gz"))}


def assert_same_segmentations(ours: Path, stock: Path) -> None:
    first, second = segmentations(ours), segmentations(stock)
    assert list(first) == list(second)
    assert first
    for name, array in first.items():
        assert array.shape == second[name].shape
        assert (array != second[name]).mean() <= SHARE, name
        assert len(np.unique(array)) > 1, f"{name} is empty: nothing is compared"
