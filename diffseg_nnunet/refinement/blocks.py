"""Blocks of the refiner, full-precision and binary, with one interface: ``block(features, embedding)``.

methods.md 3.3, in 2D and 3D. Where the paper's code has batch norms, these are instance norms, as in the planned
segmentors: batches of volumes are too small for batch statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffseg_nnunet.refinement.binary import BinaryConv

Axes = tuple[int, ...]


def convolution(in_channels: int, out_channels: int, kernel_size: Axes, stride: Axes | None = None) -> nn.Module:
    """A full-precision convolution, padded to keep the shape at stride 1; the kernel tells the dimensions."""
    kind = nn.Conv2d if len(kernel_size) == 2 else nn.Conv3d
    padding = tuple(size // 2 for size in kernel_size)
    return kind(in_channels, out_channels, kernel_size, stride or (1,) * len(kernel_size), padding)


def instance_norm(channels: int, dimensions: int, affine: bool = True) -> nn.Module:
    kind = nn.InstanceNorm2d if dimensions == 2 else nn.InstanceNorm3d
    return kind(channels, affine=affine)


def average_pool(features: Tensor, stride: Axes) -> Tensor:
    """Means over blocks of `stride`, those at the end of what is left: as many as a padded strided convolution has."""
    if all(step == 1 for step in stride):
        return features
    pool = functional.avg_pool2d if len(stride) == 2 else functional.avg_pool3d
    return pool(features, stride, stride, ceil_mode=True)


def along_channels(values: Tensor, dimensions: int) -> Tensor:
    """Values of each channel, (B, C), to be broadcast over (B, C, ...) of so many spatial axes."""
    return values.reshape(*values.shape, *(1,) * dimensions)


def zero_init(layer: nn.Module) -> nn.Module:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class FromTime(nn.Sequential):
    """Values a channel as a function of the time embedding: SiLU, Linear; 0 at first. (B, E) -> (B, count)."""

    def __init__(self, embedding_dim: int, count: int):
        super().__init__(nn.SiLU(), zero_init(nn.Linear(embedding_dim, count)))


class ShiftedPReLU(nn.Module):
    """ReActNet's RPReLU with time-dependent shifts: b3 + PReLU(x + b2), shifts 0 at first (methods.md 3.3).

    Args:
        channels: of axis `axis`.
        embedding_dim: of the time embedding.
        axis: 1 for feature maps (B, C, ...), -1 for tokens (B, N, C).
    """

    def __init__(self, channels: int, embedding_dim: int, axis: int = 1):
        super().__init__()
        self.shifts, self.axis = FromTime(embedding_dim, 2 * channels), axis
        self.slope = nn.Parameter(torch.full((channels,), 0.25))

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        shape = [len(embedding), *(1,) * (features.ndim - 1)]
        shape[self.axis] = -1
        before, after = (shift.reshape(shape) for shift in self.shifts(embedding).chunk(2, dim=1))
        shifted = (features + before).movedim(self.axis, 1)
        return functional.prelu(shifted, self.slope.to(shifted.dtype)).movedim(1, self.axis) + after


class ChannelMatch(nn.Module):
    """A parameter-free map from one number of channels to another: each is the mean of its share of the others.

    The identity for equal numbers, means of neighbours when they are halved (methods.md 3.3), repetition when they
    are doubled, and what lies between for what lies between (adaptive average pooling over the channels).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        weight = None
        if in_channels != out_channels:
            weight = functional.adaptive_avg_pool1d(torch.eye(in_channels), out_channels).T.contiguous()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        return features if self.weight is None else torch.einsum("oi,bi...->bo...", self.weight, features)


