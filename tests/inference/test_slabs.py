"""Slab by slab, logits become what nnU-Net's export makes of them as a whole."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

from diffseg_nnunet.inference.slabs import nearest_axes, resampled_slabs

DEFAULT = partial(resample_data_or_seg_to_shape, is_seg=False, order=1, order_z=0, force_separate_z=None)

Triple = tuple[float, float, float]


def slabs_of(logits: torch.Tensor, shape: Triple, own: Triple, scan: Triple, slices: int, resample: Any) -> list:
    configuration = SimpleNamespace(spacing=own, resampling_fn_probabilities=resample)
    properties = {"shape_after_cropping_and_before_resampling": shape, "spacing": [scan[i] for i in (2, 0, 1)]}
    plans = SimpleNamespace(transpose_forward=[1, 2, 0])  # the scan's axes are (x, z, y)
    size = 8 * len(logits) * shape[1] * shape[2] * slices
    return list(resampled_slabs(logits, properties, plans, configuration, size))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("there", "shape", "own", "scan", "nearest"),
    [
        ((20, 30, 25), (33, 41, 50), (3.0, 3.0, 3.0), (1.8, 2.2, 1.5), None),
        ((40, 30, 25), (20, 41, 13), (1.0, 1.0, 1.0), (2.0, 0.7, 1.9), None),
        ((10, 30, 25), (33, 41, 50), (6.0, 1.0, 1.0), (1.8, 0.7, 0.5), 0),
        ((20, 12, 25), (33, 41, 50), (1.0, 6.0, 1.0), (0.6, 1.8, 0.5), 1),
        ((20, 12, 9), (33, 24, 27), (1.0, 1.0, 6.0), (0.6, 0.5, 2.0), 2),
        ((20, 12, 12), (33, 41, 12), (1.0, 1.0, 6.0), (0.6, 0.3, 6.0), 2),
        ((20, 30, 25), (20, 30, 25), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), None),
    ],
)
def test_slabs_are_the_whole(
    there: tuple, shape: tuple, own: Triple, scan: Triple, nearest: int | None, dtype: torch.dtype
) -> None:
    """By nnU-Net's own function, which is linear, or along the axis of thick slices takes the nearest."""
    assert nearest_axes(DEFAULT, own, scan) == tuple(axis == nearest for axis in range(3))
    logits = (4 * torch.randn((5, *there), generator=torch.Generator().manual_seed(0))).to(dtype)
    expected = np.asarray(DEFAULT(logits.clone(), shape, own, scan))
    for slices in (1, 7, 100):
        found = slabs_of(logits, shape, own, scan, slices, DEFAULT)
        assert [part.start for part, _ in found] == list(range(0, shape[0], slices))
        whole = torch.cat([slab for _, slab in found], dim=1)
        assert whole.dtype == dtype
        digit = torch.finfo(dtype).eps
        np.testing.assert_allclose(whole.double().numpy(), expected.astype(float), rtol=digit, atol=digit)
        assert (whole.numpy() != expected).mean() < 0.01
        np.testing.assert_array_equal(whole.numpy().argmax(0), expected.argmax(0))


def test_what_is_resampled_otherwise_is_one_slab() -> None:
    logits = torch.randn((3, 4, 5, 6), generator=torch.Generator().manual_seed(0))
    shape, own, scan = (8, 5, 9), (2.0, 1.0, 1.5), (1.0, 1.0, 1.0)
    cubic = partial(DEFAULT, order=3)
    on_torch = partial(resample_torch_fornnunet, is_seg=False, force_separate_z=False)
    for resample in (cubic, on_torch):
        assert nearest_axes(resample, own, scan) is None
        ((part, slab),) = slabs_of(logits, shape, own, scan, 1, resample)
        assert part == slice(0, 8)
        np.testing.assert_array_equal(slab.numpy(), np.asarray(resample(logits, shape, own, scan)))
