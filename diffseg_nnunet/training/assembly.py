"""The parts of a pretraining put together: the denoiser, what conditions it, and what tells place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffseg_nnunet.coordinates.guidance import widen_input
from diffseg_nnunet.coordinates.head import CoordinateHead, FeatureTap, head_on
from diffseg_nnunet.diffusion.conditioning import TimeConditioning
from diffseg_nnunet.diffusion.gaussian import GaussianDiffusion
from diffseg_nnunet.training.objective import Denoiser
from diffseg_nnunet.training.settings import PretrainingSettings


@dataclass(frozen=True)
class Assembly:
    """What is trained.

    Attributes:
        denoiser: of images.
        head, tap: the coordinate head on the denoiser's decoder; None in modes without.
    """

    denoiser: Denoiser
    head: CoordinateHead | None
    tap: FeatureTap | None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What the denoising phase trains, by the names in the checkpoint."""
        modules = {"network": self.denoiser.network, "conditioning": self.denoiser.conditioning}
        return modules if self.head is None else {**modules, "coordinate_head": self.head}

    def coordinate_map(self, clean: Tensor) -> Tensor | None:
        """Coordinates of every voxel of clean patches (B, C, ...): float32 (B, 3, ...), in units of 300 mm, along the
        patient's left, posterior and superior; None in mode "none"."""
        if self.head is None:
            dense = self.denoiser.coordinate_map(clean)
            return None if dense is None else dense.float()
        t = torch.full((len(clean),), self.denoiser.diffusion.settings.fold_timestep, device=clean.device)
        self.denoiser.uncompiled(clean, t)
        return self.head.dense(self.tap.take(), clean.shape[2:])


def assemble(
    network: nn.Module,
    regressor: nn.Module | None,
    settings: PretrainingSettings,
    device: torch.device,
    compiled: nn.Module | None = None,
) -> Assembly:
    """Put the parts around the planned network, in place: it is widened where a regressor guides it.

    Args:
        network: the planned one, with as many outputs as image channels.
        regressor: of coordinates, in mode "guidance".
        settings: of the pretraining.
        device: where everything lies.
        compiled: the network by torch.compile, not run yet; None without.
    """
    if regressor is not None:
        widen_input(network)
    conditioning = _moved(TimeConditioning(network), device)
    denoiser = Denoiser(network, conditioning, GaussianDiffusion(settings.diffusion), regressor, compiled)
    if settings.coordinates.mode != "auxiliary":
        return Assembly(denoiser, None, None)
    head, tap = head_on(network, statistics=settings.coordinates.patch_statistics)
    return Assembly(denoiser, _moved(head, device), tap)


def _moved(module: nn.Module, device: torch.device) -> nn.Module:
    """On the device; untouched where it is there already, since fake parameters cannot be moved."""
    return module if all(p.device == device for p in module.parameters()) else module.to(device)