class ResidualBlock(nn.Module):
    """Norm-SiLU-conv twice, time by scale and shift after the second norm, second convolution zero at first.

    The ResBlock of guided-diffusion (arXiv 2105.05233). HiDiff uses it for the segmentor's features; here it is also
    what the full-precision refiner consists of.

    Args:
        in_channels, out_channels: of the features.
        kernel_size, stride: one number an axis; the first convolution and the shortcut are strided.
        embedding_dim: of the time embedding.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Axes, embedding_dim: int, stride: Axes | None = None
    ):
        super().__init__()
        dimensions = len(kernel_size)
        self.stride = stride or (1,) * dimensions
        self.norm_in = instance_norm(in_channels, dimensions)
        self.conv_in = convolution(in_channels, out_channels, kernel_size, self.stride)
        self.norm_out = instance_norm(out_channels, dimensions)
        self.modulation = FromTime(embedding_dim, 2 * out_channels)
        self.conv_out = zero_init(convolution(out_channels, out_channels, kernel_size))
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else convolution(in_channels, out_channels, (1,) * dimensions)

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.norm_out(self.conv_in(functional.silu(self.norm_in(features))))
        scale, shift = along_channels(self.modulation(embedding), hidden.ndim - 2).chunk(2, dim=1)
        hidden = self.conv_out(functional.silu(hidden * (1 + scale) + shift))
        return hidden + self.shortcut(average_pool(features, self.stride))


class BinaryBlock(nn.Module):
    """HiDiff's BasicBlock: ``norm(binary conv(sign(x + b1))) + shortcut``, then ``b3 + PReLU(· + b2)``.

    b1, b2, b3 are functions of time, so -b1 is a threshold of its own for every time step and channel. The shortcut has
    no parameter: average pooling where the block is strided, :class:`ChannelMatch` where channels change. Arguments as
    of :class:`ResidualBlock`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Axes, embedding_dim: int, stride: Axes | None = None
    ):
        super().__init__()
        dimensions = len(kernel_size)
        self.stride = stride or (1,) * dimensions
        self.bias = FromTime(embedding_dim, in_channels)
        self.conv = BinaryConv(in_channels, out_channels, kernel_size, self.stride)
        self.norm = instance_norm(out_channels, dimensions)
        self.match = ChannelMatch(in_channels, out_channels)
        self.activation = ShiftedPReLU(out_channels, embedding_dim)

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        biased = features + along_channels(self.bias(embedding), features.ndim - 2)
        hidden = self.norm(self.conv(biased)) + self.match(average_pool(features, self.stride))
        return self.activation(hidden, embedding)


Block = ResidualBlock | BinaryBlock


class Up(nn.Module):
    """Nearest to the skip's shape, a block, concatenation with the skip, a block (methods.md 3.3, UpBlock)."""

    def __init__(self, block: type[Block], in_channels: int, out_channels: int, kernel_size: Axes, embedding_dim: int):
        super().__init__()
        self.widen = block(in_channels, out_channels, kernel_size, embedding_dim)
        self.merge = block(2 * out_channels, out_channels, kernel_size, embedding_dim)

    def forward(self, features: Tensor, skip: Tensor, embedding: Tensor) -> Tensor:
        features = self.widen(functional.interpolate(features, size=skip.shape[2:]), embedding)
        return self.merge(torch.cat([features, skip], dim=1), embedding)


class Condition(nn.Module):
    """HiDiff's ConcatLayer: the segmentor's features, brought to the stage's width in full precision, join the stream.

    Args:
        block: of the stream.
        condition_channels: of the segmentor's features at this resolution.
        channels: of the stage, before and after.
    """

    def __init__(
        self, block: type[Block], condition_channels: int, channels: int, kernel_size: Axes, embedding_dim: int
    ):
        super().__init__()
        self.project = ResidualBlock(condition_channels, channels, kernel_size, embedding_dim)
        self.merge = block(2 * channels, channels, kernel_size, embedding_dim)

    def forward(self, features: Tensor, condition: Tensor, embedding: Tensor) -> Tensor:
        return self.merge(torch.cat([features, self.project(condition, embedding)], dim=1), embedding)
