"""The label-free losses against explicit loops over pairs, and what they must not depend on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from diffseg_nnunet.coordinates.loss import (
    consistency_loss,
    displacement_error_mm,
    distance_loss,
    relative_position_loss,
)
from diffseg_nnunet.coordinates.positions import UNIT_MM

Loss = Callable[..., Any]
seeds = st.integers(0, 2**31)


def example(seed: int, scans: int = 2, points: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted coordinates and true positions of two scans that lie anywhere in the scanner."""
    rng = np.random.default_rng(seed)
    positions = rng.uniform(-200, 200, (scans, points, 3)) + rng.uniform(-500, 500, (scans, 1, 3))
    return torch.from_numpy(rng.normal(0, 0.5, (scans, points, 3))), torch.from_numpy(positions)


def mean_over_pairs(error: Callable[[int, int, int], float], weight: np.ndarray) -> list[float]:
    """For each scan the mean over all pairs (i, j), i = j too, of the pair's error times both points' weights."""
    points = range(weight.shape[1])
    return [
        float(np.mean([w[i] * w[j] * error(scan, i, j) for i in points for j in points]))
        for scan, w in enumerate(weight)
    ]


def relative_position_truth(coordinates: np.ndarray, positions: np.ndarray, weight: np.ndarray) -> list[float]:
    def error(scan: int, i: int, j: int) -> float:
        predicted = coordinates[scan, i] - coordinates[scan, j]
        return np.abs(predicted - (positions[scan, i] - positions[scan, j]) / 300).mean()

    return mean_over_pairs(error, weight)


def distance_truth(coordinates: np.ndarray, positions: np.ndarray, weight: np.ndarray) -> list[float]:
    def error(scan: int, i: int, j: int) -> float:
        predicted = np.linalg.norm(coordinates[scan, i] - coordinates[scan, j])
        return (predicted - np.linalg.norm(positions[scan, i] - positions[scan, j]) / 300) ** 2

    return mean_over_pairs(error, weight)


LOSSES = [(relative_position_loss, relative_position_truth), (distance_loss, distance_truth)]
both_losses = pytest.mark.parametrize(("loss", "truth"), LOSSES)


