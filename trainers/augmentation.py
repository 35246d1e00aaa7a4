"""Augmentation of pretraining patches: turned, scaled, brighter or darker, and still true to place and to denoising.

Where a voxel lies in the patient is followed through the spatial transform. Intensities change before noise is added,
so the target changes with them; noise, blur and coarser sampling are left out: a denoiser could not tell them from its
own noise, or would learn to produce them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from torch import Tensor

# [default] values of ours. Probabilities as in nnU-Net; turns are smaller, since bodies lie straight
ROTATION_RAD = math.radians(15)
SCALING = (0.8, 1.25)
_P_SPATIAL, _P_INTENSITY = 0.2, 0.15


class PatchAugmentation:
    """Augments one crop and says where each voxel of the patch was in it.

    Args:
        patch_size: of the patches, 2 or 3 axes; where the first of 3 is much coarser, or much shorter, turns and
            scaling stay in the other two, as in nnU-Net.
        in_plane: stay in the last two axes of 3D patches.
        spatial, intensity: which of the two kinds to apply.
    """

    def __init__(self, patch_size: Sequence[int], in_plane: bool, spatial: bool = True, intensity: bool = True):
        self.patch_size = tuple(patch_size)
        self.crop_size = tuple(_crop_size(self.patch_size, in_plane)) if spatial else self.patch_size
        first_axis_alone = in_plane and len(self.patch_size) == 3

        def angle(image: Tensor, dim: int) -> float:
            return 0.0 if first_axis_alone and dim != 0 else np.random.uniform(-ROTATION_RAD, ROTATION_RAD)

        def scale(image: Tensor, dim: int) -> float:
            return 1.0 if first_axis_alone and dim == 0 else np.random.uniform(*SCALING)

        self._spatial = SpatialTransform(
            self.patch_size,
            patch_center_dist_from_border=0,
            random_crop=False,
            p_rotation=_P_SPATIAL if spatial else 0.0,
            rotation=angle,
            p_scaling=_P_SPATIAL if spatial else 0.0,
            scaling=scale,
            mode_seg="nearest",
        )
        self._intensity = _intensity_transforms() if intensity else None

    def __call__(self, crop: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, np.ndarray]:
        """Augment one crop in the current random stream.

        Args:
            crop: float32 (C, *crop_size).
            mask: int16 (1, *crop_size), 1 inside the scan.

        Returns:
            The patch, its mask, and the (3, 4) matrix from a voxel of the patch to one of the crop (three numbers,
            also in 2D).
        """
        shape = crop.shape[1:]
        parameters = self._spatial.get_parameters(image=crop)
        out = self._spatial.apply({"image": crop, "segmentation": mask}, **parameters)
        patch, mask = out["image"], out["segmentation"]
        if self._intensity is not None:
            patch = self._intensity(image=patch)["image"]
        return patch * (mask > 0), mask, self._to_crop(parameters, shape)

    def _to_crop(self, parameters: dict[str, Any], shape: Sequence[int]) -> np.ndarray:
        size, source = np.asarray(self.patch_size, float), np.asarray(shape, float)
        if parameters["affine"] is None:  # a plain crop about the middle voxel
            linear, offset = np.eye(len(size)), np.floor(source / 2) - size // 2
        else:
            linear = np.asarray(parameters["affine"])
            offset = (source - 1) / 2 - linear @ ((size - 1) / 2)
        matrix = np.eye(3, 4)
        matrix[-len(size) :, -len(size) - 1 : -1] = linear
        matrix[-len(size) :, 3] = offset
        return matrix


def _crop_size(patch_size: tuple[int, ...], in_plane: bool) -> Sequence[int]:
    """What is cropped so that next to nothing of a turned or scaled patch is missing, by nnU-Net's rule.

    It turns about one axis at a time: what several turns at once bring in from beyond is masked, as padding is.
    """
    turns = [ROTATION_RAD, *([0.0, 0.0] if in_plane and len(patch_size) == 3 else [ROTATION_RAD] * 2)]
    # get_patch_size divides by the smallest scale; scale factors of the grid enlarge by the largest
    size = [int(n) for n in get_patch_size(patch_size, *turns, (1 / SCALING[1],))]
    if in_plane and len(patch_size) == 3:
        size[0] = patch_size[0]
    return size


def _intensity_transforms() -> BasicTransform:
    factor = BGContrast((0.75, 1.25))
    transforms = (
        MultiplicativeBrightnessTransform(factor, synchronize_channels=False, p_per_channel=1),
        ContrastTransform(factor, preserve_range=True, synchronize_channels=False, p_per_channel=1),
        GammaTransform(
            gamma=BGContrast((0.7, 1.5)),
            p_invert_image=0,
            synchronize_channels=False,
            p_per_channel=1,
            p_retain_stats=1,
        ),
    )
    return ComposeTransforms([RandomTransform(transform, _P_INTENSITY) for transform in transforms])


def box_mask(lower: np.ndarray, upper: np.ndarray, shape: Sequence[int]) -> Tensor:
    """int16 (1, *shape), 1 at voxels with lower <= index < upper on every axis."""
    mask = torch.zeros((1, *(int(n) for n in shape)), dtype=torch.int16)
    low, high = (np.clip(bound, 0, shape) for bound in (lower, upper))
    mask[(0, *(slice(int(a), int(b)) for a, b in zip(low, high, strict=True)))] = 1
    return mask


def composed(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The (3, 4) matrix of `outer` after `inner`."""
    linear = outer[:, :3] @ inner[:, :3]
    return np.column_stack([linear, outer[:, :3] @ inner[:, 3] + outer[:, 3]])
