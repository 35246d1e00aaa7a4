"""Sampling against closed forms: normal data, whose best denoiser is known, and Bayes' rule for every single step."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from diffseg_nnunet.diffusion.gaussian import PREDICTIONS, SCHEDULES, DiffusionSettings, GaussianDiffusion
from diffseg_nnunet.diffusion.sampling import Denoise, SamplerSettings, sample, sampling_timesteps

MEAN, STD = 0.7, 0.5
COUNT = 20_000
SAMPLERS = (SamplerSettings("ddim"), SamplerSettings("ddim", eta=1.0), SamplerSettings("ddpm"))


def diffusion(schedule: str = "linear_beta", prediction: str = "epsilon", timesteps: int = 1000) -> GaussianDiffusion:
    return GaussianDiffusion(DiffusionSettings(timesteps, schedule, prediction, fold_timestep=0))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_steps(settings: SamplerSettings, steps: int) -> SamplerSettings:
    return SamplerSettings(settings.sampler, steps, settings.eta)


def predicting(process: GaussianDiffusion, estimate: Callable[[Tensor, Tensor], Tensor]) -> Denoise:
    """What a network would predict whose estimate of x_0 is `estimate(x_t, ᾱ)`, in float64."""

    def denoise(noised: Tensor, t: Tensor) -> Tensor:
        left = process.alpha_bar[t].double().reshape(-1, *(1,) * (noised.ndim - 1))
        clean = estimate(noised.double(), left)
        noise = (noised - left.sqrt() * clean) / (1 - left).sqrt()
        velocity = left.sqrt() * noise - (1 - left).sqrt() * clean
        predictions = {"epsilon": noise, "sample": clean, "v_prediction": velocity}
        return predictions[process.settings.prediction].float()

    return denoise


def best_estimate(noised: Tensor, left: Tensor) -> Tensor:
    """E[x_0 | x_t] for x_0 ~ N(MEAN, STD²)."""
    gain = left.sqrt() * STD**2 / (left * STD**2 + 1 - left)
    return MEAN + gain * (noised - left.sqrt() * MEAN)


def posterior(left_t: float, left_s: float) -> tuple[float, float, float]:
    """q(x_s | x_t, x_0) = N(a x_0 + b x_t, v) by Bayes' rule: a prior from x_0, a likelihood from x_t (s < t)."""
    prior, step = 1 - left_s, left_t / left_s
    if prior <= 0:
        return 1.0, 0.0, 0.0
    precision = 1 / prior + step / (1 - step)
    return np.sqrt(left_s) / prior / precision, np.sqrt(step) / (1 - step) / precision, 1 / precision


def expected(lefts: list[float], settings: SamplerSettings) -> tuple[float, float]:
    """Mean and std that a chain of these ᾱ, from noise to 1, gives normal data: each step is affine in x_t."""
    mean, variance = 0.0, 1.0
    for left_t, left_s in zip(lefts, [*lefts[1:], 1.0], strict=True):
        gain = np.sqrt(left_t) * STD**2 / (left_t * STD**2 + 1 - left_t)
        offset = MEAN * (1 - gain * np.sqrt(left_t))
        if settings.sampler == "ddpm" or settings.eta == 1:
            from_clean, from_noised, added = posterior(left_t, left_s)
        else:
            from_noised = np.sqrt((1 - left_s) / (1 - left_t))
            from_clean, added = np.sqrt(left_s) - from_noised * np.sqrt(left_t), 0.0
        slope = from_clean * gain + from_noised
        mean, variance = slope * mean + from_clean * offset, slope**2 * variance + added
    return mean, np.sqrt(variance)


@pytest.mark.parametrize("settings", SAMPLERS, ids=lambda s: f"{s.sampler}-{s.eta:g}")
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_steps_reproduce_the_data(schedule: str, prediction: str, settings: SamplerSettings) -> None:
    process = diffusion(schedule, prediction, timesteps=400)
    denoise = predicting(process, best_estimate)
    drawn = sample(process, denoise, (1, COUNT), seeded(), with_steps(settings, 400))
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert drawn.std().item() == pytest.approx(STD, abs=0.015)


