"""Guidance: a coordinate map enters the denoiser by extra channels of its first convolution, and leaves it exactly.

The map is left out at random in training (all zeros), so a network without those channels is the network that got no
map: removing them is exact (methods.md 1.2, condition dropout).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffseg_nnunet.errors import StageFailedError

MAP_CHANNELS = 3
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def first_convolution(network: nn.Module) -> str:
    """Module path of the convolution that reads the image: the first of the network.

    Raises:
        StageFailedError: the network has no convolution.
    """
    for name, module in network.named_modules():
        if isinstance(module, _CONVOLUTIONS):
            return name
    raise StageFailedError(
        "The planned network has no convolution to read coordinates with.", "Plan --coordinates none."
    )


@torch.no_grad()
def widen_input(network: nn.Module, extra: int = MAP_CHANNELS) -> None:
    """Let the network read `extra` more input channels, in place; with zeros in them its output is unchanged."""
    convolution = network.get_submodule(first_convolution(network))
    added = torch.empty_like(convolution.weight[:, :1]).repeat(1, extra, *(1,) * (convolution.weight.ndim - 2))
    nn.init.kaiming_normal_(added, a=0.01)
    convolution.weight = nn.Parameter(torch.cat([convolution.weight, added], dim=1))
    convolution.in_channels += extra


def narrow_input(weights: Mapping[str, Tensor], network: nn.Module, extra: int = MAP_CHANNELS) -> dict[str, Tensor]:
    """The weights of a widened network without the extra channels: those of the stock network.

    Args:
        weights: a state dict of `network`.
        network: widened.
    """
    widened = network.get_submodule(first_convolution(network)).weight
    paths = [name for name, p in network.named_parameters(remove_duplicate=False) if p is widened]
    return {key: tensor[:, :-extra].clone() if key in paths else tensor for key, tensor in weights.items()}