@both_losses
@given(seed=seeds, scans=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_loss_of_each_scan_is_the_mean_over_its_pairs(loss: Loss, truth: Loss, seed: int, scans: int) -> None:
    coordinates, positions = example(seed, scans)
    weight = torch.from_numpy(np.random.default_rng(seed).uniform(0, 1, (scans, 6)))
    expected = truth(coordinates.numpy(), positions.numpy(), weight.numpy())
    found = loss(coordinates, positions, weight)
    assert found.shape == (scans,)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
    unweighted = truth(coordinates.numpy(), positions.numpy(), np.ones((scans, 6)))
    np.testing.assert_allclose(loss(coordinates, positions).numpy(), unweighted, rtol=1e-4)


@both_losses
def test_a_scan_of_which_little_can_be_told_counts_little(loss: Loss, truth: Loss) -> None:
    """Weights are not made up for: else a scan of pure noise would count as much as a clear one."""
    coordinates, positions = example(0)
    weight = torch.ones(2, 6)
    weight[1] = 0.1
    whole, faint = loss(coordinates, positions), loss(coordinates, positions, weight)
    torch.testing.assert_close(faint, whole * torch.tensor([1.0, 0.01]))


@both_losses
def test_points_without_weight_have_no_say(loss: Loss, truth: Loss) -> None:
    coordinates, positions = example(0)
    weight = torch.ones(2, 6)
    weight[0, 1] = weight[1, 4] = 0
    expected = loss(coordinates, positions, weight)
    coordinates[0, 1] = coordinates[1, 4] = 1e3
    assert torch.equal(loss(coordinates, positions, weight), expected)


@both_losses
def test_no_weight_at_all_gives_zero_and_a_gradient(loss: Loss, truth: Loss) -> None:
    coordinates, positions = example(0)
    coordinates.requires_grad_()
    found = loss(coordinates, positions, torch.zeros(2, 6))
    found.sum().backward()
    assert found.tolist() == [0, 0]
    assert torch.isfinite(coordinates.grad).all()


@both_losses
def test_scans_do_not_mix(loss: Loss, truth: Loss) -> None:
    coordinates, positions = example(3, scans=4)
    apart = torch.cat([loss(coordinates[k : k + 1], positions[k : k + 1]) for k in range(4)])
    torch.testing.assert_close(loss(coordinates, positions), apart)


def test_the_gradient_where_two_points_coincide_is_finite() -> None:
    """A head starts with nearly equal coordinates everywhere; the norm of 0 has no slope."""
    _, positions = example(0)
    coordinates = torch.zeros(2, 6, 3, requires_grad=True)
    distance_loss(coordinates, positions).sum().backward()
    assert torch.isfinite(coordinates.grad).all()


@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_distances_do_not_see_turns_reflections_and_shifts(seed: int) -> None:
    coordinates, positions = example(seed)
    rng = np.random.default_rng(seed)
    isometry = Rotation.from_quat(rng.normal(size=4)).as_matrix() * rng.choice([-1, 1], (1, 3))
    moved = coordinates @ torch.from_numpy(isometry).T + torch.from_numpy(rng.normal(size=3))
    torch.testing.assert_close(
        distance_loss(moved, positions), distance_loss(coordinates, positions), rtol=1e-3, atol=1e-6
    )
    perfect = positions / UNIT_MM @ torch.from_numpy(isometry).T
    assert distance_loss(perfect, positions).max() < 1e-8


def test_distances_see_scale_and_shear() -> None:
    _, positions = example(0)
    right = positions / UNIT_MM
    for wrong in (1.5 * right, right * torch.tensor([1.0, 1, 0.3]), torch.zeros_like(right)):
        assert distance_loss(wrong, positions).min() > 0.01


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_consistency_is_the_mean_over_shared_points(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, 3, 7, 3))
    weight = rng.uniform(0.1, 1, (3, 7)) * (rng.random((3, 7)) < 0.6)
    expected = []
    for a, b, w in zip(first, second, weight, strict=True):
        terms = [w[k] * np.mean((a[k] - b[k]) ** 2) for k in range(7) if w[k] > 0]
        expected.append(np.mean(terms) if terms else 0.0)
    found = consistency_loss(*(torch.from_numpy(values) for values in (first, second, weight)))
    assert found.shape == (3,)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-7)


def test_consistency_of_nothing_shared_costs_nothing() -> None:
    first, second = torch.zeros(1, 4, 3, requires_grad=True), torch.ones(1, 4, 3)
    found = consistency_loss(first, second, torch.zeros(1, 4))
    found.sum().backward()
    assert found.item() == 0
    assert not first.grad.any()
    assert consistency_loss(first, second, torch.ones(1, 4)).item() == 1


@given(seed=seeds, offset=st.tuples(*[st.floats(-5, 5)] * 3))
@settings(max_examples=30, deadline=None)
def test_perfect_coordinates_up_to_an_offset_cost_nothing(seed: int, offset: tuple[float, float, float]) -> None:
    _, positions = example(seed)
    coordinates = positions / UNIT_MM + torch.tensor(offset)
    assert relative_position_loss(coordinates, positions).max() < 1e-5
    assert displacement_error_mm(coordinates, positions).max() < 1e-2


@given(seed=seeds, shift=st.tuples(*[st.floats(-2000, 2000)] * 3))
@settings(max_examples=30, deadline=None)
def test_the_origin_of_a_scan_does_not_matter(seed: int, shift: tuple[float, float, float]) -> None:
    coordinates, positions = example(seed)
    weight = torch.from_numpy(np.random.default_rng(seed).uniform(0.1, 1, (2, 6)))
    moved = positions.clone()
    moved[0] += torch.tensor(shift)
    for loss, _ in LOSSES:
        before, after = (loss(coordinates, p, weight) for p in (positions, moved))
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-6)


def test_a_mistaken_scale_or_side_costs() -> None:
    _, positions = example(0)
    right = positions / UNIT_MM
    for wrong in (2 * right, right * torch.tensor([-1.0, 1, 1]), torch.zeros_like(right)):
        assert relative_position_loss(wrong, positions).min() > 0.05


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
