"""The coordinate head: three numbers per voxel, read from the last feature map of the planned network's decoder.

It lives outside the network module that nnU-Net saves, so that a checkpoint keeps stock keys.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from diffseg_nnunet.coordinates.loss import CoordinateObjective

CoordinateMode = Literal["auxiliary", "guidance", "none"]
MODES, OBJECTIVES = get_args(CoordinateMode), get_args(CoordinateObjective)


@dataclass(frozen=True)
class CoordinateSettings:
    """Settings of the coordinates. [default] values of ours unless a source is named.

    Attributes:
        mode: "auxiliary", a head on the denoiser; "guidance", a regressor that is trained first and frozen, whose map
            the denoiser reads beside the noised image (arXiv 2501.19265); or "none".
        objective: "relative" (methods.md, option B) or "distance" (APE's, option A).
        weight: of the coordinate loss beside the denoising loss. With 0.1 (methods.md) the head hardly learns in short
            trainings; with 1 it does, and denoising does not suffer (benchmarks/RESULTS.md).
        points_per_patch: voxels drawn from each patch for the pairwise loss.
        clean_share: share of the scans that the head reads clean, at the time step that is folded in. They count for
            the coordinates alone; all others count by the signal that is left in them.
        condition_dropout: share of the patches whose map is replaced by zeros in "guidance" (methods.md 1.2), so that
            the denoiser works without it.
        regressor_share: share of the epochs that train the regressor in "guidance".
    """

    mode: CoordinateMode = "auxiliary"
    objective: CoordinateObjective = "relative"
    weight: float = 1.0
    points_per_patch: int = 192
    clean_share: float = 0.25
    condition_dropout: float = 0.1
    regressor_share: float = 0.25

    def __post_init__(self) -> None:
        for value, choices in ((self.mode, MODES), (self.objective, OBJECTIVES)):
            if value not in choices:
                raise ValueError(f"{value} is none of {', '.join(choices)}")
        for name in ("clean_share", "condition_dropout", "regressor_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not in 0..1, 1 excluded")

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
