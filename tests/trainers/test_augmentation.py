"""Augmented patches know where they lie: scans whose voxels hold their own position say so voxel by voxel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgeneratorsv2.transforms.spatial.spatial import create_affine_matrix_2d, create_affine_matrix_3d
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy.ndimage import binary_erosion
from scipy.spatial.transform import Rotation

from diffseg_nnunet.coordinates.positions import ArrayGeometry, preprocessed_to_patient
from diffseg_nnunet.trainers.augmentation import ROTATION_RAD, SCALING, PatchAugmentation, box_mask, composed
from diffseg_nnunet.trainers.loaders import PatchPairLoader
from diffseg_nnunet.training.seeding import random_stream

LABELS = LabelManager({"background": 0, "organ": 1}, regions_class_order=None)
KINDS = {"2d": ((12, 9), False), "3d": ((8, 12, 9), False), "in_plane": ((5, 12, 10), True)}
every_kind = pytest.mark.parametrize("kind", KINDS)


def always(patch: Sequence[int], in_plane: bool, **kinds: bool) -> PatchAugmentation:
    """Turned and scaled each time."""
    augmentation = PatchAugmentation(patch, in_plane, **kinds)
    augmentation._spatial.p_rotation = augmentation._spatial.p_scaling = 1.0
    return augmentation


def positions(shape: Sequence[int]) -> torch.Tensor:
    """Three channels: the index of each voxel, 0 on the first axis in 2D."""
    axes = list(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    return torch.from_numpy(np.stack([np.zeros(shape)] * (3 - len(shape)) + axes)).float()


def voxels_of(mask: np.ndarray) -> np.ndarray:
    """Indices where the mask holds, three numbers each."""
    found = np.argwhere(mask)
    return np.concatenate([np.zeros((len(found), 3 - found.shape[1])), found], axis=1)


def rimless(mask: np.ndarray) -> np.ndarray:
    """Without the outermost voxels: their values are interpolated with the padding beyond."""
    return binary_erosion(mask)


@every_kind
def test_each_voxel_says_where_in_the_crop_it_was(kind: str) -> None:
    patch_size, in_plane = KINDS[kind]
    augmentation = always(patch_size, in_plane, intensity=False)
    crop = positions(augmentation.crop_size)
    whole = torch.ones((1, *augmentation.crop_size), dtype=torch.int16)
    matrices = []
    for seed in range(12):
        with random_stream(seed):
            patch, mask, matrix = augmentation(crop, whole)
        assert patch.shape[1:] == mask.shape[1:] == patch_size
        inner = rimless(mask[0].numpy() > 0)
        assert inner.any()
        expected = voxels_of(inner) @ matrix[:, :3].T + matrix[:, 3]
        np.testing.assert_allclose(patch.numpy()[:, inner].T, expected, atol=1e-3)
        matrices.append(matrix)
    assert len({matrix.tobytes() for matrix in matrices}) == 12


@pytest.mark.parametrize(
    ("patch_size", "in_plane"),
    [((64, 64), False), ((96, 48), False), ((24, 24, 24), False), ((16, 28, 24), False), ((6, 40, 32), True)],
)
def test_next_to_nothing_of_a_turned_patch_is_missing(patch_size: tuple[int, ...], in_plane: bool) -> None:
    """nnU-Net's rule for the crop turns its corner one way only, so a corner may reach out of it, but not much."""
    augmentation = always(patch_size, in_plane, intensity=False)
    whole = torch.ones((1, *augmentation.crop_size))
    missing = []
    for seed in range(40):
        with random_stream(seed):
            patch, mask, _ = augmentation(whole, whole.to(torch.int16))
        missing.append(1 - mask.float().mean().item())
        assert not patch[mask == 0].any()
    assert np.mean(missing) < 0.02
    assert np.max(missing) < 0.1


@every_kind
def test_turns_and_scales_are_what_they_are_said_to_be(kind: str) -> None:
    patch_size, in_plane = KINDS[kind]
    augmentation = always(patch_size, in_plane)
    crop = torch.zeros((1, *augmentation.crop_size))
    scales = []
    for seed in range(200):
        with random_stream(seed):
            *_, matrix = augmentation(crop, torch.ones(crop.shape, dtype=torch.int16))
        linear = matrix[:, :3]
        lengths = np.linalg.norm(linear, axis=1), np.linalg.norm(linear, axis=0)
        if kind != "3d":  # the first axis keeps its place
            np.testing.assert_allclose(linear[0], [1, 0, 0], atol=1e-12)
            np.testing.assert_allclose(linear[:, 0], [1, 0, 0], atol=1e-12)
        # an orthogonal matrix times a diagonal one, on either side
        turn = [linear / lengths[0][:, None], linear / lengths[1]]
        assert any(np.allclose(r @ r.T, np.eye(3), atol=1e-9) for r in turn)
        assert np.linalg.det(linear) > 0
        singular = np.linalg.svd(linear)[1]
        assert singular.min() >= SCALING[0] - 1e-9
        assert singular.max() <= SCALING[1] + 1e-9
        angle = Rotation.from_matrix(next(r for r in turn if np.allclose(r @ r.T, np.eye(3), atol=1e-9))).magnitude()
        assert angle <= (ROTATION_RAD if kind != "3d" else np.sqrt(3) * ROTATION_RAD) + 1e-9
        scales.append(singular)
    assert np.min(scales) < 0.85
    assert np.max(scales) > 1.15


