"""Sampling: from noise to an image with a denoiser, by DDPM (arXiv 2006.11239 alg. 2) or DDIM (arXiv 2010.02502).

MONAI's schedulers do the steps, on a respaced schedule (arXiv 2102.09672 §4): of the T time steps n are kept, and their
ᾱ are a chain of n steps of its own, whose step k comes from k + 1 and whose last ends at ᾱ = 1. On the schedule of all
T steps MONAI's DDIM would look for a predecessor that its own list of time steps does not hold, and its DDPM would
always go to t - 1; on the respaced one both are right for every n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from monai.networks.schedulers.scheduler import NoiseSchedules
from torch import Tensor

from diffseg_nnunet.diffusion.gaussian import GaussianDiffusion

Sampler = Literal["ddim", "ddpm"]
SAMPLERS = get_args(Sampler)
Denoise = Callable[[Tensor, Tensor], Tensor]
"""From x_t, float32 (B, C, ...), and t, int64 (B,), to what the diffusion predicts, of the shape of x_t."""
Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

_RESPACED = "diffseg_respaced"


@NoiseSchedules.add_def(_RESPACED, "ᾱ as given, shape (num_train_timesteps,)")
def _respaced(num_train_timesteps: int, alpha_bar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(β, α, ᾱ) of the chain that has these ᾱ, float32; in float64 in between, since small β are differences."""
    exact = alpha_bar.double()
    alpha = exact / torch.cat([exact.new_ones(1), exact[:-1]])
    return (1 - alpha).float(), alpha.float(), alpha_bar


@dataclass(frozen=True)
class SamplerSettings:
    """How to sample.

    Attributes:
        sampler: "ddim", or "ddpm", ancestral sampling with the posterior's variance.
        steps: n, from 1 to the diffusion's T.
        eta: of DDIM: 0 is deterministic, 1 the ancestral sampling of DDPM (arXiv 2010.02502 eq. 16).
    """

    sampler: Sampler = "ddim"
    steps: int = 50
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"{self.sampler} is none of {', '.join(SAMPLERS)}")
        if self.steps < 1:
            raise ValueError(f"{self.steps} steps are fewer than one")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta {self.eta} is not within 0..1")
        if self.sampler == "ddpm" and self.eta:
            raise ValueError("eta is a setting of ddim")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sampling_timesteps(timesteps: int, steps: int) -> list[int]:
    """`steps` of the time steps T-1..0, falling, from T-1 on, as even as can be (arXiv 2305.08891 §3.3, "trailing").

    Raises:
        ValueError: `steps` is not within 1..T.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"{steps} steps are not within 1..{timesteps}")
    return [timesteps * k // steps - 1 for k in range(steps, 0, -1)]


@torch.no_grad()
def sample(
    diffusion: GaussianDiffusion,
    denoise: Denoise,
    shape: Sequence[int],
    generator: torch.Generator,
    settings: SamplerSettings | None = None,
    limits: tuple[Tensor, Tensor] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Draw images.

    Args:
        diffusion: the forward process the denoiser was trained with.
        denoise: predicts at x_t and t.
        shape: (B, C, ...).
        generator: of all noise; the images lie on its device.
        settings: None: DDIM in 50 steps.
        limits: smallest and largest value of the data, each broadcastable to `shape`; estimates of x_0 are clipped to
            them. None for no clipping.
        progress: told after every step.

    Returns:
        x_0, float32.

    Raises:
        ValueError: more steps than the diffusion has.
    """
    settings = settings or SamplerSettings()
    kept = sampling_timesteps(diffusion.settings.timesteps, settings.steps)
    scheduler, options = _scheduler(diffusion, kept, settings, limits, generator.device)
    x = torch.randn(tuple(shape), generator=generator, device=generator.device)
    for done, t in enumerate(kept, start=1):
        prediction = denoise(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device))
        # MONAI draws the noise in the prediction's type, which under autocast is not float32
        x, _ = scheduler.step(prediction.float(), settings.steps - done, x, generator=generator, **options)
        if progress is not None:
            progress(done, settings.steps)
    return x


def _scheduler(
    diffusion: GaussianDiffusion,
    kept: Sequence[int],
    settings: SamplerSettings,
    limits: tuple[Tensor, Tensor] | None,
    device: torch.device,
) -> tuple[DDIMScheduler | DDPMScheduler, dict[str, float]]:
    """The scheduler of the respaced chain, whose steps are numbered n-1..0, and the options of its steps."""
    low, high = (None, None) if limits is None else (limit.float().to(device) for limit in limits)
    arguments = {
        "num_train_timesteps": settings.steps,
        "schedule": _RESPACED,
        "alpha_bar": diffusion.alpha_bar.float().cpu()[list(reversed(kept))],
        "prediction_type": diffusion.settings.prediction,
        "clip_sample": limits is not None,
        "clip_sample_min": low,
        "clip_sample_max": high,
    }
    if settings.sampler == "ddpm":
        return DDPMScheduler(**arguments), {}
    return DDIMScheduler(**arguments), {"eta": settings.eta}