@pytest.mark.parametrize("settings", SAMPLERS, ids=lambda s: f"{s.sampler}-{s.eta:g}")
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("timesteps", "steps"), [(1000, 50), (1000, 7), (1000, 1), (30, 30), (4, 3)])
def test_few_steps_give_what_their_chain_gives(
    timesteps: int, steps: int, schedule: str, prediction: str, settings: SamplerSettings
) -> None:
    """Few steps narrow the data; by how much is known."""
    process = diffusion(schedule, prediction, timesteps)
    chain = process.alpha_bar.double().numpy()[sampling_timesteps(timesteps, steps)].tolist()
    mean, std = expected(chain, settings)
    drawn = sample(process, predicting(process, best_estimate), (1, COUNT), seeded(), with_steps(settings, steps))
    assert drawn.mean().item() == pytest.approx(mean, abs=0.015)
    assert drawn.std().item() == pytest.approx(std, abs=0.01)


@pytest.mark.parametrize("settings", SAMPLERS[1:], ids=lambda s: f"{s.sampler}-{s.eta:g}")
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("timesteps", "steps"), [(20, 20), (1000, 6)])
def test_every_ancestral_step_is_the_posterior(
    timesteps: int, steps: int, prediction: str, settings: SamplerSettings
) -> None:
    process = diffusion("scaled_linear_beta", prediction, timesteps)
    seen: list[tuple[int, Tensor]] = []
    oracle = predicting(process, lambda noised, _: torch.full_like(noised, MEAN))

    def denoise(noised: Tensor, t: Tensor) -> Tensor:
        seen.append((int(t[0]), noised.double()))
        return oracle(noised, t)

    sample(process, denoise, (1, COUNT), seeded(), with_steps(settings, steps))
    for (t, noised), (s, cleaner) in itertools.pairwise(seen):
        a, b, variance = posterior(float(process.alpha_bar[t]), float(process.alpha_bar[s]))
        added = (cleaner - a * MEAN - b * noised) / np.sqrt(variance)
        assert added.mean().item() == pytest.approx(0, abs=0.03)
        assert added.std().item() == pytest.approx(1, abs=0.02)
        assert abs((added * (noised - noised.mean())).mean().item()) < 0.03


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("settings", SAMPLERS, ids=lambda s: f"{s.sampler}-{s.eta:g}")
@hypothesis_settings(max_examples=15, deadline=None)
@given(
    timesteps=st.integers(1, 300),
    share=st.floats(0, 1),
    prediction=st.sampled_from(PREDICTIONS),
    seed=st.integers(0, 2**62),
)
def test_who_knows_the_image_draws_it(
    settings: SamplerSettings, schedule: str, timesteps: int, share: float, prediction: str, seed: int
) -> None:
    """The last step ends at ᾱ = 1: with the true x_0 it returns x_0, in any number of steps."""
    steps = max(1, round(share * timesteps))
    process = diffusion(schedule, prediction, timesteps)
    image = torch.randn((2, 1, 3, 4), generator=seeded(seed))
    denoise = predicting(process, lambda *_: image.double())
    drawn = sample(process, denoise, image.shape, seeded(seed), with_steps(settings, steps))
    # from the noise, x_0 is a difference divided by sqrt(ᾱ): float32 leaves little of it where ᾱ is tiny
    left = process.alpha_bar[sampling_timesteps(timesteps, steps)[-1]].item()
    torch.testing.assert_close(drawn, image, atol=1e-5 + 2e-6 / np.sqrt(left), rtol=0)


