"""The refiner: a U-Net that predicts, at y_t, which voxels of the mask were flipped (methods.md 3.3).

It reads [image, y_t, prior], the segmentor's feature pyramid, and the time step. Its stages, strides and kernels are
those of the planned segmentor, so that both have the same grids, in 2D or 3D, however anisotropic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffseg_nnunet.diffusion.bernoulli import flip_signs
from diffseg_nnunet.diffusion.conditioning import sinusoidal_embedding
from diffseg_nnunet.refinement.attention import CrossTransformer
from diffseg_nnunet.refinement.blocks import (
    BinaryBlock,
    Condition,
    ResidualBlock,
    Up,
    convolution,
    instance_norm,
    zero_init,
)

REFINER_FORMAT = 2
"""Of weights: the number changes where the same weights would say something else. 1: the layers spoke of the flip."""

HEADS = 4
"""Of the cross transformer, unless another number is given [code]."""


@dataclass(frozen=True)
class RefinerArchitecture:
    """What a planner decides of a refiner.

    Attributes:
        image_channels: of the image.
        classes: K, class channels of the mask: the segmentor's output channels.
        channels: of each stage, fine to coarse. HiDiff: C, C, 2C, 2C, 4C, 4C, C = 128 in 2D.
        strides: of each stage's first block, one number an axis, as nnU-Net writes them: the first are ones.
        kernel_sizes: of each stage, one odd number an axis; their count tells the dimensions.
        pyramid_channels: of the segmentor's features at the coarsest stages, fine to coarse, at least one; HiDiff: 4,
            at strides 4 to 32, of 6. The last feeds the cross transformer, the others are concatenated.
        binary: 1-bit weights and activations, the paper's; or full precision.
        heads: of the cross transformer, a divisor of the last stage's channels [code: 4].
    """

    image_channels: int
    classes: int
    channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    pyramid_channels: tuple[int, ...]
    binary: bool = True
    heads: int = HEADS

    def __post_init__(self) -> None:
        # a plans file has lists
        for name in ("channels", "pyramid_channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("strides", "kernel_sizes"):
            object.__setattr__(self, name, tuple(tuple(axes) for axes in getattr(self, name)))
        stages = len(self.channels)
        if stages < 2 or len(self.strides) != stages or len(self.kernel_sizes) != stages:
            raise ValueError(f"{stages} stages, {len(self.strides)} strides and {len(self.kernel_sizes)} kernel sizes")
        if not 1 <= len(self.pyramid_channels) <= stages:
            raise ValueError(f"{len(self.pyramid_channels)} feature maps of the segmentor for {stages} stages")
        if self.dimensions not in (2, 3) or {len(a) for a in (*self.strides, *self.kernel_sizes)} != {self.dimensions}:
            raise ValueError(f"strides {self.strides} and kernel sizes {self.kernel_sizes} are not all 2D or all 3D")
        if any(size % 2 == 0 for sizes in self.kernel_sizes for size in sizes):
            raise ValueError(f"kernel sizes {self.kernel_sizes} are not all odd")
        if any(step != 1 for step in self.strides[0]):
            raise ValueError(f"the first stage's stride is {self.strides[0]}: masks are refined at full resolution")
        if self.channels[-1] % self.heads:
            raise ValueError(f"{self.channels[-1]} channels cannot be shared by {self.heads} heads")
        if self.channels[0] % 2:
            raise ValueError(f"{self.channels[0]} channels of the first stage, and of the time's sinusoids, are odd")

    @property
    def dimensions(self) -> int:
        return len(self.kernel_sizes[0])

    @property
    def embedding_dim(self) -> int:
        """Width of the time embedding: 4 C of a sinusoid of C values, C the first stage's channels [code]."""
        return 4 * self.channels[0]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Refiner(nn.Module):
    """Predicts the log-odds of the flip ε = y_t XOR y_0.

    What the layers compute is added to the prior's log-odds, so that the estimate of y_0 has log-odds ``logit(p) +
    layers``, and the flip these with the sign that y_t gives them. Layers that spoke of the flip itself, as in the
    released code, would have to undo y_t's sign voxel by voxel, and learn that noise first (benchmarks/RESULTS.md,
    "What a refiner's layers speak of") [default]. The last convolution is zero at first: a new refiner's estimate of
    y_0 is p, at every y_t and t, and refining changes no label (the released code starts from ε = 1/2, so from
    y_0 = 1/2, whatever the prior) [default].

    Args:
        architecture: the planner's.
        prior_margin: of :class:`~diffseg_nnunet.diffusion.bernoulli.BernoulliSettings`.
    """

    def __init__(self, architecture: RefinerArchitecture, prior_margin: float = 1e-4):
        super().__init__()
        self.architecture, self.prior_margin = architecture, prior_margin
        plan, block = architecture, BinaryBlock if architecture.binary else ResidualBlock
        width, embedding = plan.channels, plan.embedding_dim
        stages = list(zip(width, plan.kernel_sizes, strict=True))
        self.unconditioned = len(width) - len(plan.pyramid_channels)
        # every layer that reads the embedding begins with a SiLU
        self.time = nn.Sequential(nn.Linear(width[0], embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.stem = convolution(plan.image_channels + 2 * plan.classes, width[0], plan.kernel_sizes[0])
        self.downs = nn.ModuleList(
            block(before, channels, kernel, embedding, stride)
            for before, (channels, kernel), stride in zip(width[:-1], stages[1:], plan.strides[1:], strict=True)
        )
        self.blocks = nn.ModuleList(block(channels, channels, kernel, embedding) for channels, kernel in stages)
        self.conditions = nn.ModuleList(
            Condition(block, features, channels, kernel, embedding)
            for features, (channels, kernel) in zip(
                plan.pyramid_channels[:-1], stages[self.unconditioned : -1], strict=True
            )
        )
        self.project = ResidualBlock(plan.pyramid_channels[-1], width[-1], plan.kernel_sizes[-1], embedding)
        self.exchange = CrossTransformer(width[-1], plan.dimensions, plan.heads, embedding, plan.binary)
        self.last_block = block(width[-1], width[-1], plan.kernel_sizes[-1], embedding)
        self.ups = nn.ModuleList(
            Up(block, below, channels, kernel, embedding)
            for below, (channels, kernel) in zip(width[:0:-1], stages[-2::-1], strict=True)
        )
        self.norm = instance_norm(width[0], plan.dimensions)
        self.out = zero_init(convolution(width[0], plan.classes, plan.kernel_sizes[0]))

    def forward(self, noisy: Tensor, t: Tensor, prior: Tensor, image: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Log-odds of the flip: float32 (B, K, ...).

        Args:
            noisy: y_t, (B, K, ...), of 0 and 1.
            t: time steps 0..T-1, (B,).
            prior: p, (B, K, ...), in [0, 1].
            image: (B, image_channels, ...).
            features: of the segmentor at the coarsest stages, fine to coarse, on the grids of those stages.

        Raises:
            ValueError: the features are too few or too many, or lie on other grids.
        """
        embedding = self.time(sinusoidal_embedding(t, self.architecture.channels[0]).to(self.out.weight.dtype))
        skips = self._encoded(torch.cat([image, noisy, prior], dim=1), features, embedding)
        hidden = skips.pop()
        for up in self.ups:
            hidden = up(hidden, skips.pop(), embedding)
        change = self.out(functional.silu(self.norm(hidden)))
        spoken_for = prior.float().clamp(self.prior_margin, 1 - self.prior_margin).logit()
        return flip_signs(noisy) * (change.float() + spoken_for)

    def _encoded(self, stacked: Tensor, features: Sequence[Tensor], embedding: Tensor) -> list[Tensor]:
        """The features of each stage, fine to coarse, the coarsest after the exchange with the segmentor's."""
        if len(features) != len(self.architecture.pyramid_channels):
            raise ValueError(
                f"{len(features)} feature maps of the segmentor, {len(self.architecture.pyramid_channels)} planned"
            )
        hidden, stages = self.stem(stacked), []
        for index, block in enumerate(self.blocks):
            if index:
                hidden = self.downs[index - 1](hidden, embedding)
            hidden = block(hidden, embedding)
            if index >= self.unconditioned:
                condition = features[index - self.unconditioned].to(hidden.dtype)
                hidden = self._conditioned(hidden, condition, index, embedding)
            stages.append(hidden)
        return stages

    def _conditioned(self, hidden: Tensor, condition: Tensor, stage: int, embedding: Tensor) -> Tensor:
        if condition.shape[2:] != hidden.shape[2:]:
            raise ValueError(
                f"the segmentor's features for stage {stage} lie on a grid of {tuple(condition.shape[2:])}, "
                f"the stage's is {tuple(hidden.shape[2:])}: their strides differ"
            )
        if stage < len(self.blocks) - 1:
            return self.conditions[stage - self.unconditioned](hidden, condition, embedding)
        exchanged = self.exchange(hidden, self.project(condition, embedding), embedding)
        return self.last_block(exchanged, embedding)
