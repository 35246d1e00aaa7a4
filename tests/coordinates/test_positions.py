"""Positions of preprocessed voxels against SimpleITK, and against images whose voxels say where they are."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.spatial.transform import Rotation

from diffseg_nnunet.coordinates.positions import (
    ArrayGeometry,
    geometry_from_properties,
    preprocessed_to_patient,
)

TRANSPOSITIONS = list(itertools.permutations(range(3)))
READERS = ("SimpleITKIO", "NibabelIO", "SimpleITKIOWithReorient", "NibabelIOWithReorient")

seeds = st.integers(0, 2**31)


def random_direction(rng: np.random.Generator) -> np.ndarray:
    """A rotation, in half of the cases with one axis the other way round."""
    return Rotation.from_quat(rng.normal(size=4)).as_matrix() * rng.choice([-1, 1], (1, 3), p=[0.3, 0.7])


def random_header(rng: np.random.Generator, size: list[int]) -> sitk.Image:
    image = sitk.Image(size, sitk.sitkUInt8)
    image.SetSpacing(rng.uniform(0.3, 6, 3).tolist())
    image.SetOrigin(rng.uniform(-500, 500, 3).tolist())
    image.SetDirection(random_direction(rng).ravel().tolist())
    return image


def geometry_of(image: sitk.Image) -> ArrayGeometry:
    direction = np.asarray(image.GetDirection()).reshape(3, 3)
    return ArrayGeometry(image.GetSpacing()[::-1], image.GetOrigin(), direction)


def apply(matrix: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    return voxels @ matrix[:, :3].T + matrix[:, 3]


def transposed(image: sitk.Image, transpose_forward: tuple[int, ...]) -> sitk.Image:
    """The image whose array is ``array.transpose(transpose_forward)``; SimpleITK counts axes from the other end."""
    return sitk.PermuteAxes(image, [2 - transpose_forward[2 - axis] for axis in range(3)])


def resampled_grid(image: sitk.Image, shape: list[int]) -> sitk.Image:
    """An empty image of array shape `shape` that covers the same field of view, from outer face to outer face."""
    grid = sitk.Image(shape[::-1], sitk.sitkUInt8)
    extent = np.multiply(image.GetSpacing(), image.GetSize())
    spacing = extent / grid.GetSize()
    corner = image.TransformContinuousIndexToPhysicalPoint([-0.5, -0.5, -0.5])
    direction = np.asarray(image.GetDirection()).reshape(3, 3)
    grid.SetSpacing(spacing.tolist())
    grid.SetDirection(image.GetDirection())
    grid.SetOrigin((np.asarray(corner) + direction @ (spacing / 2)).tolist())
    return grid


@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_positions_in_the_file(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = random_header(rng, [5, 6, 7])
    voxels = rng.uniform(-3, 12, (10, 3))
    expected = [image.TransformContinuousIndexToPhysicalPoint(voxel[::-1].tolist()) for voxel in voxels]
    np.testing.assert_allclose(apply(geometry_of(image).index_to_patient(), voxels), expected, atol=1e-8)


@given(seed=seeds, transpose_forward=st.sampled_from(TRANSPOSITIONS))
@settings(max_examples=30, deadline=None)
def test_positions_after_preprocessing(seed: int, transpose_forward: tuple[int, ...]) -> None:
    """SimpleITK's own transposition, region of interest and grid lead to the same place as one matrix."""
    rng = np.random.default_rng(seed)
    image = random_header(rng, rng.integers(4, 20, 3).tolist())
    turned = transposed(image, transpose_forward)
    size = np.asarray(turned.GetSize()[::-1])
    start = rng.integers(0, size - 1)
    cropped_shape = rng.integers(1, size - start + 1)
    cropped = sitk.RegionOfInterest(turned, cropped_shape[::-1].tolist(), start[::-1].tolist())
    grid = resampled_grid(cropped, rng.integers(1, 30, 3).tolist())

    matrix = preprocessed_to_patient(
        geometry_of(image), transpose_forward, start.tolist(), cropped_shape.tolist(), grid.GetSize()[::-1]
    )
    voxels = rng.uniform(-5, 40, (10, 3))
    expected = [grid.TransformContinuousIndexToPhysicalPoint(voxel[::-1].tolist()) for voxel in voxels]
    np.testing.assert_allclose(apply(matrix, voxels), expected, atol=1e-6)


