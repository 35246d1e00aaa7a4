"""A frozen planned network and a head on its feature pyramid, as one module that nnU-Net can train, save and predict
with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from diffseg_nnunet.coordinates.head import FeatureTap
from diffseg_nnunet.probing.cache import FeatureCache
from diffseg_nnunet.probing.settings import ProbeSettings
from diffseg_nnunet.probing.time_steps import TimeSteps

BuildHead = Callable[[Sequence[int], int], nn.Module]
"""From the channels of each scale, coarse to fine, and the number of passes they are joined of, to the head."""


class ProbedNetwork(nn.Module):
    """Logits of a head that reads a frozen network.

    The state dict holds the network under its own keys, the head under ``head.``, the conditioning on further time
    steps under ``time_steps.``, and the settings as extra state. Loading it takes over the settings first, so one that
    was built with others, as nnU-Net's predictor builds it, becomes the one that was saved.

    Args:
        network: with ``encoder`` and ``decoder``; its output layers are not used. It is frozen.
        build_head: makes the head for some settings.
        channels: of the image.
        patch_size: that the network reads, 2 or 3 axes.
        settings: of the features.

    Attributes:
        cache: of features while the head is trained; None: they are computed every time.
    """

    cache: FeatureCache | None = None

    def __init__(
        self,
        network: nn.Module,
        build_head: BuildHead,
        channels: int,
        patch_size: Sequence[int],
        settings: ProbeSettings | None = None,
    ):
        super().__init__()
        self.encoder, self.decoder = network.encoder, network.decoder
        self._planned = [network]  # in a list, or its tensors would have other names beside their own
        self.planned.requires_grad_(False)
        self._tap = FeatureTap([network.encoder.stages[-1], *network.decoder.stages])
        self._build_head, self._image_shape = build_head, (channels, *patch_size)
        self.configure(settings or ProbeSettings())

    @property
    def planned(self) -> nn.Module:
        """The frozen network itself."""
        return self._planned[0]

    def configure(self, settings: ProbeSettings) -> None:
        """Give the network a new head for these settings, with random weights."""
        self.settings = settings
        channels = [count * settings.passes for count in reversed(self.encoder.output_channels)]
        device = next(self.encoder.parameters()).device
        self.head = self._build_head(channels, settings.passes).to(device)
        self.time_steps = TimeSteps(self.planned, settings, self._image_shape).to(device)

    def get_extra_state(self) -> dict[str, Any]:
        return asdict(self.settings)

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        settings = ProbeSettings(**state)
        if settings != self.settings:
            self.configure(settings)

    def train(self, mode: bool = True) -> ProbedNetwork:
        """The head alone: frozen norms keep their state."""
        super().train(mode)
        self.planned.eval()
        return self

    @torch.no_grad()
    def features(self, image: Tensor) -> list[Tensor]:
        """The pyramid of an image (B, C, ...), coarse to fine, those of all time steps joined: no gradients."""
        if self.training and self.cache is not None:
            return self.cache.of(image, self._features)
        return self._features(image)

    def _features(self, image: Tensor) -> list[Tensor]:
        pyramids = [self._pyramid(step) for step in self.time_steps.passes(self.planned, image)]
        return pyramids[0] if len(pyramids) == 1 else [torch.cat(scale, 1) for scale in zip(*pyramids, strict=True)]

    def _pyramid(self, run: Callable[[], Tensor]) -> list[Tensor]:
        run()
        return self._tap.take()

    def forward(self, image: Tensor, voxels: Tensor | None = None) -> Tensor:
        """Logits (B, classes, ...) of the image's shape; or, of a head that is asked for some voxels, what its ``at``
        returns for them."""
        features = self.features(image)
        return self.head(features) if voxels is None else self.head.at(features, voxels)
