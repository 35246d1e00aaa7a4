"""Probes of a pretrained network: it stays frozen, and a small head on its features is trained by nnU-Net's recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import Tensor, nn

from diffseg_nnunet.inference.pretrained import load_pretrained, weights_at
from diffseg_nnunet.planning.hardware import available_memory_gib
from diffseg_nnunet.probing.cache import FeatureCache
from diffseg_nnunet.probing.heads import LinearHead, NonlinearHead
from diffseg_nnunet.probing.network import ProbedNetwork
from diffseg_nnunet.training import checkpoint as checkpoints
from diffseg_nnunet.training import processes
from diffseg_nnunet.training.adaptation import Adaptation
from diffseg_nnunet.training.settings import ProbingSettings, Strategy, TrainingSettings

from .base import unwrapped
from .loaders import RecurringLoader, SeededLoader
from .segmentation import SegmentationTrainer

_CACHE_SHARE = 0.25
"""Of the memory that is free, for features. [default]"""


class ProbeTrainer(SegmentationTrainer):
    """What all probes share; without deep supervision, since the head has one output.

    The checkpoint's ``network_weights`` hold the frozen network under its stock keys, and the head beside it.
    """

    settings: ProbingSettings
    settings_type: type[TrainingSettings] = ProbingSettings
    frozen = ("encoder", "decoder")
    is_stock = False

    @staticmethod
    def build_head(channels: Sequence[int], passes: int, classes: int, dimensions: int) -> nn.Module:
        """The head on a pyramid with `channels` at each scale, coarse to fine, joined of `passes` runs."""
        raise NotImplementedError

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> ProbedNetwork:
        """The planned network with the head; a class method, so that each probe is built by its own name alone."""
        planned = SegmentationTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=False
        )
        patch_size = configuration_manager.patch_size

        def build_head(channels: Sequence[int], passes: int) -> nn.Module:
            return cls.build_head(channels, passes, num_output_channels, len(patch_size))

        return ProbedNetwork(planned, build_head, num_input_channels, patch_size)

    def apply(self, settings: TrainingSettings) -> None:
        super().apply(settings)
        self.enable_deep_supervision = False

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Nothing: the frozen network's own outputs are not used."""

    @property
    def planned_network(self) -> nn.Module:
        return unwrapped(self.network).planned

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        # nnU-Net builds networks without knowing any settings
        network = unwrapped(self.network)
        network.configure(self.settings.probe)
        if not self.augments:
            share = _CACHE_SHARE * available_memory_gib() / processes.local_world_size()
            network.cache = FeatureCache(share * 2**30)
        return super().configure_optimizers()

    @property
    def augments(self) -> bool:
        return self.settings.augment

    def _training_loader(self, dataset: Any) -> Callable[..., SeededLoader]:
        return super()._training_loader(dataset) if self.augments else RecurringLoader

    def _choose_dtype(self, sample: Tensor) -> tuple[torch.dtype | None, str]:
        self.network.eval()  # the head's norms have a state, which a comparison must not change
        return super()._choose_dtype(sample)

    def start_from(self, weights: Mapping[str, Tensor], source: str) -> int:
        count = super().start_from(weights, source)
        self._take_time_steps(source)
        return count

    def adapt_from(self, weights: Mapping[str, Tensor], source: str) -> Adaptation:
        if self.settings.probe.time_steps:  # norm weights of other time steps are not adapted
            checkpoints.require_same_network(self.planned_network.state_dict(), weights, source)
        adaptation = super().adapt_from(weights, source)
        self._take_time_steps(source)
        return adaptation

    def _take_time_steps(self, source: str) -> None:
        """What the network is at further time steps, from the pretraining's checkpoint itself."""
        steps = self.settings.probe.time_steps
        if steps:
            model = load_pretrained(source, self.device)
            folded = weights_at(model, steps, source)
            signal_left = model.assembly.denoiser.diffusion.alpha_bar[list(steps)]
            unwrapped(self.network).time_steps.take(folded, signal_left)


class DiffSegTrainerLinear(ProbeTrainer):
    """vox2vec's linear probe: one linear classifier of the frozen features (arXiv 2307.14725)."""

    strategy: Strategy = "linear"

    @staticmethod
    def build_head(channels: Sequence[int], passes: int, classes: int, dimensions: int) -> nn.Module:
        return LinearHead(channels, classes, dimensions)


class DiffSegTrainerNonlinear(ProbeTrainer):
    """vox2vec's non-linear probe: a kernel-1 decoder of the frozen features (arXiv 2307.14725)."""

    strategy: Strategy = "nonlinear"

    @staticmethod
    def build_head(channels: Sequence[int], passes: int, classes: int, dimensions: int) -> nn.Module:
        return NonlinearHead(channels, [count // passes for count in channels], classes, dimensions)