def ramps(folder: Path, direction: np.ndarray) -> list[str]:
    """Files of three channels, whose voxels hold their own position x, y and z in mm; a zero rim of uneven width."""
    size = (14, 17, 12)
    header = sitk.Image(size, sitk.sitkFloat32)
    header.SetSpacing((1.5, 2.0, 3.0))
    header.SetOrigin((-120.0, 340.0, 75.0))
    header.SetDirection(direction.ravel().tolist())
    z, y, x = np.meshgrid(*(np.arange(n) for n in size[::-1]), indexing="ij")
    places = [header.TransformIndexToPhysicalPoint(list(map(int, v))) for v in zip(x.flat, y.flat, z.flat, strict=True)]
    values = np.asarray(places).reshape(*size[::-1], 3)
    values[:2], values[:, :3], values[:, :, -1:] = 0, 0, 0
    files = []
    for channel in range(3):
        image = sitk.GetImageFromArray(values[..., channel].astype(np.float32))
        image.CopyInformation(header)
        files.append(str(folder / f"case_{channel:04d}.nii.gz"))
        sitk.WriteImage(image, files[-1])
    return files


def ramp_plans(reader: str, transpose_forward: tuple[int, ...], spacing: list[float]) -> dict[str, Any]:
    """Plans without normalisation and with linear resampling; `spacing` in transposed axes."""
    data = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": False}
    configuration = {
        "data_identifier": "ramps",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [8, 8, 8],
        "spacing": spacing,
        "normalization_schemes": ["NoNormalization"] * 3,
        "use_mask_for_norm": [False] * 3,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": data,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**data, "is_seg": True},
        "architecture": {},
    }
    return {
        "dataset_name": "Dataset001_Ramps",
        "plans_name": "ramps",
        "image_reader_writer": reader,
        "transpose_forward": list(transpose_forward),
        "transpose_backward": np.argsort(transpose_forward).tolist(),
        "foreground_intensity_properties_per_channel": {str(channel): {} for channel in range(3)},
        "configurations": {"3d_fullres": configuration},
    }


def inner_voxels(cropped_shape: list[int], shape: tuple[int, ...]) -> np.ndarray:
    """Voxels between centres of the source, where linear interpolation of a ramp is exact: int (N, 3)."""
    inner = []
    for old, new in zip(cropped_shape, shape, strict=True):
        source = (np.arange(new) + 0.5) * old / new - 0.5
        inner.append(np.flatnonzero((source >= 0) & (source <= old - 1)))
    return np.stack(np.meshgrid(*inner, indexing="ij"), axis=-1).reshape(-1, 3)


DIRECTIONS = {
    "straight": np.eye(3),
    "ras": np.diag([-1.0, -1.0, 1.0]),
    "coronal": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "tilted": Rotation.from_euler("xyz", [8, -13, 21], degrees=True).as_matrix(),
    "oblique": Rotation.from_euler("xyz", [75, 20, -130], degrees=True).as_matrix(),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("transpose_forward", "spacing"),
    [((0, 1, 2), [3.0, 2.0, 1.5]), ((0, 1, 2), [2.1, 1.7, 3.3]), ((2, 0, 1), [1.1, 2.5, 2.6]), ((1, 2, 0), [3, 1, 2])],
)
def test_nnunet_puts_voxels_where_we_say(
    tmp_path: Path, reader: str, direction: str, transpose_forward: tuple[int, ...], spacing: list[float]
) -> None:
    """nnU-Net's reader, transposition, crop and resampling of ramps: each voxel must hold its own position."""
    files = ramps(tmp_path, DIRECTIONS[direction])
    manager = PlansManager(ramp_plans(reader, transpose_forward, spacing))
    configuration = manager.get_configuration("3d_fullres")
    preprocessor = configuration.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case(files, None, manager, configuration, {})

    cropped_shape = properties["shape_after_cropping_and_before_resampling"]
    assert sorted(cropped_shape) == [10, 13, 14]  # the rim is gone
    matrix = preprocessed_to_patient(
        geometry_from_properties(properties),
        transpose_forward,
        [start for start, _ in properties["bbox_used_for_cropping"]],
        cropped_shape,
        data.shape[1:],
    )
    voxels = inner_voxels(cropped_shape, data.shape[1:])
    assert len(voxels) > 100
    # NIfTI stores its geometry, and the voxels here, in float32
    np.testing.assert_allclose(data[:, *voxels.T].T, apply(matrix, voxels), atol=5e-3)


def test_images_without_3d_geometry_have_no_positions(tmp_path: Path) -> None:
    flat = sitk.GetImageFromArray(np.arange(30, dtype=np.uint8).reshape(5, 6))
    for name, reader in (("flat.png", NaturalImage2DIO()), ("flat.nii.gz", SimpleITKIO())):
        sitk.WriteImage(flat, str(tmp_path / name))
        _, properties = reader.read_images([str(tmp_path / name)])
        assert geometry_from_properties(properties) is None
    assert geometry_from_properties({"spacing": (999.0, 1.0, 1.0)}) is None
