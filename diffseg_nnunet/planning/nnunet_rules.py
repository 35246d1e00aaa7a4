"""nnU-Net's planning rules, worked out again from a fingerprint, to say which of them led to what a plan holds.

Axes and spacings are in the order of the fingerprint, (z, y, x) of the files; transposition comes later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ANISOTROPY = 3.0
"""An axis this many times coarser than the others is treated apart."""
COARSE_AXIS_PERCENTILE = 10
LARGEST_SHARE_OF_DATA = 0.05
LEAST_BATCH = 2
LOWRES_SHARE = 0.25
LEAST_EDGE = 4
"""Voxels that an axis of a feature map keeps at least."""
MASKED_BELOW = 0.75
"""Of the median image: where cropping to the non-zero region leaves less, only that is normalised."""
MOST_FEATURES = {2: 512, 3: 320}


@dataclass(frozen=True)
class TargetSpacing:
    """The spacing nnU-Net resamples to, where none is asked for.

    Attributes:
        spacing: mm.
        median: median over the cases, mm.
        coarse_axis: the axis of the largest median spacing.
        lowered: its target is not the median, but the 10th percentile: the axis is more than 3 times as coarse as the
            others, and has less than a third of their voxels.
        limited: the 10th percentile is finer than the other axes, so their spacing is taken.
    """

    spacing: tuple[float, ...]
    median: tuple[float, ...]
    coarse_axis: int
    lowered: bool
    limited: bool


def target_spacing(fingerprint: Mapping[str, Any]) -> TargetSpacing:
    """What ``ExperimentPlanner.determine_fullres_target_spacing`` chooses."""
    spacings = np.vstack(fingerprint["spacings"]).astype(float)
    median, size = np.median(spacings, axis=0), np.median(np.vstack(fingerprint["shapes_after_crop"]), axis=0)
    coarse = int(median.argmax())
    others = [axis for axis in range(len(median)) if axis != coarse]
    coarsest_other = float(median[others].max())
    lowered = bool(
        median[coarse] > ANISOTROPY * coarsest_other and size[coarse] * ANISOTROPY < float(size[others].min())
    )
    target, limited = median.copy(), False
    if lowered:
        percentile = float(np.percentile(spacings[:, coarse], COARSE_AXIS_PERCENTILE))
        limited = percentile < coarsest_other
        target[coarse] = coarsest_other + 1e-5 if limited else percentile
    return TargetSpacing(tuple(target.tolist()), tuple(median.tolist()), coarse, lowered, limited)


def separate_axis(spacing: Sequence[float]) -> int | None:
    """The one axis that is more than 3 times as coarse as the finest; None where there is none, or two are as coarse.

    Along it, and only along it, images of this spacing are resampled by another interpolation.
    """
    values = np.asarray(spacing, dtype=float)
    if values.max() / values.min() <= ANISOTROPY:
        return None
    coarsest = np.flatnonzero(values == values.max())
    return int(coarsest[0]) if len(coarsest) == 1 else None


def resampled_apart(fingerprint: Mapping[str, Any], target: Sequence[float]) -> int:
    """The number of cases of which an axis is resampled apart: their own spacing or else the target asks for it."""
    by_target = separate_axis(target) is not None
    count = 0
    for spacing in np.vstack(fingerprint["spacings"]).astype(float):
        own = spacing.max() / spacing.min() > ANISOTROPY
        count += separate_axis(spacing) is not None if own else by_target
    return count


def batch_limit(patch: Sequence[int], voxels_of_dataset: float, share: float = LARGEST_SHARE_OF_DATA) -> int:
    """The patches whose voxels are a share of those of all cases, rounded: a batch is no larger, but for the least one.

    Args:
        patch: voxels along each axis.
        voxels_of_dataset: of all cases, after resampling; an average over cases may make it fractional.
        share: of these voxels.
    """
    return round(voxels_of_dataset * share / math.prod(patch))
