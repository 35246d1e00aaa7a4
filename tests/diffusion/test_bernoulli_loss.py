"""The loss against torch's own divergences in float64, and at the edges where naive formulas are infinite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from diffseg_nnunet.diffusion.bernoulli import BernoulliDiffusion, BernoulliSettings, exclusive_or
from diffseg_nnunet.diffusion.bernoulli_loss import bernoulli_kl, diffusion_loss, focal_loss, variational_bound

T = 10
LOG_ODDS = st.floats(-25, 25, width=32)  # beyond these torch's own divergence is infinite


def diffusion(**changes: object) -> BernoulliDiffusion:
    return BernoulliDiffusion(BernoulliSettings(**changes))


def scene(shape: tuple[int, ...] = (T, 3, 4, 5), seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-odds of the flip, y_t, y_0, and a prior that is nowhere certain; a sample for every time step."""
    generator = torch.Generator().manual_seed(seed)
    noisy, clean = (torch.randint(0, 2, shape, generator=generator).float() for _ in range(2))
    prior = 0.01 + 0.98 * torch.rand(shape, generator=generator)
    return 3 * torch.randn(shape, generator=generator), noisy, clean, prior


@given(LOG_ODDS, LOG_ODDS)
@hypothesis_settings(deadline=None, max_examples=200)
def test_divergence_is_torchs_and_never_negative(one: float, other: float) -> None:
    found = bernoulli_kl(torch.tensor(one), torch.tensor(other)).item()
    a, b = (Bernoulli(logits=torch.tensor(value, dtype=torch.float64)) for value in (one, other))
    assert found >= 0
    assert found == pytest.approx(kl_divergence(a, b).item(), rel=1e-4, abs=1e-5)
    assert bernoulli_kl(torch.tensor(one), torch.tensor(one)).item() == 0


