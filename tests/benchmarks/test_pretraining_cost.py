"""Ratios are those of medians, and guidance is its two phases by their share."""

from __future__ import annotations

import pretraining_cost
import pytest


def test_ratio_of_medians_and_its_spread():
    middle, low, high = pretraining_cost.ratio([[2, 2, 9], [3, 3, 3]], [[1, 1, 1], [2, 2, 2]])
    assert (middle, low, high) == (2, 1.5, 2)


def test_guidance_is_weighted_by_its_phases():
    times = {pretraining_cost.REGRESSOR: [[1.0]], pretraining_cost.DENOISER: [[5.0]]}
    assert pretraining_cost.with_guidance(times, 0.25)["guidance"] == [[pytest.approx(4)]]
