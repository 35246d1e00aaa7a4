"""Lengths in epochs, and learning rates that rise and fall as they should."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn

from diffseg_nnunet.training.schedules import split_iterations, warmup_cosine, warmup_poly


@given(iterations=st.integers(1, 300_000))
@settings(max_examples=200, deadline=None)
def test_split_covers_the_iterations(iterations: int) -> None:
    plan = split_iterations(iterations)
    assert plan.iterations == plan.epochs * plan.iterations_per_epoch
    assert 0 <= plan.iterations - iterations < plan.epochs
    assert 1 <= plan.iterations_per_epoch <= 250
    # checkpoints and learning rates follow epochs: there are enough of them even in a short run
    assert plan.epochs >= min(iterations, 11)
    assert 1 <= plan.validation_iterations <= max(1, plan.iterations_per_epoch / 5)


@pytest.mark.parametrize(
    ("iterations", "epochs", "per_epoch", "validation"),
    [(250_000, 1000, 250, 50), (1, 1, 1, 1), (20, 20, 1, 1), (100, 20, 5, 1), (5000, 20, 250, 50), (5001, 21, 239, 47)],
)
def test_splits(iterations: int, epochs: int, per_epoch: int, validation: int) -> None:
    """nnU-Net's own length gives nnU-Net's own numbers."""
    plan = split_iterations(iterations)
    assert (plan.epochs, plan.iterations_per_epoch, plan.validation_iterations) == (epochs, per_epoch, validation)


@pytest.mark.parametrize("iterations", [0, -5])
def test_no_iteration_is_refused(iterations: int) -> None:
    with pytest.raises(ValueError, match="at least 1 iteration"):
        split_iterations(iterations)


@pytest.mark.parametrize("factor", [warmup_poly, warmup_cosine])
@given(total=st.integers(2, 400), share=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_rate_rises_to_one_and_falls(factor, total: int, share: float) -> None:
    warmup = round(share * total)
    rates = [factor(step, total, warmup) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    rising, falling = rates[: warmup + 1], rates[warmup:]
    assert all(a < b for a, b in itertools.pairwise(rising))
    assert all(a > b for a, b in itertools.pairwise(falling))
    if warmup < total:
        assert rates[warmup] == 1
    # linear: equal steps from nothing
    assert all(rate == pytest.approx((step + 1) / (warmup + 1)) for step, rate in enumerate(rates[:warmup]))


@pytest.mark.parametrize("total", [1, 20, 1000])
def test_poly_without_warmup_is_nnunets(total: int) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.01)
    stock = PolyLRScheduler(optimizer, 0.01, total)
    for step in range(total):
        stock.step(step)
        assert 0.01 * warmup_poly(step, total, 0) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_cosine_is_half_way_in_the_middle() -> None:
    assert warmup_cosine(60, 110, 10) == pytest.approx(0.5)
    assert warmup_cosine(110, 110, 10) == pytest.approx(0)
