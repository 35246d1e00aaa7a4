"""The part of the body a scan shows: its voxels, the range of their coordinates, and how far to trust these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

from diffseg_nnunet.errors import BadInputError

DIRECTIONS = ("left", "posterior", "superior")
"""The components of a coordinate: each grows towards this side of the patient."""
PERCENTILES = (1.0, 99.0)
BODY_HU = -500.0
_MOST_VOXELS = 1_000_000  # far more than percentiles and a straight line need

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class AxisRange:
    """Coordinates of a body along one direction of the patient, in mm of the gauge that all scans of a model share.

    Attributes:
        low_mm, median_mm, high_mm: the 1st, 50th and 99th percentile over the body's voxels.
        extent_mm: high - low.
        slope: of predicted coordinate against true position along the direction, least squares; 1: the scale is right.
            None where the body has no extent along it.
        residual_mm: standard deviation of the predicted coordinate from that line.
    """

    low_mm: float
    median_mm: float
    high_mm: float
    extent_mm: float
    slope: float | None
    residual_mm: float


def body_mask(image: NDArray, ct: bool, index_to_patient: NDArray[np.float64]) -> Mask:
    """The voxels of the body: the largest connected component of what is no air, its holes filled.

    Holes are filled slice by slice across the body, so that lungs count even where the scan ends in them. What touches
    the body, a couch for example, counts as body.

    Args:
        image: (z, y, x) of any brightness.
        ct: brightness is in HU, and air lies below -500; else Otsu's threshold is used.
        index_to_patient: (3, 4) from (z, y, x) to mm (LPS).

    Raises:
        BadInputError: no voxel is brighter than air.
    """
    threshold = BODY_HU if ct else float(threshold_otsu(image))
    components, count = ndimage.label(image > threshold)
    if not count:
        unit = " HU" if ct else ""
        raise BadInputError(
            f"No voxel is brighter than {threshold:g}{unit}: the scan shows no body.",
            "Leave it out, or mend its brightness.",
        )
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    body = components == sizes.argmax()
    for one in np.moveaxis(body, _axis_along_body(index_to_patient), 0):  # views: filled in place
        one |= _enclosed(one)
    return body


def body_ranges(
    coordinates_mm: NDArray[np.float32], index_to_patient: NDArray[np.float64], body: Mask
) -> dict[str, AxisRange]:
    """Direction -> range of the coordinates over the body's voxels (of huge bodies, over a million drawn of them).

    Args:
        coordinates_mm: (z, y, x, 3).
        index_to_patient: (3, 4) from (z, y, x) to mm (LPS).
        body: (z, y, x), at least one voxel.
    """
    voxels = np.flatnonzero(body)
    if len(voxels) > _MOST_VOXELS:
        voxels = np.random.default_rng(0).choice(voxels, _MOST_VOXELS)
    index = np.stack(np.unravel_index(voxels, body.shape))
    positions = index_to_patient[:, :3] @ index  # only differences count, so without the origin
    predicted = coordinates_mm.reshape(-1, 3)[voxels].astype(np.float64)
    return {name: _axis_range(predicted[:, k], positions[k]) for k, name in enumerate(DIRECTIONS)}


def covered(superior: AxisRange, landmarks_mm: Mapping[str, float]) -> list[str]:
    """The structures whose superior coordinate lies in the range, from the head downwards.

    Args:
        landmarks_mm: structure -> superior coordinate of its centre.
    """
    inside = [name for name, mm in landmarks_mm.items() if superior.low_mm <= mm <= superior.high_mm]
    return sorted(inside, key=lambda name: (-landmarks_mm[name], name))


def _axis_range(predicted: NDArray[np.float64], positions: NDArray[np.float64]) -> AxisRange:
    low, median, high = np.percentile(predicted, [PERCENTILES[0], 50, PERCENTILES[1]])
    x, y = positions - positions.mean(), predicted - predicted.mean()
    spread = float(x @ x)
    slope = float(x @ y) / spread if np.ptp(positions) > 0 else None
    residual = float(np.std(y - (slope or 0.0) * x))
    return AxisRange(float(low), float(median), float(high), float(high - low), slope, residual)


def _axis_along_body(index_to_patient: NDArray[np.float64]) -> int:
    """The array's axis that runs most nearly from the feet to the head."""
    axes = index_to_patient[:, :3]
    return int(np.abs(axes[2] / np.linalg.norm(axes, axis=0)).argmax())


def _enclosed(mask: Mask) -> Mask:
    """The parts of a 2D background that do not reach the border."""
    background, count = ndimage.label(~mask)
    outside = np.zeros(count + 1, bool)
    outside[0] = True  # the mask itself
    for border in (background[0], background[-1], background[:, 0], background[:, -1]):
        outside[border] = True
    return ~outside[background]
