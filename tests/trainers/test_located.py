"""Positions that went through nnU-Net's own augmentation, against SimpleITK's points and the closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform, create_affine_matrix_3d
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy.spatial.transform import Rotation

from diffseg_nnunet.coordinates.positions import case_to_patient
from diffseg_nnunet.trainers import DiffSegTrainer
from diffseg_nnunet.trainers.loaders import SeededLoader
from diffseg_nnunet.trainers.located import LocatedLoader, index_field, located_voxels

LABELS = LabelManager({"background": 0, "organ": 1}, regions_class_order=None)
# patch, crop, whether nnU-Net turns slices alone
KINDS = {
    "3d": ((10, 12, 14), (15, 17, 18), False),
    "slices": ((4, 16, 14), (4, 22, 21), True),
    "2d": ((16, 14), (22, 21), False),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class PlacedScans:
    """nnU-Net's interface to one preprocessed scan, whose three channels are SimpleITK's points of its voxels, mm."""

    identifiers = ("scan",)

    def __init__(self, shape: Sequence[int] = (20, 26, 24)):
        header = sitk.Image([int(size) for size in reversed(shape)], sitk.sitkUInt8)
        header.SetSpacing([1.5, 2.0, 3.0])
        header.SetOrigin([-120.0, 80.0, 300.0])
        header.SetDirection(Rotation.from_euler("xyz", [0.2, -0.1, 0.4]).as_matrix().ravel().tolist())
        points = [header.TransformIndexToPhysicalPoint(index[::-1]) for index in np.ndindex(*shape)]
        self.points = np.asarray(points, np.float32).T.reshape(3, *shape)
        self.properties = {
            "sitk_stuff": {"origin": header.GetOrigin(), "direction": header.GetDirection()},
            "spacing": header.GetSpacing()[::-1],
            "bbox_used_for_cropping": [[0, size] for size in shape],
            "shape_after_cropping_and_before_resampling": shape,
            "class_locations": {1: []},
        }
        self.matrix = case_to_patient(self.properties, (0, 1, 2), shape)

    def load_case(self, _: str) -> tuple[Any, Any, None, dict]:
        return self.points, np.zeros((1, *self.points.shape[1:]), np.int16), None, self.properties


def spatial_part(kind: str, mirror: tuple[int, ...], turned: bool = True) -> BasicTransform:
    """nnU-Net's training transforms without those of intensities alone; turned and scaled always, or never."""
    patch, _, slices = KINDS[kind]
    composed = nnUNetTrainer.get_training_transforms(patch, (-0.4, 0.4), None, mirror, slices)
    composed.transforms = [each for each in composed.transforms if not isinstance(each, RandomTransform)]
    for each in composed.transforms:
        if isinstance(each, SpatialTransform):
            each.p_rotation = each.p_scaling = float(turned)
    return composed


def located(kind: str, transforms: BasicTransform, scans: PlacedScans, points: int = 64, batch: int = 6) -> Any:
    patch, crop, _ = KINDS[kind]
    loader = LocatedLoader(
        scans, batch, crop, patch, LABELS, transforms=transforms, matrices={"scan": scans.matrix}, points=points
    )
    return next(loader.start_at(3, 0, 0, 1))


@every_kind
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_voxel_lies_where_its_patch_shows_it(kind: str, turned: bool, mirrored: bool) -> None:
    """The image says where each voxel lies, by SimpleITK, and is augmented by nnU-Net."""
    scans, axes = PlacedScans(), tuple(range(len(KINDS[kind][0])))
    batch = located(kind, spatial_part(kind, axes if mirrored else (), turned), scans)
    assert batch["inside"].all()
    assert batch["scan"].tolist() == [0] * 6
    assert batch["voxels"].dtype == torch.int64
    flipped = set()
    for patch, voxels, positions in zip(batch["data"], batch["voxels"], batch["positions"], strict=True):
        shown = patch[(slice(None), *voxels[:, 3 - len(axes) :].T)].T
        np.testing.assert_allclose(positions, shown, atol=5e-3)
        assert len(positions.unique(dim=0)) > 30
        if len(axes) == 2:
            assert not voxels[:, 0].any()
        own = np.column_stack([voxels.numpy()[:, 3 - len(axes) :], np.ones(len(voxels))])
        steps = np.linalg.lstsq(own, positions.numpy(), rcond=None)[0][
            :-1
        ]  # mm per voxel of the patch, along each axis
        flipped.add(tuple(np.sign((steps * scans.matrix[:, 3 - len(axes) : 3].T).sum(axis=1))))
    assert (len(flipped) > 1) == mirrored