@every_kind
def test_matrix_is_batchgenerators_own(kind: str) -> None:
    """The linear part, built anew from the angles and scales the transform draws first."""
    patch_size, in_plane = KINDS[kind]
    augmentation = always(patch_size, in_plane, intensity=False)
    dimensions = len(patch_size)
    with random_stream(3):
        crop = torch.zeros((1, *augmentation.crop_size))
        *_, matrix = augmentation(crop, torch.ones(crop.shape, dtype=torch.int16))
    with random_stream(3):
        np.random.uniform(size=3)  # whether to turn, to scale, to deform
        if in_plane:
            angles = [np.random.uniform(-ROTATION_RAD, ROTATION_RAD), 0, 0]
        else:
            angles = list(np.random.uniform(-ROTATION_RAD, ROTATION_RAD, dimensions))
        np.random.uniform()  # whether all axes are scaled alike
        scales = [1.0] * in_plane + list(np.random.uniform(*SCALING, dimensions - in_plane))
    expected = (
        create_affine_matrix_3d(angles, scales) if dimensions == 3 else create_affine_matrix_2d(angles[-1], scales)
    )
    np.testing.assert_allclose(matrix[3 - dimensions :, 3 - dimensions : 3], expected, atol=1e-12)


@every_kind
def test_most_patches_are_only_cropped(kind: str) -> None:
    """Then no voxel is interpolated: what comes out is a part of what went in, and the matrix says which."""
    patch_size, in_plane = KINDS[kind]
    augmentation = PatchAugmentation(patch_size, in_plane, intensity=False)
    crop = positions(augmentation.crop_size)
    plain = 0
    for seed in range(200):
        with random_stream(seed):
            patch, mask, matrix = augmentation(crop, torch.ones((1, *crop.shape[1:]), dtype=torch.int16))
        if np.array_equal(matrix[:, :3], np.eye(3)):
            plain += 1
            assert mask.all()
            expected = voxels_of(np.ones(patch_size, bool)) + matrix[:, 3]
            np.testing.assert_array_equal(patch.flatten(1).numpy().T, expected)
    assert plain == pytest.approx(200 * 0.8**2, abs=4 * np.sqrt(200 * 0.64 * 0.36))


@every_kind
def test_without_either_kind_nothing_happens(kind: str) -> None:
    patch_size, in_plane = KINDS[kind]
    augmentation = PatchAugmentation(patch_size, in_plane, spatial=False, intensity=False)
    assert tuple(augmentation.crop_size) == patch_size
    crop, mask = positions(patch_size), torch.ones((1, *patch_size), dtype=torch.int16)
    patch, found, matrix = augmentation(crop, mask)
    assert torch.equal(patch, crop)
    assert torch.equal(found, mask)
    assert np.array_equal(matrix, np.eye(3, 4))


@every_kind
def test_brightness_leaves_place_and_padding_alone(kind: str) -> None:
    patch_size, in_plane = KINDS[kind]
    bright, plain = always(patch_size, in_plane), always(patch_size, in_plane, intensity=False)
    crop = torch.rand((2, *bright.crop_size), generator=torch.Generator().manual_seed(0)) + 0.5
    upper = np.array(((1,) * (3 - len(patch_size)) + tuple(bright.crop_size))[-len(patch_size) :]) - 4
    inside = box_mask(np.full(len(patch_size), 0), upper, bright.crop_size)
    crop = crop * inside
    changed = 0
    for seed in range(40):
        found = []
        for augmentation in (bright, plain):
            with random_stream(seed):
                found.append(augmentation(crop, inside))
        (patch, mask, matrix), (same_place, same_mask, same_matrix) = found
        assert np.array_equal(matrix, same_matrix)
        assert torch.equal(mask, same_mask)
        assert not patch[(mask == 0).expand_as(patch)].any()
        assert (mask == 0).any()
        changed += not torch.equal(patch, same_place)
    assert 5 < changed < 35


