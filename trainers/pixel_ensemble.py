"""Independent perceptrons on the frozen features of single voxels, which vote (Baranchuk et al., arXiv 2112.03126)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from diffseg_nnunet.coordinates.head import gather_voxels
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.probing.ensemble import MEMBERS, VotingHead, draw_voxels
from diffseg_nnunet.training.precision import autocast
from diffseg_nnunet.training.seeding import derived_seed
from diffseg_nnunet.training.settings import PixelEnsembleSettings, Strategy, TrainingSettings

from .base import NOISE_STREAM
from .probes import ProbeTrainer

VOXELS = 256
"""Of each patch, for each perceptron and iteration [default]; a batch of Baranchuk et al.'s code has 64."""
_GRADIENT_CLIP = 12  # nnU-Net's


class DiffSegTrainerPixelEnsemble(ProbeTrainer):
    """Each perceptron is trained on voxels of its own by nnU-Net's loss; the classes are voted for.

    Baranchuk et al. keep all pixels of all images in memory; here they are drawn from the patches nnU-Net loads.
    """

    settings: PixelEnsembleSettings
    settings_type: type[TrainingSettings] = PixelEnsembleSettings
    strategy: Strategy = "pixel-ensemble"
    votes = True

    @staticmethod
    def build_head(channels: Sequence[int], passes: int, classes: int, dimensions: int) -> nn.Module:
        return VotingHead(channels, classes)

    def initialize(self) -> None:
        if self.label_manager.has_regions:
            raise BadInputError(
                f"{self.plans_manager.dataset_name} has regions, which overlap: a voxel's votes need one class each.",
                "Train with --strategy linear or nonlinear.",
            )
        super().initialize()

    def train_step(self, batch: dict) -> dict:
        data, target = (batch[name].to(self.device, non_blocking=True) for name in ("data", "target"))
        key = derived_seed(self.settings.seed, NOISE_STREAM, self._iteration, self.rank)
        generator = torch.Generator(device=self.device).manual_seed(key)
        voxels = draw_voxels(target, MEMBERS, VOXELS, generator, self.label_manager.ignore_label)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, torch.float16 if self.device.type == "cuda" else self._autocast_dtype):
            logits = self.network(data, voxels)
        # one loss each: a Dice over the votes of all would make them learn together
        losses = [self.loss(own, gather_voxels(target, at).mT) for own, at in zip(logits, voxels, strict=True)]
        loss = torch.stack(losses).mean()
        loss.backward()  # the perceptrons compute in float32, so there are no gradients to scale
        nn.utils.clip_grad_norm_(self.network.parameters(), _GRADIENT_CLIP)
        self.optimizer.step()
        self._report_iteration()
        return {"loss": loss.detach().cpu().numpy()}
