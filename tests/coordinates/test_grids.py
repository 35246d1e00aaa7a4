"""Maps on the scan's grid, against SimpleITK: a map of positions must say of each voxel where it is."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from diffseg_nnunet.coordinates.grids import ScanGrid, as_vector_image, resampled
from diffseg_nnunet.coordinates.positions import ArrayGeometry, preprocessed_to_patient

TRANSPOSITIONS = list(itertools.permutations(range(3)))
seeds = st.integers(0, 2**31)
ROUNDING_MM = 5e-3  # float32, hundreds of mm


def random_scan(rng: np.random.Generator) -> sitk.Image:
    scan = sitk.Image(rng.integers(5, 13, 3).tolist(), sitk.sitkUInt8)
    scan.SetSpacing(rng.uniform(0.5, 6, 3).tolist())
    scan.SetOrigin(rng.uniform(-300, 300, 3).tolist())
    turn = Rotation.from_quat(rng.normal(size=4)).as_matrix() * rng.choice([-1, 1], (1, 3))
    scan.SetDirection(turn.ravel().tolist())
    return scan


def places(image: sitk.Image) -> np.ndarray:
    """SimpleITK's position of each voxel: (z, y, x, 3)."""
    nx, ny, nz = image.GetSize()
    return np.array(
        [[[image.TransformIndexToPhysicalPoint((x, y, z)) for x in range(nx)] for y in range(ny)] for z in range(nz)]
    )


def preprocessed(
    scan: sitk.Image, rng: np.random.Generator, transpose_forward: tuple[int, ...]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Matrix and shape of a random preprocessed grid of a scan."""
    size = np.asarray(scan.GetSize()[::-1])[list(transpose_forward)]
    start = rng.integers(0, size - 2)
    cropped = rng.integers(2, size - start + 1)
    shape = tuple(rng.integers(2, 16, 3).tolist())
    direction = np.asarray(scan.GetDirection()).reshape(3, 3)
    geometry = ArrayGeometry(scan.GetSpacing()[::-1], scan.GetOrigin(), direction)
    return preprocessed_to_patient(geometry, transpose_forward, start.tolist(), cropped.tolist(), shape), shape


def positions_map(matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    return (np.tensordot(matrix[:, :3], index, axes=1) + matrix[:, 3].reshape(3, 1, 1, 1)).astype(np.float32)


@given(seed=seeds, transpose_forward=st.sampled_from(TRANSPOSITIONS))
@settings(max_examples=25, deadline=None)
def test_a_map_of_positions_says_where_each_voxel_of_the_scan_is(seed: int, transpose_forward: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    scan = random_scan(rng)
    matrix, shape = preprocessed(scan, rng, transpose_forward)
    image = as_vector_image(positions_map(matrix, shape), matrix)
    np.testing.assert_allclose(sitk.GetArrayViewFromImage(image), places(image), atol=ROUNDING_MM)

    result = resampled(image, ScanGrid.of(scan))
    assert result.GetPixelID() == sitk.sitkVectorFloat32
    assert ScanGrid.of(result) == ScanGrid.of(scan)
    expected, values = places(scan), sitk.GetArrayViewFromImage(result)
    index = np.linalg.solve(matrix[:, :3], (expected.reshape(-1, 3) - matrix[:, 3]).T)
    last = np.asarray(shape)[:, None] - 1
    inside = ((index >= 0) & (index <= last)).all(axis=0).reshape(expected.shape[:3])
    np.testing.assert_allclose(values[inside], expected[inside], atol=ROUNDING_MM)

    # beyond the preprocessed voxels: the nearest one's, which is at most half of each voxel's edges away
    nearest = (matrix[:, :3] @ index.clip(0, last)).T + matrix[:, 3]
    half_voxel = np.linalg.norm(matrix[:, :3], axis=0).sum() / 2
    assert np.linalg.norm(values.reshape(-1, 3) - nearest, axis=1).max() <= half_voxel + ROUNDING_MM


@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_the_grid_of_a_scan(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scan = random_scan(rng)
    matrix = ScanGrid.of(scan).index_to_patient()
    shape = scan.GetSize()[::-1]
    np.testing.assert_allclose(np.moveaxis(positions_map(matrix, shape), 0, -1), places(scan), atol=ROUNDING_MM)


def test_the_grid_of_a_file(tmp_path: Path) -> None:
    scan = random_scan(np.random.default_rng(0))
    path = tmp_path / "scan.nrrd"
    sitk.WriteImage(scan, str(path))
    grid, expected = ScanGrid.of_file(path), ScanGrid.of(scan)
    assert grid.size == expected.size
    np.testing.assert_allclose(grid.index_to_patient(), expected.index_to_patient(), atol=1e-9)