@pytest.mark.parametrize("mirror", [(), (1,), (0, 2)])
def test_turned_and_mirrored_by_the_closed_form(mirror: tuple[int, ...]) -> None:
    """index = A (v − middle of the patch) + middle of the crop, with v counted from the other end where mirrored."""
    angle, scale, patch, crop = 0.3, 0.9, np.array([9, 12, 10]), np.array([16, 19, 18])
    turn = SpatialTransform(
        patch,
        0,
        False,
        p_rotation=1,
        rotation=lambda image, dim: angle * (dim + 1),
        p_scaling=1,
        scaling=(scale, scale),
        p_synchronize_scaling_across_axes=1,
    )
    mirrored = MirrorTransform(mirror)
    mirrored.get_parameters = lambda **_: {"axes": list(mirror)}
    field = ComposeTransforms([turn, mirrored])(image=torch.zeros(1, *crop), regression_target=index_field(crop))
    generator = torch.Generator().manual_seed(0)
    voxels, index, known = located_voxels(field["regression_target"], np.zeros(3), crop - 1, 200, generator)
    counted = np.where(np.isin(range(3), mirror), patch - 1 - voxels.numpy(), voxels.numpy())
    matrix = create_affine_matrix_3d([angle * (axis + 1) for axis in range(3)], [scale] * 3)
    expected = (counted - (patch - 1) / 2) @ matrix.T + (crop - 1) / 2
    assert known.all()
    np.testing.assert_allclose(index, expected, atol=1e-4)


def test_what_lies_beyond_scan_and_crop_is_not_asked_for() -> None:
    """A crop larger than the scan, and turns that reach out of the crop: positions stay those of the scan's voxels."""
    scans = PlacedScans((5, 26, 8))
    batch = located("3d", spatial_part("3d", (0, 1, 2)), scans, points=300)
    assert batch["inside"].all()
    matrix = np.vstack([scans.matrix, [0, 0, 0, 1]])
    index = (np.linalg.inv(matrix) @ np.pad(batch["positions"].reshape(-1, 3), ((0, 0), (0, 1)), constant_values=1).T)[
        :3
    ]
    assert (index.min(1) > -0.01).all()
    assert (index.max(1) < np.array([4, 25, 7]) + 0.01).all()


def test_a_patch_of_nothing_has_no_points() -> None:
    field = index_field((4, 5, 6))
    voxels, _, known = located_voxels(field, np.full(3, 10), np.full(3, 12), 7, torch.Generator().manual_seed(0))
    assert voxels.shape == (7, 3)
    assert not known.any()


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_images_and_labels_are_the_plain_loaders(new_trainer: Callable[..., Any], configuration: str) -> None:
    batches = []
    for weight in (0.0, 0.5):
        trainer = new_trainer(DiffSegTrainer, configuration, keep_coordinates=weight)
        trainer.initialize()
        loader, validation = trainer.build_loaders()
        assert type(validation) is SeededLoader
        assert type(loader) is (LocatedLoader if weight else SeededLoader)
        loader.start_at(5, 0, 0, 1)
        batches.append([next(loader) for _ in range(4)])
    for plain, with_places in zip(*batches, strict=True):
        assert plain.keys() < with_places.keys()
        assert torch.equal(plain["data"], with_places["data"])
        assert all(torch.equal(*each) for each in zip(plain["target"], with_places["target"], strict=True))
        assert list(plain["keys"]) == list(with_places["keys"])
        same_scan = with_places["scan"][:, None] == with_places["scan"]
        assert (same_scan.numpy() == (plain["keys"][:, None] == plain["keys"])).all()
