"""Distances between grids, against positions computed voxel by voxel, and the names of orientations."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from diffseg_nnunet.verification.geometry import Grid, is_mirrored, orientation_code


def volume(rng: np.random.Generator, size: tuple[int, ...]) -> sitk.Image:
    image = sitk.Image(size, sitk.sitkUInt8)
    image.SetSpacing(rng.uniform(0.5, 4, 3).tolist())
    image.SetOrigin(rng.uniform(-100, 100, 3).tolist())
    image.SetDirection(Rotation.random(random_state=int(rng.integers(1 << 30))).as_matrix().ravel().tolist())
    return image


@given(st.integers(0, 10_000))
def test_displacement_is_that_of_the_farthest_voxel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = tuple(int(extent) for extent in rng.integers(1, 5, 3))
    first, second = volume(rng, size), volume(rng, size)
    farthest = max(
        abs(
            np.array(first.TransformPhysicalPointToContinuousIndex(second.TransformIndexToPhysicalPoint(index))) - index
        ).max()
        for index in (tuple(map(int, index)) for index in np.ndindex(size))
    )
    assert Grid.of(second).displacement_voxels(Grid.of(first)) == pytest.approx(farthest, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("code", ["LPS", "RAS", "LAS", "PIR", "SLA"])
def test_orientations_are_called_as_simpleitk_calls_them(code: str) -> None:
    image = sitk.DICOMOrient(sitk.Image((2, 3, 4), sitk.sitkUInt8), code)
    assert orientation_code(image.GetDirection()) == code
    turned = Rotation.from_euler("x", 20, degrees=True).as_matrix() @ np.reshape(image.GetDirection(), (3, 3))
    assert orientation_code(tuple(turned.ravel())) == code
    assert is_mirrored(image.GetDirection()) == (np.linalg.det(np.reshape(image.GetDirection(), (3, 3))) < 0)


def test_a_grid_between_two_orientations_has_none() -> None:
    turned = Rotation.from_euler("z", 40, degrees=True).as_matrix()
    assert orientation_code(tuple(turned.ravel())) == "oblique"
    assert not is_mirrored(tuple(turned.ravel()))
    assert is_mirrored((-1.0, 0, 0, 0, 1, 0, 0, 0, 1))
