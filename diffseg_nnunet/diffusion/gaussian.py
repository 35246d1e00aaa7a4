"""Gaussian diffusion of images: the schedule, the noised image, the target, the loss.

Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239; as a pretraining task of a 3D network:
arXiv 2501.19265. MONAI's schedulers supply the noise schedules and the forward process.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from monai.networks.schedulers import DDPMScheduler
from torch import Tensor

Schedule = Literal["linear_beta", "scaled_linear_beta", "sigmoid_beta", "cosine"]
Prediction = Literal["epsilon", "sample", "v_prediction"]
LossWeighting = Literal["uniform", "min_snr"]
SCHEDULES, PREDICTIONS, LOSS_WEIGHTINGS = get_args(Schedule), get_args(Prediction), get_args(LossWeighting)

_REFERENCE_TIMESTEPS = 1000
_BETAS = (1e-4, 0.02)
TIMESTEP_BINS = 5
"""Parts of 0..T-1 for which the loss is reported apart."""


@dataclass(frozen=True)
class DiffusionSettings:
    """Settings of the Gaussian diffusion. Every value is a [default] of ours unless a source is named.

    Attributes:
        timesteps: T of the forward process (arXiv 2006.11239).
        schedule: name of MONAI's noise schedule; "linear_beta" runs from 1e-4 to 0.02 (arXiv 2006.11239). With T other
            than 1000 the β of all but "cosine" are scaled by 1000 / T (arXiv 2102.09672), so that nothing of the image
            is left at T.
        prediction: what the network predicts: the noise, the clean image, or the velocity (arXiv 2202.00512).
        loss_weighting: "uniform" (arXiv 2006.11239 eq. 14) or "min_snr" (arXiv 2303.09556).
        min_snr_gamma: γ of min-SNR-γ.
        fold_timestep: the time step at which the conditioning is folded into the network (0..timesteps-1); small, since
            fine-tuning reads clean images, and not 0, where nothing had to be recognised to denoise.
    """

    timesteps: int = 1000
    schedule: Schedule = "linear_beta"
    prediction: Prediction = "epsilon"
    loss_weighting: LossWeighting = "uniform"
    min_snr_gamma: float = 5.0
    fold_timestep: int = 100

    def __post_init__(self) -> None:
        for value, choices in (
            (self.schedule, SCHEDULES),
            (self.prediction, PREDICTIONS),
            (self.loss_weighting, LOSS_WEIGHTINGS),
        ):
            if value not in choices:
                raise ValueError(f"{value} is none of {', '.join(choices)}")
        if self.min_snr_gamma <= 0:
            raise ValueError(f"min_snr_gamma {self.min_snr_gamma} is not positive")
        if not 0 <= self.fold_timestep < self.timesteps:
            raise ValueError(f"fold_timestep {self.fold_timestep} is not within 0..{self.timesteps - 1}")

    @property
    def schedule_arguments(self) -> dict[str, float]:
        """Arguments of MONAI's schedule beside T."""
        if self.schedule == "cosine":
            return {}
        first, last = (beta * _REFERENCE_TIMESTEPS / self.timesteps for beta in _BETAS)
        return {"beta_start": min(first, 0.999), "beta_end": min(last, 0.999)}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class GaussianDiffusion:
    """The forward process q(x_t | x_0) = N(sqrt(ᾱ_t) x_0, (1 - ᾱ_t) I) and the regression target of the denoiser."""

    def __init__(self, settings: DiffusionSettings):
        self.settings = settings
        self._scheduler = DDPMScheduler(
            num_train_timesteps=settings.timesteps,
            schedule=settings.schedule,
            prediction_type=settings.prediction,
            clip_sample=False,
            **settings.schedule_arguments,
        )

    @property
    def alpha_bar(self) -> Tensor:
        """ᾱ_t for t = 0..T-1: float32, shape (T,); the share of the signal's variance that is left."""
        return self._scheduler.alphas_cumprod

    def sample_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` time steps, uniform over 0..T-1: int64, shape (count,), on the generator's device."""
        return torch.randint(0, self.settings.timesteps, (count,), generator=generator, device=generator.device)

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of shape (B, C, ...), float32, from x_0 and noise of that shape and time steps of shape (B,)."""
        # always float32: MONAI casts its schedule to the image's type, and keeps what was rounded for all later calls
        return self._scheduler.add_noise(clean.float(), noise.float(), t)

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network has to predict, same shape as `clean`."""
        if self.settings.prediction == "epsilon":
            return noise
        if self.settings.prediction == "sample":
            return clean
        return self._scheduler.get_velocity(clean.float(), noise.float(), t)

    def clean(self, prediction: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """x_0 by the network's prediction at x_t: float32, same shape; t of shape (B,)."""
        left = _per_sample(self.signal_left(t), noised.ndim)
        prediction, noised = prediction.float(), noised.float()
        if self.settings.prediction == "epsilon":
            return (noised - (1 - left).sqrt() * prediction) / left.sqrt()
        if self.settings.prediction == "sample":
            return prediction
        return left.sqrt() * noised - (1 - left).sqrt() * prediction

    def signal_left(self, t: Tensor) -> Tensor:
        """ᾱ_t on the device of `t`, shape (B,): the weight of what can still be told from a noised image."""
        return self.alpha_bar.to(t.device)[t]

    def loss_weight(self, t: Tensor) -> Tensor:
        """Weight of a sample's squared error at its time step, float32, shape (B,).

        Min-SNR-γ (arXiv 2303.09556 §3.4) limits the weight in terms of x_0 to γ: min(SNR, γ) for x_0, divided by SNR
        for ε and by SNR + 1 for the velocity.
        """
        if self.settings.loss_weighting == "uniform":
            return torch.ones(len(t), device=t.device)
        left = self.signal_left(t)
        snr = left / (1 - left)
        limited = snr.clamp_max(self.settings.min_snr_gamma)
        if self.settings.prediction == "epsilon":
            # min(SNR, γ) / SNR, without 0 / 0 where a schedule leaves no signal
            return (self.settings.min_snr_gamma / snr.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1.0)
        return limited if self.settings.prediction == "sample" else limited / (snr + 1)

    def timestep_bin(self, t: Tensor) -> Tensor:
        """Which of :data:`TIMESTEP_BINS` equal parts of 0..T-1 each time step lies in: int64, shape (B,)."""
        return t * TIMESTEP_BINS // self.settings.timesteps


def masked_mean_square_error(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of each sample over the voxels of `mask`: float32, shape (B,).

    Args:
        prediction, target: shape (B, C, ...), any floating dtype; computed in float32.
        mask: bool, shape (B, 1, ...), True where a voxel lies inside the scan (padding is no data).
    """
    squared = (prediction.float() - target.float()).square() * mask
    return squared.flatten(1).sum(1) / (mask.flatten(1).sum(1) * prediction.shape[1]).clamp_min(1)


def _per_sample(values: Tensor, dimensions: int) -> Tensor:
    return values.reshape(-1, *(1,) * (dimensions - 1))
