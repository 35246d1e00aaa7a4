"""The label-free loss against explicit loops over pairs, and what it must not depend on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffseg_nnunet.coordinates.loss import displacement_error_mm, relative_position_loss
from diffseg_nnunet.coordinates.positions import UNIT_MM

seeds = st.integers(0, 2**31)


def example(seed: int, scans: int = 2, points: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted coordinates and true positions of two scans that lie anywhere in the scanner."""
    rng = np.random.default_rng(seed)
    positions = rng.uniform(-200, 200, (scans, points, 3)) + rng.uniform(-500, 500, (scans, 1, 3))
    return torch.from_numpy(rng.normal(0, 0.5, (scans, points, 3))), torch.from_numpy(positions)


def pairwise_loss(coordinates: np.ndarray, positions: np.ndarray, weight: np.ndarray) -> float:
    """The weighted mean over all pairs of one scan, and over the axes, of |(c_i - c_j) - (p_i - p_j) / 300 mm|."""
    total = weights = 0.0
    for scan, (i, j) in itertools.product(range(len(weight)), itertools.product(range(weight.shape[1]), repeat=2)):
        predicted = coordinates[scan, i] - coordinates[scan, j]
        true = (positions[scan, i] - positions[scan, j]) / 300
        pair = weight[scan, i] * weight[scan, j]
        total += pair * np.abs(predicted - true).mean()
        weights += pair
    return total / weights


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_loss_is_the_mean_over_pairs(seed: int) -> None:
    coordinates, positions = example(seed)
    expected = pairwise_loss(coordinates.numpy(), positions.numpy(), np.ones((2, 6)))
    assert relative_position_loss(coordinates, positions).item() == pytest.approx(expected, rel=1e-4)


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_weights_of_points(seed: int) -> None:
    coordinates, positions = example(seed)
    weight = torch.from_numpy(np.random.default_rng(seed).uniform(0, 1, (2, 6)))
    expected = pairwise_loss(coordinates.numpy(), positions.numpy(), weight.numpy())
    assert relative_position_loss(coordinates, positions, weight).item() == pytest.approx(expected, rel=1e-4)
    # only their ratio counts
    assert relative_position_loss(coordinates, positions, 7 * weight).item() == pytest.approx(expected, rel=1e-4)


def test_points_without_weight_have_no_say() -> None:
    coordinates, positions = example(0)
    weight = torch.ones(2, 6)
    weight[0, 1] = weight[1, 4] = 0
    expected = relative_position_loss(coordinates, positions, weight)
    coordinates[0, 1] = coordinates[1, 4] = 1e3
    assert relative_position_loss(coordinates, positions, weight).item() == expected.item()


def test_no_weight_at_all_gives_zero_and_a_gradient() -> None:
    coordinates, positions = example(0)
    coordinates.requires_grad_()
    loss = relative_position_loss(coordinates, positions, torch.zeros(2, 6))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(coordinates.grad).all()


@given(seed=seeds, offset=st.tuples(*[st.floats(-5, 5)] * 3))
@settings(max_examples=30, deadline=None)
def test_perfect_coordinates_up_to_an_offset_cost_nothing(seed: int, offset: tuple[float, float, float]) -> None:
    _, positions = example(seed)
    coordinates = positions / UNIT_MM + torch.tensor(offset)
    assert relative_position_loss(coordinates, positions).item() < 1e-5
    assert displacement_error_mm(coordinates, positions).max() < 1e-2


@given(seed=seeds, shift=st.tuples(*[st.floats(-2000, 2000)] * 3))
@settings(max_examples=30, deadline=None)
def test_the_origin_of_a_scan_does_not_matter(seed: int, shift: tuple[float, float, float]) -> None:
    coordinates, positions = example(seed)
    weight = torch.from_numpy(np.random.default_rng(seed).uniform(0.1, 1, (2, 6)))
    moved = positions.clone()
    moved[0] += torch.tensor(shift)
    before, after = (relative_position_loss(coordinates, p, weight).item() for p in (positions, moved))
    assert after == pytest.approx(before, rel=1e-3)


def test_a_mistaken_scale_or_side_costs() -> None:
    _, positions = example(0)
    right = positions / UNIT_MM
    for wrong in (2 * right, right * torch.tensor([-1.0, 1, 1]), torch.zeros_like(right)):
        assert relative_position_loss(wrong, positions).item() > 0.05


@given(seed=seeds, scans=st.sampled_from([1, 3]))
@settings(max_examples=20, deadline=None)
def test_displacement_error_is_the_median_over_pairs(seed: int, scans: int) -> None:
    coordinates, positions = example(seed, scans)  # 15 or 45 pairs: the median is one of them
    errors = [
        np.abs((c[i] - c[j]) * 300 - (p[i] - p[j]))
        for c, p in zip(coordinates.numpy(), positions.numpy(), strict=True)
        for i, j in itertools.combinations(range(6), 2)
    ]
    expected = np.median(errors, axis=0)
    np.testing.assert_allclose(displacement_error_mm(coordinates, positions).numpy(), expected, rtol=1e-4, atol=1e-3)
