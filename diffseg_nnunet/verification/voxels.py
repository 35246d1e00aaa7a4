"""What a volume's voxels are like: digest, distribution, distinct values; plane by plane, so that no copy is made."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (0.5, 50.0, 99.5)
_HISTOGRAM_VALUES = 1 << 16
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Distribution:
    """Of all voxels; the percentiles are those of `PERCENTILES`, by nearest rank (a value that occurs)."""

    minimum: float
    maximum: float
    mean: float
    percentiles: tuple[float, float, float]
    whole_numbers: bool


def digest(voxels: NDArray) -> str:
    """BLAKE2b (128 bit, hexadecimal) of shape and values, the same in whatever format and type they are stored.

    Values count as float32: that is what nnU-Net reads, and it holds every number of up to 24 bits.
    """
    hasher = hashlib.blake2b(repr(voxels.shape).encode(), digest_size=_DIGEST_BYTES)
    with np.errstate(over="ignore"):  # what is beyond float32 is infinite to nnU-Net, too
        for plane in voxels:
            hasher.update(plane.astype("<f4", order="C") + np.float32(0))  # -0 becomes 0
    return hasher.hexdigest()


def distribution(voxels: NDArray) -> Distribution:
    """Of finite, non-empty `voxels`; floats are copied once, for their percentiles."""
    mean = sum(float(plane.sum(dtype=np.float64)) for plane in voxels) / voxels.size
    ranks = [max(math.ceil(percentile / 100 * voxels.size) - 1, 0) for percentile in PERCENTILES]
    if (histogram := _histogram(voxels)) is not None:
        low, counts = histogram
        percentiles = low + np.searchsorted(np.cumsum(counts), ranks, side="right")
        minimum, maximum = low, low + len(counts) - 1
    else:
        ordered = np.partition(voxels, ranks, axis=None)
        percentiles = ordered[ranks]
        minimum, maximum = voxels.min(), voxels.max()
    whole = voxels.dtype.kind in "iu" or all(np.array_equal(plane, np.rint(plane)) for plane in voxels)
    return Distribution(float(minimum), float(maximum), mean, tuple(float(value) for value in percentiles), whole)


def value_counts(voxels: NDArray) -> dict[float, int]:
    """Distinct value, ascending -> number of voxels; whole numbers as int, NaN as one value."""
    if (histogram := _histogram(voxels)) is not None:
        low, counts = histogram
        return {low + int(index): int(counts[index]) for index in np.flatnonzero(counts)}
    values, counts = np.unique(voxels, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _histogram(voxels: NDArray) -> tuple[int, NDArray[np.int64]] | None:
    """Lowest value, and how often each value from there to the highest occurs; None for floats and wide ranges."""
    if voxels.dtype.kind not in "iu" or voxels.size == 0:
        return None
    low, high = int(voxels.min()), int(voxels.max())
    if high - low >= _HISTOGRAM_VALUES:
        return None
    counts = np.zeros(high - low + 1, np.int64)
    for plane in voxels:
        counts += np.bincount(plane.ravel().astype(np.int64) - low, minlength=len(counts))
    return low, counts
