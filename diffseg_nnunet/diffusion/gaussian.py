"""Gaussian diffusion of images: the schedule, the noised image, the target, the loss.

Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239; as a pretraining task of a 3D network:
arXiv 2501.19265. MONAI's schedulers supply the noise schedules and the forward process.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from monai.networks.schedulers import DDPMScheduler
from torch import Tensor

Schedule = Literal["linear_beta", "scaled_linear_beta", "sigmoid_beta", "cosine"]
Prediction = Literal["epsilon", "sample", "v_prediction"]


@dataclass(frozen=True)
class DiffusionSettings:
    """Settings of the Gaussian diffusion. Every value is a [default] of ours unless a source is named.

    Attributes:
        timesteps: T of the forward process (arXiv 2006.11239).
        schedule: name of MONAI's noise schedule; "linear_beta" runs from 1e-4 to 0.02 (arXiv 2006.11239).
        prediction: what the network predicts: the noise, the clean image, or the velocity (arXiv 2202.00512).
        fold_timestep: the time step at which the conditioning is folded into the network (0..timesteps-1); small, since
            fine-tuning reads clean images, and not 0, where nothing had to be recognised to denoise.
    """

    timesteps: int = 1000
    schedule: Schedule = "linear_beta"
    prediction: Prediction = "epsilon"
    fold_timestep: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.fold_timestep < self.timesteps:
            raise ValueError(f"fold_timestep {self.fold_timestep} is not within 0..{self.timesteps - 1}")

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

    def signal_left(self, t: Tensor) -> Tensor:
        """ᾱ_t on the device of `t`, shape (B,): the weight of what can still be told from a noised image."""
        return self.alpha_bar.to(t.device)[t]


def masked_mean_square_error(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the voxels of `mask`, the unweighted loss of arXiv 2006.11239 eq. 14: a scalar.

    Args:
        prediction, target: shape (B, C, ...), any floating dtype; computed in float32.
        mask: bool, shape (B, 1, ...), True where a voxel lies inside the scan (padding is no data).
    """
    squared = (prediction.float() - target.float()).square() * mask
    return squared.sum() / (mask.sum() * prediction.shape[1]).clamp_min(1)
