"""The coordinate head: three numbers per voxel, read from the last feature map of the planned network's decoder.

It lives outside the network module that nnU-Net saves, so that a checkpoint keeps stock keys.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class CoordinateSettings:
    """Settings of the coordinate head. [default] values of ours unless a source is named.

    Attributes:
        mode: "auxiliary" (a head on the same network) or "none".
        weight: of the coordinate loss beside the denoising loss. With 0.1 (methods.md) the head hardly learns in short
            trainings; with 1 it does, and denoising does not suffer (benchmarks/RESULTS.md).
        points_per_patch: voxels drawn from each patch for the pairwise loss.
    """

    mode: Literal["auxiliary", "none"] = "auxiliary"
    weight: float = 1.0
    points_per_patch: int = 192

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class CoordinateHead(nn.Module):
    """A kernel-1 perceptron from decoder features to coordinates, evaluated only at the voxels that are asked for.

    Args:
        feature_channels: channels of the decoder's last stage.
        hidden: width of the one hidden layer.
    """

    def __init__(self, feature_channels: int, hidden: int = 64):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(feature_channels, hidden), nn.SiLU(), nn.Linear(hidden, 3))

    def forward(self, features: Tensor) -> Tensor:
        """(..., feature_channels) -> (..., 3), float32, in units of 300 mm up to one gauge common to all scans."""
        with torch.autocast(features.device.type, enabled=False):
            return self.layers(features.float())


class FeatureTap:
    """Keeps the last output of a module (the decoder's last stage) for a head outside the network."""

    def __init__(self, module: nn.Module):
        self.features: Tensor | None = None
        module.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.features = output

    def take(self) -> Tensor:
        """The features of the last forward pass, shape (B, C, ...); they are handed over, not kept."""
        features, self.features = self.features, None
        if features is None:
            raise RuntimeError("no forward pass since the features were last taken")
        return features


def gather_voxels(features: Tensor, voxels: Tensor) -> Tensor:
    """Feature vectors at voxels: (B, C, *spatial) and int64 (B, N, len(spatial)) -> (B, N, C)."""
    spatial = features.shape[2:]
    flat = torch.zeros(voxels.shape[:2], dtype=torch.int64, device=voxels.device)
    for axis, size in enumerate(spatial):
        flat = flat * size + voxels[..., axis]
    index = flat[:, None, :].expand(-1, features.shape[1], -1)
    return features.flatten(2).gather(2, index).transpose(1, 2)
