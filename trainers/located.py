"""nnU-Net's training batches, augmented by nnU-Net, with the place in the patient of some voxels of each patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffseg_nnunet.coordinates.head import gather_voxels
from diffseg_nnunet.training.draws import random_voxels

from .loaders import SeededLoader

# of interpolation in float32: its weights sum up to 1 within a few 1e-7, and it moves a voxel by 1e-5 or so
_WEIGHT_TOLERANCE, _VOXEL_TOLERANCE = 1e-5, 1e-3


class LocatedLoader(SeededLoader):
    """Carries the index of every voxel of a crop through nnU-Net's transforms, as what they call a regression target.

    They turn, scale and mirror it as the image. Between voxels it is interpolated linearly, which for an index is exact
    up to rounding. Images and labels are those of the plain loader, bit for bit.

    A batch holds beside nnU-Net's entries:
        ``voxels``: int64 (B, N, 3), voxels of each patch, uniform over what it shows of its scan (0 on the first axis
        in 2D);
        ``positions``: float64 (B, N, 3), where they lie in the patient, mm (LPS);
        ``inside``: bool (B, N), False where a patch shows nothing of its scan, and positions mean nothing;
        ``scan``: int64 (B,), patches with the same number come from the same scan.

    Args:
        matrices: case -> (3, 4) matrix from preprocessed voxel to mm.
        points: N.
        arguments, options: of :class:`SeededLoader`, with transforms.
    """

    def __init__(self, *arguments: Any, matrices: Mapping[str, np.ndarray], points: int, **options: Any):
        super().__init__(*arguments, **options)
        self._augment, self.transforms = self.transforms, self._transform
        self._matrices, self._count = matrices, points
        self._numbers = {case: number for number, case in enumerate(self.indices)}

    def get_bbox(self, data_shape: Sequence[int], *args: Any, **kwargs: Any) -> tuple[list[int], list[int]]:
        lower, upper = super().get_bbox(data_shape, *args, **kwargs)
        self._corner, self._scan_shape = np.asarray(lower), np.asarray(data_shape)
        return lower, upper

    def _transform(self, image: Tensor, segmentation: Tensor) -> dict[str, Any]:
        """nnU-Net's hook for a cropped sample."""
        field = index_field(image.shape[1:])
        sample = self._augment(image=image, segmentation=segmentation, regression_target=field)
        lowest, highest = -self._corner, self._scan_shape - 1 - self._corner
        # the group's last draw, so nothing else depends on it
        self._voxels, index, self._inside = located_voxels(
            sample.pop("regression_target"), lowest, highest, self._count, torch.default_generator
        )
        self._index = index.numpy() + self._corner
        return sample

    def generate_group(self) -> dict[str, Any]:
        group = super().generate_group()
        (key,) = group["keys"]
        matrix = self._matrices[key]
        positions = self._index @ matrix[:, :3].T + matrix[:, 3]
        return {
            **group,
            "voxels": self._voxels[None],
            "positions": torch.from_numpy(positions)[None],
            "inside": self._inside[None],
            "scan": torch.tensor([self._numbers[key]]),
        }


def index_field(shape: Sequence[int]) -> Tensor:
    """Of each voxel its index (three numbers, also in 2D) and 1: float32 (4, *shape).

    Where a transform reads beyond the crop, zeros are mixed in, and the last entry is no longer 1.
    """
    grid = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in shape), indexing="ij")
    flat = [torch.zeros(tuple(shape))] * (3 - len(shape))
    return torch.stack([*flat, *grid, torch.ones(tuple(shape))])


def located_voxels(
    field: Tensor, lowest: np.ndarray, highest: np.ndarray, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random voxels of a patch, and where they were in its crop.

    Args:
        field: what has become of the crop's :func:`index_field`, float32 (4, *patch).
        lowest, highest: index in the crop of the scan's first and last voxel, shape (3,); they may lie beyond it.
        count: voxels to draw.

    Returns:
        Voxels, int64 (count, 3), 0 on the first axis in 2D; their index in the crop, float64 (count, 3); and whether it
        is known and within the scan, bool (count,): of all, or of none in a patch that has no such voxel.
    """
    axes = field.ndim - 1
    low, high = (torch.from_numpy(bound).reshape(3, *(1,) * axes) for bound in (lowest, highest))
    index, whole = field[:3], field[3]
    within = (index >= low - _VOXEL_TOLERANCE) & (index <= high + _VOXEL_TOLERANCE)
    known = (within.all(0) & (whole >= 1 - _WEIGHT_TOLERANCE))[None, None]
    voxels = random_voxels(known, count, generator)
    own = voxels[..., -axes:]
    return voxels[0], gather_voxels(index[None], own)[0].double(), gather_voxels(known, own)[0, :, 0]
