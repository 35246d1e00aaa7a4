"""What the network makes of one validation patch: clean, noised, denoised, and where it thinks each voxel lies."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffseg_nnunet.report.denoising import Panel, denoising_png
from diffseg_nnunet.training.precision import autocast

if TYPE_CHECKING:
    from .pretrainer import DiffSegPretrainer

SIGNAL_LEFT, PATCHES = 0.5, 2


@torch.no_grad()
def draw_progress(trainer: DiffSegPretrainer, batch: dict, path: Path) -> None:
    """Write a PNG of the middle slices of a batch's first patches, by the averaged weights.

    Args:
        trainer: with an initialised network.
        batch: of the validation loader.
        path: the file.
    """
    denoiser = trainer.denoiser.uncompiled
    clean = batch["data"][:PATCHES].to(trainer.device)
    t = (denoiser.diffusion.alpha_bar - SIGNAL_LEFT).abs().argmin().to(trainer.device).expand(len(clean))
    generator = torch.Generator(device=trainer.device).manual_seed(0)
    noised = denoiser.diffusion.add_noise(clean, torch.randn(clean.shape, generator=generator, device=clean.device), t)
    with ExitStack() as averaged, autocast(trainer.device, trainer._compute_dtype()):
        for phase in trainer.phases:
            averaged.enter_context(phase.ema.applied())
        denoised = denoiser.denoised(noised, t, denoiser.coordinate_map(clean))
        coordinates = trainer.assembly.coordinate_map(clean)
    rows = []
    for sample in range(len(clean)):
        row = [
            Panel(f"{batch['keys'][sample]}, clean", _slice(clean[sample])),
            Panel(f"noised, ᾱ = {SIGNAL_LEFT:g}", _slice(noised[sample])),
            Panel("denoised", _slice(denoised[sample])),
        ]
        if coordinates is not None:
            row.append(Panel("coordinates", _slice(coordinates[sample], channels=3)))
        rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    denoising_png(path, rows, f"epoch {trainer.current_epoch - 1}")


def _slice(volume: Tensor, channels: int = 1):
    """The middle slice of the first channel, (h, w), or of three channels, (h, w, 3), as float32 numpy."""
    volume = volume[:channels].float().cpu()
    if volume.ndim == 4:
        volume = volume[:, volume.shape[1] // 2]
    return (volume[0] if channels == 1 else volume.movedim(0, -1)).numpy()
