"""Logits at the image's size, some slices at a time: all classes of a large scan at once take tens of gigabytes.

What nnU-Net's export computes in whole (``resample_data_or_seg_to_shape`` of order 1), in the same precision: another
label is possible only where two classes are as likely, to the last digit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from nnunetv2.preprocessing.resampling.default_resampling import (
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from torch import Tensor
from torch.nn import functional

SLAB_BYTES = 2**27
"""Of one slab's logits in double precision; on the way it is held some four times."""


def resampled_slabs(
    logits: Tensor, properties: Mapping[str, Any], plans: Any, configuration: Any, slab_bytes: int = SLAB_BYTES
) -> Iterator[tuple[slice, Tensor]]:
    """The logits of the cropped image before it was resampled, slab by slab along the first axis.

    Args:
        logits: (classes, z, y, x) of the preprocessed image.
        properties: of the case, as nnU-Net's preprocessing records them.
        plans, configuration: nnU-Net's managers. Where they resample probabilities otherwise than by default, it is
            done as they say, in one slab.
        slab_bytes: of a slab's logits in float64, at most, but for a single slice.

    Yields:
        Which slices, and their logits, (classes, slices, y, x), in the format of `logits`.
    """
    shape = tuple(int(size) for size in properties["shape_after_cropping_and_before_resampling"])
    if shape == tuple(logits.shape[1:]):
        nearest: Sequence[bool] | None = (False, False, False)
    else:
        scan = [properties["spacing"][axis] for axis in plans.transpose_forward]
        own = list(configuration.spacing)
        planned = own if len(own) == len(shape) else [scan[0], *own]
        resample = configuration.resampling_fn_probabilities
        nearest = nearest_axes(resample, planned, scan)
        if nearest is None:
            whole = resample(logits, shape, planned, scan)
            yield slice(0, shape[0]), torch.from_numpy(whole) if isinstance(whole, np.ndarray) else whole
            return
    count = max(1, slab_bytes // (8 * logits.shape[0] * shape[1] * shape[2]))
    for start in range(0, shape[0], count):
        slices = slice(start, min(start + count, shape[0]))
        yield slices, _slab(logits, shape, slices, nearest)


def nearest_axes(resample: partial, current: Sequence[float], new: Sequence[float]) -> tuple[bool, ...] | None:
    """Along which of the three axes nnU-Net's resampling takes the nearest value; along the others it is linear.

    Args:
        resample: nnU-Net's function of a configuration, with its settings.
        current, new: spacings, mm.

    Returns:
        None where it is another function, or of another order.
    """
    settings = {"order": 3, "order_z": 0, "is_seg": False, "force_separate_z": False} | resample.keywords
    usual = {"order": 1, "order_z": 0, "is_seg": False}
    if resample.func is not resample_data_or_seg_to_shape or any(settings[key] != usual[key] for key in usual):
        return None
    threshold = {key: settings[key] for key in ("separate_z_anisotropy_threshold",) if key in settings}
    separate, axis = determine_do_sep_z_and_axis(settings["force_separate_z"], current, new, **threshold)
    return tuple(separate and index == axis for index in range(3))


def _slab(logits: Tensor, shape: Sequence[int], slices: slice, nearest: Sequence[bool]) -> Tensor:
    if tuple(logits.shape[1:]) == tuple(shape):
        return logits[:, slices]
    positions = torch.arange(slices.start, slices.stop, dtype=torch.float64)
    slab = _along(logits, 1, shape[0], nearest[0], positions)
    for axis, of_nearest in ((1, nearest[1]), (2, nearest[2])):
        if of_nearest:
            everywhere = torch.arange(shape[axis], dtype=torch.float64)
            slab = _along(slab, axis + 1, shape[axis], True, everywhere)
    # linear along what is left: an axis whose size is reached already stays as it is
    found = functional.interpolate(slab, tuple(shape[1:]), mode="bilinear", align_corners=False)
    if logits.dtype == torch.float16:  # torch would round twice, by way of float32
        return torch.from_numpy(found.numpy().astype(np.float16))
    return found.to(logits.dtype)


def _along(values: Tensor, axis: int, size: int, nearest: bool, positions: Tensor) -> Tensor:
    """Values at `positions` of one axis that is resampled to `size`, float64; voxels are boxes of equal width, and
    beyond the centre of the outermost one its value holds."""
    there = values.shape[axis]
    if there == size:
        return values.index_select(axis, positions.long()).double()
    at = ((positions + 0.5) * (there / size) - 0.5).clamp(0, there - 1)
    if nearest:
        return values.index_select(axis, (at + 0.5).floor().long()).double()
    lower = at.floor().long()
    weight = (at - lower).view([-1 if index == axis else 1 for index in range(values.ndim)])
    first, second = (values.index_select(axis, index.clamp_max(there - 1)).double() for index in (lower, lower + 1))
    return first + weight * (second - first)