@given(timesteps=st.integers(1, 2000), share=st.floats(0, 1))
def test_time_steps_fall_evenly_from_the_noisiest(timesteps: int, share: float) -> None:
    steps = max(1, round(share * timesteps))
    kept = sampling_timesteps(timesteps, steps)
    assert len(kept) == steps
    assert kept[0] == timesteps - 1
    gaps = -np.diff([*kept, -1])
    assert set(gaps) <= {timesteps // steps, -(-timesteps // steps)}


@pytest.mark.parametrize("settings", SAMPLERS, ids=lambda s: f"{s.sampler}-{s.eta:g}")
def test_the_seed_decides_the_image(settings: SamplerSettings) -> None:
    process = diffusion()
    denoise = predicting(process, best_estimate)
    settings = with_steps(settings, 5)
    first, same, other = (sample(process, denoise, (1, 1, 4, 4), seeded(seed), settings) for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_ddim_draws_no_noise_but_the_first() -> None:
    process, generator = diffusion(), seeded(1)
    sample(process, predicting(process, best_estimate), (2, 3), generator, SamplerSettings("ddim", 9))
    only_first = seeded(1)
    torch.randn((2, 3), generator=only_first)
    assert torch.equal(generator.get_state(), only_first.get_state())


@pytest.mark.parametrize("settings", SAMPLERS, ids=lambda s: f"{s.sampler}-{s.eta:g}")
def test_what_the_denoiser_and_the_listener_are_told(settings: SamplerSettings) -> None:
    process, told, heard = diffusion(), [], []

    def denoise(noised: Tensor, t: Tensor) -> Tensor:
        assert noised.dtype == torch.float32
        assert (t.dtype, t.shape) == (torch.int64, (3,))
        told.append(t.tolist())
        return torch.zeros_like(noised, dtype=torch.bfloat16)

    shape, settings = (3, 2, 4, 5), with_steps(settings, 4)
    drawn = sample(process, denoise, shape, seeded(), settings, progress=lambda *counts: heard.append(counts))
    assert (drawn.dtype, drawn.shape) == (torch.float32, shape)
    assert told == [[t] * 3 for t in (999, 749, 499, 249)]
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("settings", SAMPLERS, ids=lambda s: f"{s.sampler}-{s.eta:g}")
def test_limits_hold_for_each_channel_and_nothing_is_clipped_without(settings: SamplerSettings) -> None:
    process = diffusion(prediction="sample")
    limits = torch.tensor([-1.0, -np.inf]).reshape(2, 1, 1), torch.tensor([2.0, np.inf]).reshape(2, 1, 1)
    arguments = (process, lambda noised, _: torch.full_like(noised, 50.0), (1, 2, 3, 3), seeded())
    limited = sample(*arguments, with_steps(settings, 6), limits)
    torch.testing.assert_close(limited[0, 0], torch.full((3, 3), 2.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(limited[0, 1], torch.full((3, 3), 50.0), atol=1e-2, rtol=0)
    torch.testing.assert_close(sample(*arguments, with_steps(settings, 6))[0, 0], limited[0, 1], atol=1e-2, rtol=0)


def test_the_diffusions_own_schedule_is_left_alone() -> None:
    process = diffusion()
    before = process.alpha_bar.clone()
    sample(process, predicting(process, best_estimate), (1, 4), seeded(), SamplerSettings("ddpm", 10))
    assert torch.equal(process.alpha_bar, before)
    assert len(process.alpha_bar) == 1000


@pytest.mark.parametrize(
    "arguments", [{"sampler": "euler"}, {"steps": 0}, {"eta": -0.1}, {"eta": 1.5}, {"sampler": "ddpm", "eta": 0.5}]
)
def test_wrong_settings(arguments: dict) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        SamplerSettings(**arguments)


def test_more_steps_than_the_diffusion_has() -> None:
    process = diffusion(timesteps=10)
    with pytest.raises(ValueError, match=r"11 steps are not within 1\.\.10"):
        sample(process, predicting(process, best_estimate), (1, 2), seeded(), SamplerSettings(steps=11))
