"""The Bernoulli process against enumeration: a chain of 2×2 transition matrices, restated in numpy in float64."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from diffseg_nnunet.diffusion.bernoulli import (
    BERNOULLI_SCHEDULES,
    BernoulliDiffusion,
    BernoulliSettings,
    clean_log_odds,
    draw,
    exclusive_or,
)

T = 10
PRIORS = (0.02, 0.3, 0.5, 0.77, 0.999)
COSINE = (0.9721, 0.8987, 0.7869, 0.6475, 0.4938, 0.3408, 0.2031, 0.0940, 0.0241, 0.0)
COSINE_IN_FOUR = (0.847, 0.494, 0.144, 0.0)


def diffusion(schedule: str = "cosine", timesteps: int = T) -> BernoulliDiffusion:
    return BernoulliDiffusion(BernoulliSettings(timesteps, schedule))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrices(betas: np.ndarray, prior: float) -> list[np.ndarray]:
    """q(y_t = column | y_{t-1} = row) of each step: the mask stays with 1 - β, and is drawn anew with β."""
    return [(1 - beta) * np.eye(2) + beta * np.array([[1 - prior, prior]] * 2) for beta in betas]


def marginals(chain: list[np.ndarray]) -> list[np.ndarray]:
    """q(y_t = column | y_0 = row) for each t."""
    return list(itertools.accumulate(chain, np.matmul))


def respaced_betas(process: BernoulliDiffusion) -> np.ndarray:
    kept = np.cumprod(1 - process.settings.betas().numpy())[list(process.timesteps)]
    return 1 - kept / np.concatenate([[1.0], kept[:-1]])


def grid(*values: float) -> Tensor:
    """One voxel of one channel a value: (count, 1, 1, 1)."""
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 1)


def steps(t: int, count: int) -> Tensor:
    return torch.full((count,), t)


@pytest.mark.parametrize(("timesteps", "expected"), [(10, COSINE), (4, COSINE_IN_FOUR)])
def test_the_squared_cosine_has_the_values_of_its_formula(timesteps: int, expected: tuple[float, ...]) -> None:
    np.testing.assert_allclose(diffusion(timesteps=timesteps).alpha_bar, expected, atol=5e-4)


def test_alpha_bar_falls_evenly() -> None:
    np.testing.assert_allclose(diffusion("linear_alpha_bar").alpha_bar, np.arange(9, -1, -1) / 10, atol=1e-6)


@given(st.sampled_from(BERNOULLI_SCHEDULES), st.integers(2, 1000))
@hypothesis_settings(deadline=None, max_examples=60)
def test_every_schedule_is_one_for_every_number_of_steps(schedule: str, timesteps: int) -> None:
    settings = BernoulliSettings(timesteps, schedule)
    betas, alpha_bar = settings.betas(), BernoulliDiffusion(settings).alpha_bar
    assert betas.shape == alpha_bar.shape == (timesteps,)
    assert ((betas > 0) & (betas <= 1)).all()
    assert (alpha_bar.diff() < 0).all()
    assert alpha_bar[-1] < 2e-3  # so that y_T may be drawn from the prior


@pytest.mark.parametrize("schedule", BERNOULLI_SCHEDULES)
@pytest.mark.parametrize("kept", [10, 4, 1])
@pytest.mark.parametrize("prior", PRIORS)
def test_marginals_and_transitions_are_those_of_the_chain(schedule: str, kept: int, prior: float) -> None:
    process = diffusion(schedule).respaced(kept)
    chain = matrices(respaced_betas(process), prior)
    before, p = grid(0, 1), grid(prior, prior)
    for t, (transition, marginal) in enumerate(zip(chain, marginals(chain), strict=True)):
        np.testing.assert_allclose(process.transition(before, p, steps(t, 2)).flatten(), transition[:, 1], atol=2e-6)
        np.testing.assert_allclose(process.marginal(before, p, steps(t, 2)).flatten(), marginal[:, 1], atol=2e-6)


@pytest.mark.parametrize("prior", PRIORS)
def test_the_chain_is_consistent(prior: float) -> None:
    # q(y_t | y_0) = Σ q(y_t | y_{t-1}) q(y_{t-1} | y_0), with the methods alone
    process, clean, p = diffusion(), grid(0, 1), grid(prior, prior)
    zeros, ones = torch.zeros_like(clean), torch.ones_like(clean)
    for t in range(1, T):
        before = process.marginal(clean, p, steps(t - 1, 2))
        found = process.transition(ones, p, steps(t, 2)) * before
        found += process.transition(zeros, p, steps(t, 2)) * (1 - before)
        torch.testing.assert_close(found, process.marginal(clean, p, steps(t, 2)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("schedule", BERNOULLI_SCHEDULES)
@pytest.mark.parametrize("kept", [10, 3])
@pytest.mark.parametrize("prior", PRIORS)
def test_the_posterior_is_bayes_rule(schedule: str, kept: int, prior: float) -> None:
    process = diffusion(schedule).respaced(kept)
    chain = matrices(respaced_betas(process), prior)
    until = [np.eye(2), *marginals(chain)]
    for t, (noisy, clean) in itertools.product(range(kept), itertools.product((0, 1), repeat=2)):
        joint = np.array([until[t][clean, y] * chain[t][y, noisy] for y in (0, 1)])
        found = process.posterior(grid(noisy), grid(clean), grid(prior), steps(t, 1)).item()
        assert found == pytest.approx(joint[1] / joint.sum(), abs=2e-5)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("estimate", [0.0, 0.1, 0.64, 1.0])
def test_an_estimate_enters_the_posterior_as_in_the_released_formula(prior: float, estimate: float) -> None:
    # methods.md 3.1: th2 / (th1 + th2)
    process = diffusion()
    kept = np.cumprod(1 - process.settings.betas().numpy())
    for t, noisy in itertools.product(range(1, T), (0, 1)):
        alpha, before, redrawn = kept[t] / kept[t - 1], kept[t - 1], abs(1 - noisy - prior)
        th1 = (alpha * (1 - noisy) + (1 - alpha) * redrawn) * (before * (1 - estimate) + (1 - before) * (1 - prior))
        th2 = (alpha * noisy + (1 - alpha) * redrawn) * (before * estimate + (1 - before) * prior)
        found = process.posterior(grid(noisy), grid(estimate), grid(prior), steps(t, 1)).item()
        assert found == pytest.approx(th2 / (th1 + th2), abs=2e-5)


@pytest.mark.parametrize("kept", [10, 4])
@pytest.mark.parametrize("prior", PRIORS)
def test_both_reverse_steps_keep_the_marginals(kept: int, prior: float) -> None:
    process = diffusion().respaced(kept)
    for t, clean in itertools.product(range(kept), (0.0, 1.0)):
        p, y0 = grid(prior, prior), grid(clean, clean)
        after = process.marginal(y0, p, steps(t, 2)).flatten()[0]
        weights = torch.stack([1 - after, after])
        expected = clean if t == 0 else process.marginal(y0, p, steps(t - 1, 2)).flatten()[0].item()
        for mean in (process.ddim(grid(0, 1), y0, steps(t, 2)), process.posterior(grid(0, 1), y0, p, steps(t, 2))):
            assert ((mean >= 0) & (mean <= 1)).all()
            assert (weights * mean.flatten()).sum().item() == pytest.approx(expected, abs=3e-6)


def test_simulated_chains_have_the_marginals() -> None:
    process, count, generator = diffusion(), 20_000, seeded()
    prior = torch.tensor(PRIORS).repeat(2).reshape(1, -1, 1, 1).expand(count, -1, -1, -1)
    clean = torch.tensor([0.0, 1.0]).repeat_interleave(len(PRIORS)).reshape(1, -1, 1, 1).expand_as(prior)
    walking = clean
    for t in range(T):
        at = steps(t, count)
        walking = draw(process.transition(walking, prior, at), generator)
        direct = process.add_noise(clean, prior, at, generator)
        expected = process.marginal(clean, prior, at)[0].flatten()
        tolerance = 4.5 * (expected * (1 - expected) / count).sqrt() + 1e-3
        for found in (walking, direct):
            assert set(found.unique().tolist()) <= {0.0, 1.0}
            assert ((found.mean(0).flatten() - expected).abs() < tolerance).all()


def test_at_a_prior_of_one_half_it_is_berdiff() -> None:
    # arXiv 2304.04429: q(y_t | y_0) = B(ᾱ y_0 + (1 - ᾱ) / 2)
    process, clean = diffusion(), grid(0, 1)
    for t in range(T):
        left = process.alpha_bar[t]
        found = process.marginal(clean, grid(0.5, 0.5), steps(t, 2))
        torch.testing.assert_close(found, left * clean + (1 - left) / 2)


def test_a_flip_undoes_itself() -> None:
    noisy, clean = grid(0, 0, 1, 1), grid(0, 1, 0, 1)
    flip = exclusive_or(noisy, clean)
    assert flip.flatten().tolist() == [0, 1, 1, 0]
    torch.testing.assert_close(exclusive_or(noisy, flip), clean)


@given(st.floats(-30, 30), st.integers(0, 1))
@hypothesis_settings(deadline=None)
def test_log_odds_of_the_clean_mask_are_the_exclusive_or_of_the_probabilities(log_odds: float, noisy: int) -> None:
    flip = torch.sigmoid(torch.tensor(log_odds))
    found = clean_log_odds(torch.tensor(log_odds), torch.tensor(noisy)).sigmoid()
    torch.testing.assert_close(found, exclusive_or(torch.tensor(noisy), flip), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 3, 4, 5, 3)])
def test_a_perfect_prediction_recovers_the_mask_in_one_step(shape: tuple[int, ...]) -> None:
    process, generator = diffusion().respaced(1), seeded()
    clean = torch.randint(0, 2, shape, generator=generator).float()
    prior = torch.rand(shape, generator=generator)
    noisy, t = process.start(prior, generator), steps(0, 2)
    estimate = clean_log_odds(200 * exclusive_or(noisy, clean) - 100, noisy).sigmoid()
    torch.testing.assert_close(process.ddim(noisy, estimate, t), clean)
    torch.testing.assert_close(process.posterior(noisy, estimate, prior, t), clean)


def test_respacing_keeps_the_last_step_and_its_numbers() -> None:
    process = diffusion(timesteps=100)
    few = process.respaced(7)
    assert len(few.timesteps) == 7
    assert few.timesteps[-1] == 99
    torch.testing.assert_close(few.alpha_bar, process.alpha_bar[list(few.timesteps)])
    assert process.respaced(100).timesteps == process.timesteps
    with pytest.raises(ValueError, match="steps are not within 1"):
        process.respaced(101)


def test_everything_is_float32_within_autocast_and_at_certain_priors() -> None:
    process, t = diffusion(), torch.arange(T)
    prior = torch.tensor([0.0, 1.0]).repeat(T // 2).reshape(-1, 1, 1, 1).bfloat16()
    mask = torch.ones(T, 1, 1, 1, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for found in (
            process.marginal(mask, prior, t),
            process.transition(mask, prior, t),
            process.posterior(mask, 0 * mask, prior, t),
            process.ddim(mask, 0 * mask, t),
            process.start(prior, seeded()),
        ):
            assert found.dtype == torch.float32
            assert ((found >= 0) & (found <= 1)).all()


def test_draws_repeat_with_the_seed_and_carry_no_gradient() -> None:
    process = diffusion()
    prior = torch.rand(4, 2, 6, 6, generator=seeded(1)).requires_grad_()
    t = process.sample_timesteps(4, seeded())
    assert torch.equal(t, process.sample_timesteps(4, seeded()))
    first, second = (process.add_noise(torch.zeros_like(prior), prior, t, seeded(2)) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert set(process.sample_timesteps(500, seeded()).tolist()) == set(range(T))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_time_steps_is_the_last(share: float) -> None:
    drawn = torch.bincount(diffusion().sample_timesteps(20_000, seeded(), share), minlength=T) / 20_000
    expected = torch.full((T,), (1 - share) / T)
    expected[-1] += share
    torch.testing.assert_close(drawn, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "sigmoid"}, "sigmoid is none of cosine"),
        ({"timesteps": 1}, "1 time steps are fewer than two"),
        ({"prior_margin": 0.0}, "prior_margin 0.0 is not within"),
        ({"focal_weight": -1.0}, "focal_weight -1.0 is negative"),
        ({"focal_gamma": -2.0}, "focal_gamma -2.0 is negative"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BernoulliSettings(**changes)


def test_settings_go_through_json() -> None:
    settings = BernoulliSettings(timesteps=7, schedule="linear_beta")
    assert BernoulliSettings(**json.loads(json.dumps(settings.to_json()))) == settings
