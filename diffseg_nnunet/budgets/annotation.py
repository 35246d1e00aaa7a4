"""Which voxels of a case are annotated, for any crop of its preprocessed array.

What is annotated is said of the scan as it was acquired, so that configurations of other spacings (2d, 3d_fullres,
3d_lowres) learn from the same annotation. Axes are those of the preprocessed array, (0, 1, 2): nnU-Net's plan puts the
axis of the coarsest spacing first, and slices lie along it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from diffseg_nnunet.budgets.draws import digest

_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class ScanGrid:
    """How a preprocessed array lies in its scan; all (3,), in the axes of the preprocessed array.

    Attributes:
        scan: shape of the scan, in voxels.
        corner: the first voxel of the scan that was kept by the crop to nonzero intensities.
        crop: shape of what was kept.
        shape: of the preprocessed array, to which that was resampled.
    """

    scan: tuple[int, ...]
    corner: tuple[int, ...]
    crop: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, properties: Mapping[str, Any], shape: Sequence[int] | None = None) -> ScanGrid:
        """From what nnU-Net's preprocessing records of a case; `shape` None: before resampling."""
        crop = tuple(int(size) for size in properties["shape_after_cropping_and_before_resampling"])
        return cls(
            tuple(int(size) for size in properties["shape_before_cropping"]),
            tuple(int(start) for start, _ in properties["bbox_used_for_cropping"]),
            crop,
            crop if shape is None else tuple(int(size) for size in shape),
        )

    def nearest_in_scan(self, axis: int, index: np.ndarray) -> np.ndarray:
        """Index, along one axis of the scan, of the voxel in which the centre of a preprocessed voxel lies."""
        return self.corner[axis] + (2 * index + 1) * self.crop[axis] // (2 * self.shape[axis])

    def nearest_in_array(self, axis: int, index: np.ndarray) -> np.ndarray:
        """Index, along one axis of the preprocessed array, of the voxel in which a scan's voxel centre lies."""
        return (2 * (index - self.corner[axis]) + 1) * self.shape[axis] // (2 * self.crop[axis])


class Annotation(Protocol):
    """What is annotated in one case."""

    def mask(self, grid: ScanGrid, indices: Sequence[np.ndarray]) -> np.ndarray:
        """True where annotated: bool, broadcastable to the lengths of `indices`.

        Args:
            indices: of the preprocessed array, one integer vector for each of its three axes.
        """


@dataclass(frozen=True)
class SliceAnnotation:
    """Some slices are annotated in whole.

    Attributes:
        slices: their numbers along the first axis of the scan, before it is cropped.
    """

    slices: tuple[int, ...]

    def mask(self, grid: ScanGrid, indices: Sequence[np.ndarray]) -> np.ndarray:
        """A preprocessed slice is annotated if it lies in an annotated one, or is the nearest to one: where slices were
        thinned out by resampling, none is lost; where they were multiplied, all that stem from it count."""
        annotated = np.asarray(self.slices, dtype=np.int64)
        lies_in = np.isin(grid.nearest_in_scan(0, indices[0]), annotated)
        is_nearest = np.isin(indices[0], grid.nearest_in_array(0, annotated))
        return (lies_in | is_nearest)[:, None, None]


@dataclass(frozen=True)
class VoxelAnnotation:
    """Each voxel is annotated with the same probability, whatever its neighbours are.

    Real scribbles cluster, and so teach less than as many voxels drawn like this: it is the upper bound, and makes no
    assumption about how somebody draws. A preprocessed voxel is annotated if the voxel of the scan it lies in is.

    Attributes:
        share: the probability, in (0, 1]; a voxel annotated at one share is annotated at every larger one.
        key: decides, with the voxel's index, whether it is annotated; 64 bits.
    """

    share: float
    key: int

    @classmethod
    def of_case(cls, share: float, seed: int, case: str) -> VoxelAnnotation:
        return cls(share, int.from_bytes(digest(seed, case)[:8], "little"))

    def mask(self, grid: ScanGrid, indices: Sequence[np.ndarray]) -> np.ndarray:
        z, y, x = (grid.nearest_in_scan(axis, index).astype(np.uint64) for axis, index in enumerate(indices))
        rows, columns = (np.uint64(size) for size in grid.scan[1:])
        voxel = (z[:, None, None] * rows + y[:, None]) * columns + x
        return _random_bits(np.uint64(self.key), voxel) >> np.uint64(11) < np.uint64(self.share * 2**53)


def _random_bits(key: np.uint64, index: np.ndarray) -> np.ndarray:
    """64 random bits (uint64) for each `index` (uint64).

    The output at any position of the generator SplitMix64 (Steele et al., OOPSLA 2014): no state, so that a crop costs
    as much as it has voxels.
    """
    with np.errstate(over="ignore"):
        mixed = (index + np.uint64(1)) * _GOLDEN
        mixed += key
        mixed ^= mixed >> np.uint64(30)
        mixed *= _MIX_1
        mixed ^= mixed >> np.uint64(27)
        mixed *= _MIX_2
        mixed ^= mixed >> np.uint64(31)
    return mixed
