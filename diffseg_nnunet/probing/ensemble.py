"""Independent perceptrons that vote on every voxel (Baranchuk et al., ICLR 2022, arXiv 2112.03126).

A voxel's features are those of all scales and time steps, linearly interpolated to it. The first layer is linear, so it
may come before the interpolation: the features of all scales are never joined at full resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffseg_nnunet.coordinates.head import values_at

MEMBERS = 10
"""Perceptrons; [code] of Baranchuk et al."""
_MANY_CLASSES = 30
_LINEAR = {2: "bilinear", 3: "trilinear"}
_VOXELS_AT_ONCE = 8192


class VoxelPerceptron(nn.Module):
    """Linear–ReLU–BN–Linear–ReLU–BN–Linear on the features of one voxel; widths as Baranchuk et al.'s.

    Args:
        channels: of each scale, coarse to fine.
        classes: outputs.
    """

    def __init__(self, channels: Sequence[int], classes: int):
        super().__init__()
        first, second = (128, 32) if classes < _MANY_CLASSES else (256, 128)
        finest = len(channels) - 1
        self.scales = nn.ModuleList(nn.Linear(c, first, bias=index == finest) for index, c in enumerate(channels))
        self.rest = nn.Sequential(
            *(nn.ReLU(), nn.BatchNorm1d(first), nn.Linear(first, second)),
            *(nn.ReLU(), nn.BatchNorm1d(second), nn.Linear(second, classes)),
        )
        for layer in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(layer.weight, 0, 0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def at(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, classes, N) at voxels, by their features at each scale, (B, N, C_i)."""
        hidden = sum(scale(each) for scale, each in zip(self.scales, features, strict=True))
        return self.rest(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]).movedim(-1, 1)

    def dense(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Logits (B, classes, ...) at every voxel of the finest map."""
        mapped = [
            scale(features.movedim(1, -1)).movedim(-1, 1) for scale, features in zip(self.scales, pyramid, strict=True)
        ]
        hidden = mapped[-1].float()  # autocast interpolates in float32, and so it is summed
        for coarse in mapped[:-1]:
            # in place: these are the largest tensors by far, and adding them takes longer than computing them
            hidden += functional.interpolate(coarse, hidden.shape[2:], mode=_LINEAR[hidden.ndim - 2])
        flat = hidden.movedim(1, -1)
        voxels = flat.flatten(0, -2)
        # a part at a time stays in the processor's cache; in training norms want all voxels at once
        parts = [voxels] if self.training else voxels.split(_VOXELS_AT_ONCE)
        logits = torch.cat([self.rest(part) for part in parts])
        return logits.unflatten(0, flat.shape[:-1]).movedim(-1, 1)


class VotingHead(nn.Module):
    """Perceptrons that are trained each on voxels of its own, and vote.

    Args:
        channels: of each scale, coarse to fine.
        classes: that exclude each other.
        members: how many perceptrons.
    """

    def __init__(self, channels: Sequence[int], classes: int, members: int = MEMBERS):
        super().__init__()
        self.members = nn.ModuleList(VoxelPerceptron(channels, classes) for _ in range(members))

    def at(self, pyramid: Sequence[Tensor], voxels: Tensor) -> Tensor:
        """Each member's logits at its own voxels.

        Args:
            pyramid: feature maps (B, C_i, ...), coarse to fine; the finest has the patch's shape.
            voxels: int64 (members, B, N, axes), indices in the patch.

        Returns:
            float32 (members, B, classes, N).
        """
        shape = pyramid[-1].shape[2:]
        with torch.autocast(voxels.device.type, enabled=False):
            logits = [
                member.at([values_at(features, own, shape) for features in pyramid])
                for member, own in zip(self.members, voxels, strict=True)
            ]
        return torch.stack(logits)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Shares of the votes, (B, classes, ...), summing to 1: the majority's class has the largest.

        Not their logarithms: shares may be averaged over windows, mirrored images and folds, as votes are counted.
        """
        votes = 0.0
        for member in self.members:  # one after the other: each takes much memory at full resolution
            logits = member.dense(pyramid)
            votes = votes + functional.one_hot(logits.argmax(1), logits.shape[1]).movedim(-1, 1).float()
        return votes / len(self.members)


def draw_voxels(
    target: Tensor, members: int, count: int, generator: torch.Generator, ignore: int | None = None
) -> Tensor:
    """Voxels to train on, drawn for each member: half of them anywhere in the patch, half from a label drawn among
    those there, or small organs would hardly ever be seen. [default]; Baranchuk et al. draw from all alike.

    Args:
        target: labels, (B, 1, ...).
        members: perceptrons.
        count: voxels of each patch for each member.
        generator: on the device of `target`.
        ignore: label of voxels that are not drawn, unless a patch has no other.

    Returns:
        int64 (members, B, count, axes).
    """
    drawn = []
    for labels in target.flatten(1):
        values, index, sizes = labels.unique(return_inverse=True, return_counts=True)
        counted = torch.ones_like(values, dtype=torch.bool) if ignore is None else values != ignore
        counted = counted if counted.any() else ~counted
        sizes = sizes.double()
        of_label = 0.5 / sizes[counted].sum() + 0.5 / (counted.sum() * sizes)
        weight = torch.where(counted, of_label, 0)[index]
        cumulative = weight.cumsum(0)
        uniform = torch.rand(members * count, generator=generator, device=target.device, dtype=torch.float64)
        # torch.multinomial takes no more than 2^24 voxels
        drawn.append(torch.searchsorted(cumulative, uniform * cumulative[-1]).clamp_max(labels.numel() - 1))
    flat = torch.stack(drawn).reshape(len(target), members, count).movedim(1, 0)
    return torch.stack(torch.unravel_index(flat, target.shape[2:]), dim=-1)


def vote_entropy(shares: Tensor) -> Tensor:
    """Disagreement of voters: the entropy of the shares of their votes, over its largest value (Dagan and Engelson,
    ICML 1995); 0 where all agree, 1 where the votes are spread evenly over all classes.

    Args:
        shares: (classes, ...), summing to 1.

    Returns:
        float32 (...).
    """
    return (torch.special.entr(shares.float()).sum(0) / math.log(len(shares))).clamp(0, 1)
