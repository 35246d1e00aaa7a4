"""Heads that classify voxels by a frozen feature pyramid; every convolution has kernel 1 (vox2vec, arXiv 2307.14725).

A pyramid is a list of feature maps, (B, C_i, *shape_i), from coarse to fine. Nothing but nearest neighbours moves
information between voxels, so a head can only use what the features say about a voxel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

_CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORMS = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class LinearHead(nn.Module):
    """A linear classifier of the pyramid's standardised features, up-sampled to the finest map: vox2vec's linear probe.

    Each scale has a kernel-1 convolution, and the results are up-sampled and summed, coarse to fine: the same as one
    linear map of all up-sampled features, at a fraction of the memory. Standardised by a batch norm without weights, as
    linear probes are since MAE (arXiv 2111.06377, appendix A.1), since features differ in scale; on new images it is a
    linear map, too.

    Args:
        channels: of each scale, coarse to fine.
        classes: output channels.
        dimensions: spatial axes, 2 or 3.
    """

    def __init__(self, channels: Sequence[int], classes: int, dimensions: int):
        super().__init__()
        norm, convolution, finest = _BATCH_NORMS[dimensions], _CONVOLUTIONS[dimensions], len(channels) - 1
        self.scales = nn.ModuleList(
            nn.Sequential(norm(count, affine=False), convolution(count, classes, 1, bias=index == finest))
            for index, count in enumerate(channels)
        )

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Logits (B, classes, *shape of the finest map)."""
        logits = self.scales[0](pyramid[0])
        for scale, features in zip(self.scales[1:], pyramid[1:], strict=True):
            logits = upsampled(logits, features) + scale(features)
        return logits


class NonlinearHead(nn.Module):
    """A decoder of kernel-1 residual blocks on the pyramid: vox2vec's non-linear probe.

    From the coarsest map up: residual block; then at each finer one a linear map, up-sampled, plus a linear map of the
    features there, and a residual block; at last a linear classifier.

    Args:
        channels: of each scale, coarse to fine.
        widths: of the head at each scale; vox2vec's are the channels.
        classes: output channels.
        dimensions: spatial axes, 2 or 3.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int], classes: int, dimensions: int):
        super().__init__()
        convolution = _CONVOLUTIONS[dimensions]
        self.enter = nn.ModuleList(
            # the coarsest features enter the first block as they are where their number allows
            nn.Identity() if index == 0 and count == width else convolution(count, width, 1)
            for index, (count, width) in enumerate(zip(channels, widths, strict=True))
        )
        self.up = nn.ModuleList(convolution(below, width, 1) for below, width in pairwise(widths))
        self.blocks = nn.ModuleList(_residual_block(width, dimensions) for width in widths)
        self.out = convolution(widths[-1], classes, 1)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Logits (B, classes, *shape of the finest map)."""
        hidden = self.blocks[0](self.enter[0](pyramid[0]))
        for features, enter, up, block in zip(pyramid[1:], self.enter[1:], self.up, self.blocks[1:], strict=True):
            hidden = block(upsampled(up(hidden), features) + enter(features))
        return self.out(hidden)


class ResidualBlock(nn.Module):
    """``x + branch(x)``."""

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def forward(self, features: Tensor) -> Tensor:
        return features + self.branch(features)


def _residual_block(width: int, dimensions: int) -> ResidualBlock:
    """Pre-activation, as vox2vec's: BN, ReLU, kernel 1, twice."""
    norm, convolution = _BATCH_NORMS[dimensions], _CONVOLUTIONS[dimensions]
    layers = [(norm(width), nn.ReLU(inplace=True), convolution(width, width, 1)) for _ in range(2)]
    return ResidualBlock(nn.Sequential(*(layer for group in layers for layer in group)))


def upsampled(coarse: Tensor, fine: Tensor) -> Tensor:
    """The coarse map on the fine one's grid, by nearest neighbours."""
    return functional.interpolate(coarse, size=fine.shape[2:], mode="nearest")
