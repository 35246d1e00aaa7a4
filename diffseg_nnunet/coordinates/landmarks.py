"""Where labelled structures lie in body coordinates: what gives the numbers of a range a meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Landmark:
    """The centre of a structure in body coordinates, mean over scans, in mm.

    Attributes:
        scans: that show the structure whole.
        left_mm, posterior_mm, superior_mm: its centre.
        deviation_mm: standard deviation over scans of the superior coordinate; None for a single scan.
    """

    scans: int
    left_mm: float
    posterior_mm: float
    superior_mm: float
    deviation_mm: float | None


def structure_centres(
    coordinates_mm: NDArray[np.float32], segmentation: NDArray, labels: Mapping[str, Sequence[int]]
) -> dict[str, NDArray[np.float64]]:
    """Structure -> mean coordinates (3,) over its voxels; of those alone that end before the scan does.

    Args:
        coordinates_mm: (3, *shape).
        segmentation: label values, of `shape`.
        labels: structure -> the values it consists of.
    """
    centres = {}
    for name, values in labels.items():
        mask = np.isin(segmentation, values)
        if mask.any() and not _is_cut(mask):
            centres[name] = coordinates_mm[:, mask].mean(axis=1, dtype=np.float64)
    return centres


def mean_landmarks(scans: Sequence[Mapping[str, NDArray[np.float64]]]) -> dict[str, Landmark]:
    """Landmarks of the structures that at least one of the scans shows whole."""
    landmarks = {}
    for name in dict.fromkeys(name for centres in scans for name in centres):
        found = np.stack([centres[name] for centres in scans if name in centres])
        left, posterior, superior = found.mean(axis=0).tolist()
        deviation = float(found[:, 2].std(ddof=1)) if len(found) > 1 else None
        landmarks[name] = Landmark(len(found), left, posterior, superior, deviation)
    return landmarks


def _is_cut(mask: NDArray[np.bool_]) -> bool:
    """Whether it touches a face of the array: the rest may lie beyond."""
    return any(mask.take(end, axis=axis).any() for axis in range(mask.ndim) for end in (0, -1))