def test_bound_is_the_divergence_of_the_posteriors_and_the_likelihood_at_the_end() -> None:
    process, t = diffusion(), torch.arange(T)
    log_odds, noisy, clean, prior = scene()
    estimate = exclusive_or(noisy, log_odds.sigmoid())
    exact, guessed = (process.posterior(noisy, y0, prior, t).double() for y0 in (clean, estimate))
    found = variational_bound(process, log_odds, noisy, clean, prior, t)
    assert found.shape == noisy.shape
    expected = kl_divergence(Bernoulli(probs=exact[1:]), Bernoulli(probs=guessed[1:]))
    torch.testing.assert_close(found[1:].double(), expected, atol=1e-5, rtol=1e-3)
    likelihood = -Bernoulli(probs=estimate[0].double()).log_prob(clean[0].double())
    torch.testing.assert_close(found[0].double(), likelihood, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_is_the_formula(gamma: float) -> None:
    log_odds, noisy, clean, _ = scene()
    flip = exclusive_or(noisy, clean).double()
    right = torch.where(flip == 1, log_odds.double().sigmoid(), 1 - log_odds.double().sigmoid())
    expected = (1 - right) ** gamma * -right.log()
    torch.testing.assert_close(focal_loss(log_odds, flip, gamma).double(), expected, atol=1e-6, rtol=1e-4)


def test_loss_is_the_mean_in_bits() -> None:
    process, t = diffusion(focal_weight=0.5), torch.arange(T)
    log_odds, noisy, clean, prior = scene()
    nats = variational_bound(process, log_odds, noisy, clean, prior, t)
    nats = nats + 0.5 * focal_loss(log_odds, exclusive_or(noisy, clean), process.settings.focal_gamma)
    found = diffusion_loss(process, log_odds, noisy, clean, prior, t)
    torch.testing.assert_close(found, nats.mean((1, 2, 3)) / math.log(2))
    # a coin that cannot be foreseen costs one bit at the last step
    one_bit = diffusion_loss(diffusion(focal_weight=0), 0 * log_odds, noisy, clean, prior, t)[0]
    assert one_bit.item() == pytest.approx(1, abs=1e-6)


def expected_slope(process: BernoulliDiffusion, said: Tensor, truth: Tensor, t: Tensor, seed: int = 0) -> Tensor:
    """Gradient by the log-odds of P(y_0 = 1), where it is `said` and truly is `truth`, of the expected loss; of each
    time step, over y_t and priors."""
    _, noisy, _, prior = scene((len(t), 1, 8, 8), seed)
    flip = exclusive_or(noisy, said).logit().requires_grad_()
    ones, zeros = torch.ones_like(noisy), torch.zeros_like(noisy)
    loss = sum(
        share * diffusion_loss(process, flip, noisy, clean, prior, t).sum()
        for share, clean in ((truth, ones), (1 - truth, zeros))
    )
    (slope,) = torch.autograd.grad(loss, flip)
    return torch.where(noisy == 1, -slope, slope) * noisy[0].numel()


@pytest.mark.parametrize("truth", [0.02, 0.3, 0.9])
def test_with_cross_entropy_the_first_and_the_last_step_ask_for_the_posterior(truth: float) -> None:
    """In between the bound asks for what makes the step right: y_{t-1}'s posterior is not linear in y_0's."""
    process, t = diffusion(focal_gamma=0), torch.tensor([0, T - 1])
    for said, sign in ((truth, 0), (truth - 0.01, -1), (truth + 0.01, 1)):
        slope = expected_slope(process, torch.tensor(said), torch.tensor(truth), t)
        if sign:
            assert (slope.sign() == sign).all()
        else:
            assert slope.abs().max() < 2e-3


def test_a_focal_loss_asks_for_less_certainty() -> None:
    """At the last step the bound hardly counts: of 0.9 the least focal loss is where φ'(q) 0.9 = φ'(1 - q) 0.1, with
    φ(q) = -(1 - q)² log q."""
    truth, last = torch.tensor(0.9), torch.tensor([T - 1])
    assert expected_slope(diffusion(), torch.tensor(0.6955), truth, last).abs().max() < 2e-3
    assert expected_slope(diffusion(), truth, truth, last).min() > 0.05


def test_a_perfect_prediction_costs_nothing() -> None:
    _, noisy, clean, prior = scene()
    log_odds = 200 * exclusive_or(noisy, clean) - 100
    loss = diffusion_loss(diffusion(), log_odds, noisy, clean, prior, torch.arange(T))
    torch.testing.assert_close(loss, torch.zeros(T), atol=1e-5, rtol=0)


@pytest.mark.parametrize("timesteps", [2, 10, 1000])
@pytest.mark.parametrize("schedule", ["cosine", "linear_beta", "linear_alpha_bar"])
def test_loss_and_gradients_are_finite_for_certain_priors(timesteps: int, schedule: str) -> None:
    process = diffusion(timesteps=timesteps, schedule=schedule)
    values = torch.cartesian_prod(
        torch.tensor([0.0, 1.0]),  # y_t
        torch.tensor([0.0, 1.0]),  # y_0
        torch.tensor([0.0, 1e-30, 1e-4, 0.5, 1 - 1e-7, 1.0]),  # p
        torch.tensor([-500.0, -20.0, 0.0, 20.0, 500.0]),  # log-odds
    )
    at = torch.tensor(sorted({0, 1, timesteps // 2, timesteps - 1}))
    noisy, clean, prior, log_odds = (
        column.reshape(1, -1, 1, 1).expand(len(at), -1, -1, -1).clone() for column in values.T
    )
    prior.requires_grad_()
    log_odds.requires_grad_()
    loss = diffusion_loss(process, log_odds, noisy, clean, prior, at)
    loss.sum().backward()
    for found in (loss, log_odds.grad, prior.grad):
        assert found.isfinite().all()


def test_the_gradient_at_the_prior_is_that_of_finite_differences() -> None:
    # the segmentor learns through it: at both posteriors at once
    process, t = diffusion(), torch.arange(T)
    log_odds, noisy, clean, prior = scene((T, 1, 2, 2))
    prior = prior.clamp(0.1, 0.9).requires_grad_()
    diffusion_loss(process, log_odds, noisy, clean, prior, t).sum().backward()
    h = 1e-2
    for index in range(4):
        change = torch.zeros(1, 1, 4)
        change[..., index] = h
        change = change.reshape(1, 1, 2, 2)
        up, down = (
            diffusion_loss(process, log_odds, noisy, clean, prior.detach() + sign * change, t) for sign in (1, -1)
        )
        slope = (up - down) / (2 * h)
        torch.testing.assert_close(prior.grad.flatten(1)[:, index], slope, atol=2e-3, rtol=2e-2)


def test_only_valid_voxels_count() -> None:
    process, t = diffusion(), torch.arange(T)
    log_odds, noisy, clean, prior = scene()
    valid = torch.zeros(T, 1, 4, 5, dtype=torch.bool)
    valid[:9, :, :2] = True  # the last sample has none
    found = diffusion_loss(process, log_odds, noisy, clean, prior, t, valid)
    cropped = (tensor[:, :, :2] for tensor in (log_odds, noisy, clean, prior))
    torch.testing.assert_close(found[:9], diffusion_loss(process, *cropped, t)[:9])
    assert found[9] == 0


def test_loss_is_float32_within_autocast() -> None:
    process, t = diffusion(), torch.arange(T)
    log_odds, noisy, clean, prior = scene()
    log_odds = log_odds.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = diffusion_loss(process, log_odds, noisy, clean, prior, t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, diffusion_loss(process, log_odds.float(), noisy, clean, prior, t))
