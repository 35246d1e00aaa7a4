"""Refined windows and folds are averaged by logits on one scale, and refining that finds nothing changes no label."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffseg_nnunet.diffusion.bernoulli import BernoulliDiffusion, BernoulliSettings
from diffseg_nnunet.refinement.logits import refined_logits

PROCESS = BernoulliDiffusion(BernoulliSettings())
MARGIN = PROCESS.settings.prior_margin
MOST = math.log((1 - MARGIN) / MARGIN)  # 9.2


def probabilities(logits: Tensor, exclusive: bool) -> Tensor:
    return logits.float().softmax(1) if exclusive else logits.float().sigmoid()


def combined(logits: Tensor, refined: Tensor | None, exclusive: bool, where: bool = True) -> Tensor:
    """What refining to `refined` makes of logits; None: to the prior as the diffusion sees it."""
    prior = probabilities(logits, exclusive)
    if refined is None:
        refined = PROCESS.clamped(prior)
        refined = refined / refined.sum(1, keepdim=True) if exclusive else refined
    places = torch.full_like(prior[:, :1], where, dtype=torch.bool)
    return refined_logits(logits, prior, refined, MARGIN, exclusive, places)


def scores(foreground: float, exclusive: bool) -> Tensor:
    """Logits of one voxel, (1, K, 1, 1), whose foreground has these log-odds; softmax's with some constant."""
    entries = [3.0, 3.0 + foreground] if exclusive else [foreground]
    return torch.tensor(entries).reshape(1, -1, 1, 1)


def log_odds(logits: Tensor) -> float:
    """Of the foreground."""
    entries = logits.flatten().tolist()
    return entries[-1] - (entries[0] if len(entries) > 1 else 0.0)


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_window_that_found_nothing_does_not_outvote_one_that_did(exclusive: bool) -> None:
    """Of two windows over a voxel, the one of more weight decides: each is as sure as a refined one can be."""
    sure = scores(-30.0, exclusive)
    unchanged = combined(sure, None, exclusive)
    found = combined(sure, probabilities(scores(20.0, exclusive), exclusive), exclusive)
    assert log_odds(unchanged) == pytest.approx(-MOST, abs=1e-4)
    assert log_odds(found) == pytest.approx(MOST, abs=1e-3)
    assert log_odds(0.45 * unchanged + 0.55 * found) > 0.8
    assert log_odds(0.55 * unchanged + 0.45 * found) < -0.8
    # nor does one that was not refined at all, which is no less sure for it
    assert log_odds(combined(sure, None, exclusive, where=False)) == pytest.approx(-MOST, abs=1e-4)
    mild = scores(-3.0, exclusive)
    assert torch.equal(combined(mild, None, exclusive, where=False), mild)


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_refining_that_returns_the_prior_changes_no_label(exclusive: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(4, 5, 20, 20, generator=generator) * torch.tensor([0.01, 1, 10, 40])[:, None, None, None]).to(
        dtype
    )
    found = combined(logits, None, exclusive)
    assert found.dtype == dtype
    if exclusive:
        assert torch.equal(found.argmax(1), logits.argmax(1))
        within = logits >= logits.amax(1, keepdim=True) - MOST + 0.02
    else:
        assert torch.equal(found > 0, logits > 0)
        within = logits.abs() <= MOST - 0.02
    assert torch.equal(found[within], logits[within])
    assert not torch.equal(found, logits)
