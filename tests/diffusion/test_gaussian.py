"""The forward process against the closed form of the papers, restated in numpy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.schedulers import DDPMScheduler

from diffseg_nnunet.diffusion.gaussian import DiffusionSettings, GaussianDiffusion, masked_mean_square_error

T = 1000
SCHEDULES = ("linear_beta", "scaled_linear_beta", "sigmoid_beta", "cosine")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
STEPS = torch.tensor([0, 1, 100, 500, 998, 999])


def alpha_bar(schedule: str) -> np.ndarray:
    """ᾱ_t in float64: arXiv 2006.11239 (linear), 2112.10752 (scaled linear), 2102.09672 eq. 17 (cosine)."""
    first, last = 1e-4, 0.02
    if schedule == "linear_beta":
        beta = np.linspace(first, last, T)
    elif schedule == "scaled_linear_beta":
        beta = np.linspace(np.sqrt(first), np.sqrt(last), T) ** 2
    elif schedule == "sigmoid_beta":
        beta = first + (last - first) / (1 + np.exp(-np.linspace(-6, 6, T)))
    else:
        f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
    return np.cumprod(1 - beta)


def diffusion(schedule: str = "linear_beta", prediction: str = "epsilon") -> GaussianDiffusion:
    return GaussianDiffusion(DiffusionSettings(schedule=schedule, prediction=prediction))


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
    expected = np.mean((prediction[inside] - target[inside]) ** 2) if inside.any() else 0.0
    found = masked_mean_square_error(*(torch.from_numpy(a) for a in (prediction, target, mask)))
    assert found.item() == pytest.approx(expected, rel=1e-4)
    # what lies in the padding has no say, however large it is
    prediction[~inside] = 1e6
    again = masked_mean_square_error(*(torch.from_numpy(a) for a in (prediction, target, mask)))
    assert again.item() == found.item()


def test_masked_mean_square_error_of_no_voxel_is_zero() -> None:
    ones = torch.ones(1, 1, 2, 2)
    assert masked_mean_square_error(ones, -ones, torch.zeros(1, 1, 2, 2, dtype=torch.bool)).item() == 0


def test_masked_mean_square_error_is_computed_in_float32() -> None:
    """A sum of squares in bfloat16 would stop growing at 256."""
    ones = torch.ones(1, 1, 64, 64, dtype=torch.bfloat16)
    error = masked_mean_square_error(ones, torch.zeros_like(ones), torch.ones(1, 1, 64, 64, dtype=torch.bool))
    assert error.dtype == torch.float32
    assert error.item() == 1
