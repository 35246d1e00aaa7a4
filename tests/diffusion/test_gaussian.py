"""The forward process against the closed form of the papers, restated in numpy."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.schedulers import DDPMScheduler

from diffseg_nnunet.diffusion.gaussian import (
    TIMESTEP_BINS,
    DiffusionSettings,
    GaussianDiffusion,
    masked_mean_square_error,
)

T = 1000
SCHEDULES = ("linear_beta", "scaled_linear_beta", "sigmoid_beta", "cosine")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
STEPS = torch.tensor([0, 1, 100, 500, 998, 999])


def betas(schedule: str, timesteps: int = T) -> np.ndarray:
    """β_t in float64: arXiv 2006.11239 (linear), 2112.10752 (scaled linear), 2102.09672 eq. 17 (cosine).

    With fewer steps each takes away as much more (improved-diffusion's ``get_named_beta_schedule``, arXiv 2102.09672).
    """
    first, last = (min(beta * 1000 / timesteps, 0.999) for beta in (1e-4, 0.02))
    if schedule == "linear_beta":
        return np.linspace(first, last, timesteps)
    if schedule == "scaled_linear_beta":
        return np.linspace(np.sqrt(first), np.sqrt(last), timesteps) ** 2
    if schedule == "sigmoid_beta":
        return first + (last - first) / (1 + np.exp(-np.linspace(-6, 6, timesteps)))
    f = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


def alpha_bar(schedule: str, timesteps: int = T) -> np.ndarray:
    return np.cumprod(1 - betas(schedule, timesteps))


def diffusion(schedule: str = "linear_beta", prediction: str = "epsilon", **changes: Any) -> GaussianDiffusion:
    return GaussianDiffusion(DiffusionSettings(schedule=schedule, prediction=prediction, **changes))


def clean_and_noise(count: int = len(STEPS), channels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn((2, count, channels, 3, 4, 5), generator=generator)
    return clean, noise


def per_sample(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alpha_bar(schedule: str) -> None:
    found = diffusion(schedule).alpha_bar
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), alpha_bar(schedule), rtol=2e-4, atol=1e-6)
    assert (found.diff() < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [50, 200, 1000, 4000])
def test_any_number_of_steps_ends_in_noise(schedule: str, timesteps: int) -> None:
    found = diffusion(schedule, timesteps=timesteps, fold_timestep=0).alpha_bar
    assert found.shape == (timesteps,)
    np.testing.assert_allclose(found.numpy(), alpha_bar(schedule, timesteps), rtol=5e-3, atol=1e-6)
    assert (found.diff() < 0).all()
    assert found[0] > 0.9
    # the paper's own 1000 linear steps leave 4e-5, those of the scaled linear schedule 0.005
    assert 0 <= found[-1] < 0.006


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_of_few_steps_is_that_of_many(schedule: str) -> None:
    """At the same share of the way, the same is left of the image, so a fold time step keeps its meaning."""
    few, many = (diffusion(schedule, timesteps=steps, fold_timestep=0).alpha_bar for steps in (250, 1000))
    torch.testing.assert_close(few, many[3::4], atol=5e-3, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noised_image_is_the_closed_form(schedule: str) -> None:
    clean, noise = clean_and_noise()
    left = per_sample(alpha_bar(schedule)[STEPS])
    expected = np.sqrt(left) * clean.numpy() + np.sqrt(1 - left) * noise.numpy()
    np.testing.assert_allclose(diffusion(schedule).add_noise(clean, noise, STEPS).numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets(schedule: str, prediction: str) -> None:
    clean, noise = clean_and_noise()
    left = per_sample(alpha_bar(schedule)[STEPS])
    expected = {
        "epsilon": noise.numpy(),
        "sample": clean.numpy(),
        "v_prediction": np.sqrt(left) * noise.numpy() - np.sqrt(1 - left) * clean.numpy(),
    }[prediction]
    found = diffusion(schedule, prediction).target(clean, noise, STEPS)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_monai_recovers_the_clean_image_from_a_perfect_prediction(schedule: str, prediction: str) -> None:
    clean, noise = clean_and_noise()
    process = diffusion(schedule, prediction)
    noised, target = process.add_noise(clean, noise, STEPS), process.target(clean, noise, STEPS)
    sampler = DDPMScheduler(T, schedule, prediction_type=prediction, clip_sample=False)
    for index, t in enumerate(STEPS.tolist()):
        if process.alpha_bar[t] < 1e-3 and prediction == "epsilon":
            continue  # division by a signal that is not there
        _, recovered = sampler.step(target[index : index + 1], t, noised[index : index + 1])
        torch.testing.assert_close(recovered[0], clean[index], atol=2e-3, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clean_image_is_recovered_from_a_perfect_prediction(schedule: str, prediction: str) -> None:
    clean, noise = clean_and_noise()
    process = diffusion(schedule, prediction)
    noised = process.add_noise(clean, noise, STEPS)
    found = process.clean(process.target(clean, noise, STEPS), noised, STEPS)
    assert found.dtype == torch.float32
    legible = process.alpha_bar[STEPS] > (1e-3 if prediction == "epsilon" else -1)
    assert legible.sum() >= 4
    torch.testing.assert_close(found[legible], clean[legible], atol=2e-3, rtol=0)


def test_clean_image_is_computed_in_float32() -> None:
    process, (clean, noise) = diffusion(), clean_and_noise()
    noised, t = process.add_noise(clean, noise, STEPS), torch.full((len(STEPS),), 500)
    found = process.clean(noise.bfloat16(), noised.bfloat16(), t)
    assert torch.equal(found, process.clean(noise.bfloat16().float(), noised.bfloat16().float(), t))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_posterior_of_the_estimate_is_monais_step(prediction: str) -> None:
    """q(x_{t-1} | x_t, x_0) of arXiv 2006.11239 eq. 7, with x_0 as predicted, is where MONAI's sampler goes on."""
    generator, beta, left = torch.Generator().manual_seed(0), betas("linear_beta"), alpha_bar("linear_beta")
    process = diffusion(prediction=prediction)
    sampler = DDPMScheduler(T, "linear_beta", prediction_type=prediction, clip_sample=False)
    for t in (1, 100, 500, 900):
        noised, predicted = torch.randn((2, 1, 1, 6, 5, 4), generator=generator)
        x_0 = process.clean(predicted, noised, torch.tensor([t])).numpy()
        mean = (np.sqrt(left[t - 1]) * beta[t] * x_0 + np.sqrt(1 - beta[t]) * (1 - left[t - 1]) * noised.numpy()) / (
            1 - left[t]
        )
        variance = (1 - left[t - 1]) / (1 - left[t]) * beta[t]
        drawn = torch.randn(noised.shape, generator=torch.Generator().manual_seed(t)).numpy()
        found, _ = sampler.step(predicted, t, noised, generator=torch.Generator().manual_seed(t))
        np.testing.assert_allclose(found.numpy(), mean + np.sqrt(variance) * drawn, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights(schedule: str, gamma: float) -> None:
    """The closed forms of arXiv 2303.09556 §3.4 (epsilon, x_0) and its appendix (velocity)."""
    t = torch.arange(T)
    snr = alpha_bar(schedule) / (1 - alpha_bar(schedule))
    limited = np.minimum(snr, gamma)
    expected = {"epsilon": limited / snr, "sample": limited, "v_prediction": limited / (snr + 1)}
    for prediction, weights in expected.items():
        found = diffusion(schedule, prediction, loss_weighting="min_snr", min_snr_gamma=gamma).loss_weight(t)
        assert found.dtype == torch.float32
        assert torch.isfinite(found).all()
        assert (found >= 0).all()
        np.testing.assert_allclose(found.numpy(), weights, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_uniform_weights(prediction: str) -> None:
    assert torch.equal(diffusion(prediction=prediction).loss_weight(STEPS), torch.ones(len(STEPS)))


@given(timesteps=st.integers(1, 3000), share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_bins_are_equal_parts_of_the_time_steps(timesteps: int, share: float) -> None:
    # the bins need no schedule: only T
    process = diffusion("cosine", timesteps=timesteps, fold_timestep=0)
    t = int(share * timesteps)
    assert process.timestep_bin(torch.tensor([t])).item() == int(np.floor(TIMESTEP_BINS * t / timesteps))


def test_bins_cover_all_time_steps() -> None:
    assert torch.equal(diffusion().timestep_bin(torch.arange(T)).bincount(), torch.full((TIMESTEP_BINS,), 200))


def test_noise_adds_up_over_the_chain() -> None:
    """ᾱ_t is what a step-by-step chain x_t = sqrt(1 - β) x + sqrt(β) ε leaves of a constant image."""
    process = diffusion()
    beta, generator = np.linspace(1e-4, 0.02, T), torch.Generator().manual_seed(1)
    x = torch.full((20_000,), 3.0)
    for step in range(300):
        x = np.sqrt(1 - beta[step]) * x + np.sqrt(beta[step]) * torch.randn(x.shape, generator=generator)
    left = float(process.alpha_bar[299])
    assert x.mean().item() == pytest.approx(3 * np.sqrt(left), abs=0.03)
    assert x.var().item() == pytest.approx(1 - left, rel=0.04)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_types_leave_the_schedule_alone(dtype: torch.dtype) -> None:
    process, (clean, noise) = diffusion(prediction="v_prediction"), clean_and_noise()
    before, noised = process.alpha_bar.clone(), process.add_noise(clean, noise, STEPS)
    process.add_noise(clean.to(dtype), noise.to(dtype), STEPS)
    process.target(clean.to(dtype), noise.to(dtype), STEPS)
    assert process.alpha_bar.dtype == torch.float32
    assert torch.equal(process.alpha_bar, before)
    assert torch.equal(process.add_noise(clean, noise, STEPS), noised)


def test_timesteps_are_uniform_over_all_steps() -> None:
    process = GaussianDiffusion(DiffusionSettings(timesteps=10, fold_timestep=0))
    t = process.sample_timesteps(20_000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64
    assert t.shape == (20_000,)
    counts = np.bincount(t.numpy(), minlength=10)
    assert len(counts) == 10
    # chi-squared with 9 degrees of freedom exceeds 27.9 once in a thousand
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9


def test_timesteps_follow_the_generator() -> None:
    process = diffusion()
    one, same, other = (process.sample_timesteps(50, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_signal_left() -> None:
    np.testing.assert_allclose(diffusion().signal_left(STEPS).numpy(), alpha_bar("linear_beta")[STEPS], rtol=2e-4)


@pytest.mark.parametrize("fold_timestep", [-1, 1000, 5000])
def test_settings_refuse_a_fold_timestep_outside_the_process(fold_timestep: int) -> None:
    with pytest.raises(ValueError, match=rf"{fold_timestep} is not within 0..999"):
        DiffusionSettings(fold_timestep=fold_timestep)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "quadratic"}, "quadratic is none of linear_beta, .*cosine"),
        ({"prediction": "noise"}, "noise is none of epsilon, sample, v_prediction"),
        ({"loss_weighting": "snr"}, "snr is none of uniform, min_snr"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma 0.0 is not positive"),
        ({"min_snr_gamma": -5.0}, "not positive"),
        ({"timesteps": 100}, "fold_timestep 100 is not within 0..99"),
    ],
)
def test_settings_refuse_what_is_not_there(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionSettings(**wrong)


def test_settings_survive_json() -> None:
    chosen = DiffusionSettings(timesteps=50, schedule="cosine", prediction="sample", fold_timestep=49)
    assert DiffusionSettings(**json.loads(json.dumps(chosen.to_json()))) == chosen


@given(seed=st.integers(0, 2**31), batch=st.integers(1, 3), channels=st.integers(1, 3), three_dimensional=st.booleans())
@settings(max_examples=30, deadline=None)
def test_masked_mean_square_error(seed: int, batch: int, channels: int, three_dimensional: bool) -> None:
    rng = np.random.default_rng(seed)
    spatial = (3, 4, 5) if three_dimensional else (4, 5)
    prediction, target = rng.normal(size=(2, batch, channels, *spatial)).astype(np.float32)
    mask = rng.random((batch, 1, *spatial)) < 0.5
    inside = np.broadcast_to(mask, prediction.shape)
    expected = [
        np.mean((p[i] - t[i]) ** 2) if i.any() else 0.0 for p, t, i in zip(prediction, target, inside, strict=True)
    ]
    found = masked_mean_square_error(*(torch.from_numpy(a) for a in (prediction, target, mask)))
    assert found.shape == (batch,)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
    # what lies in the padding has no say, however large it is
    prediction[~inside] = 1e6
    assert torch.equal(masked_mean_square_error(*(torch.from_numpy(a) for a in (prediction, target, mask))), found)


def test_masked_mean_square_error_of_no_voxel_is_zero() -> None:
    ones, mask = torch.ones(2, 1, 2, 2), torch.tensor([False, True]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert masked_mean_square_error(ones, -ones, mask).tolist() == [0, 4]


def test_masked_mean_square_error_is_computed_in_float32() -> None:
    """A sum of squares in bfloat16 would stop growing at 256."""
    ones = torch.ones(1, 1, 64, 64, dtype=torch.bfloat16)
    error = masked_mean_square_error(ones, torch.zeros_like(ones), torch.ones(1, 1, 64, 64, dtype=torch.bool))
    assert error.dtype == torch.float32
    assert error.item() == 1