def test_box_mask() -> None:
    mask = box_mask(np.array([-3, 1, 2]), np.array([2, 9, 3]), (4, 5, 6))
    expected = np.zeros((1, 4, 5, 6), np.int16)
    expected[0, :2, 1:5, 2:3] = 1
    assert mask.dtype == torch.int16
    np.testing.assert_array_equal(mask.numpy(), expected)
    assert not box_mask(np.array([7, 0, 0]), np.array([9, 5, 6]), (4, 5, 6)).any()


@given(seed=st.integers(0, 2**31))
def test_composed_is_one_after_the_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    (outer, inner), point = rng.normal(size=(2, 3, 4)), rng.normal(size=3)
    within = inner[:, :3] @ point + inner[:, 3]
    both = composed(outer, inner)
    np.testing.assert_allclose(both[:, :3] @ point + both[:, 3], outer[:, :3] @ within + outer[:, 3], atol=1e-9)


# -- as loaded --------------------------------------------------------------------------------------------------------


def random_scan(rng: np.random.Generator, shape: Sequence[int]) -> tuple[sitk.Image, tuple[int, ...]]:
    """A header of any direction cosines, spacing and origin, and a transposition that gives the array shape `shape`."""
    transposition = tuple(int(axis) for axis in rng.permutation(3))
    array_shape = [0, 0, 0]
    for axis, size in zip(transposition, shape, strict=True):
        array_shape[axis] = int(size)
    image = sitk.Image(array_shape[::-1], sitk.sitkUInt8)
    image.SetSpacing(rng.uniform(0.3, 6, 3).tolist())
    image.SetOrigin(rng.uniform(-500, 500, 3).tolist())
    direction = Rotation.from_quat(rng.normal(size=4)).as_matrix() * rng.choice([-1, 1], (1, 3))
    image.SetDirection(direction.ravel().tolist())
    return image, transposition


def matrix_of(image: sitk.Image, transposition: tuple[int, ...], shape: Sequence[int]) -> np.ndarray:
    direction = np.asarray(image.GetDirection()).reshape(3, 3)
    geometry = ArrayGeometry(image.GetSpacing()[::-1], image.GetOrigin(), direction)
    return preprocessed_to_patient(geometry, transposition, (0, 0, 0), shape, shape)


def loaded(
    folder: Path, shape: Sequence[int], matrix: np.ndarray, augmentation: PatchAugmentation, count: int
) -> list[dict[str, Any]]:
    """Batches of a scan whose channels are the indices of its voxels, preprocessed as nnU-Net stores it."""
    size = {"chunks": (1, *shape), "blocks": (1, *shape)}
    data, target = positions(shape).numpy(), np.zeros((1, *shape), np.int16)
    for file in folder.iterdir():
        file.unlink()
    nnUNetDatasetBlosc2.save_case(data, target, {"class_locations": {}}, str(folder / "scan"), **size)
    dataset = nnUNetDatasetBlosc2(str(folder), ["scan"])
    loader = PatchPairLoader(dataset, 2, augmentation.patch_size, LABELS, augmentation, {"scan": matrix})
    loader.start_at(0, 0, 0, 1)
    return [next(loader) for _ in range(count)]


@every_kind
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.6, 2.5]))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_positions_of_augmented_patches_are_simpleitks(tmp_path: Path, kind: str, seed: int, scale: float) -> None:
    """Each voxel of a patch holds the index of its source voxel; SimpleITK says where that lies in the patient."""
    rng = np.random.default_rng(seed)
    patch_size, in_plane = KINDS[kind]
    shape = tuple(max(1, int(n * scale)) + int(rng.integers(3)) for n in ((1,) * (3 - len(patch_size)) + patch_size))
    image, transposition = random_scan(rng, shape)
    augmentation = always(patch_size, in_plane, intensity=False)
    compared = 0
    for batch in loaded(tmp_path, shape, matrix_of(image, transposition, shape), augmentation, 2):
        for patch, mask, affine in zip(batch["data"], batch["mask"], batch["affine"].numpy(), strict=True):
            assert mask.dtype == torch.bool
            assert not patch[:, ~mask[0]].any()
            inner = rimless(mask[0].numpy())
            voxels = voxels_of(inner)[::7]
            sources = patch[:3].numpy()[:, inner].T[::7].astype(float)
            for voxel, source in zip(voxels, sources, strict=True):
                index = np.zeros(3)
                index[list(transposition)] = source
                expected = image.TransformContinuousIndexToPhysicalPoint(index[::-1].tolist())
                # float32 voxels of the image are off by some millionths of a voxel, and grid_sample by more
                np.testing.assert_allclose(affine[:, :3] @ voxel + affine[:, 3], expected, atol=0.02)
                compared += 1
    assert compared > 0 or scale < 1
