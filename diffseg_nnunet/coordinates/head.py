"""The coordinate head: three numbers per voxel, read from the feature maps of the planned network.

It lives outside the network module that nnU-Net saves, so that a checkpoint keeps stock keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffseg_nnunet.coordinates.loss import CoordinateObjective
from diffseg_nnunet.diffusion.conditioning import affine_norms

CoordinateMode = Literal["auxiliary", "guidance", "none"]
_SMALLEST_VARIANCE = 1e-6
MODES, OBJECTIVES = get_args(CoordinateMode), get_args(CoordinateObjective)


@dataclass(frozen=True)
class CoordinateSettings:
    """Settings of the coordinates. [default] values of ours unless a source is named.

    Attributes:
        mode: "auxiliary", a head on the denoiser; "guidance", a regressor that is trained first and frozen, whose map
            the denoiser reads beside the noised image (arXiv 2501.19265); or "none".
        objective: "relative" (methods.md, option B) or "distance" (APE's, option A).
        weight: of the coordinate loss beside the denoising loss. With 0.1 (methods.md) the head hardly learns in short
            trainings; with 1 it does.
        points_per_patch: voxels drawn from each patch for the pairwise loss.
        clean_share: share of the scans that the head reads clean, at the time step that is folded in. They count for
            the coordinates alone; all others count by the signal that is left in them. A quarter does better across
            patches than none, and half no better (benchmarks/RESULTS.md).
        patch_statistics: let the head read the means and deviations that norms take away, too (see FeatureTap): without
            them place is learned within patches, and hardly across (benchmarks/RESULTS.md).
        condition_dropout: share of the patches whose map is replaced by zeros in "guidance" (methods.md 1.2), so that
            the denoiser works without it.
        regressor_share: share of the epochs that train the regressor in "guidance".
    """

    mode: CoordinateMode = "auxiliary"
    objective: CoordinateObjective = "relative"
    weight: float = 1.0
    points_per_patch: int = 192
    clean_share: float = 0.25
    patch_statistics: bool = True
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
    """A perceptron from the features of several scales to coordinates, evaluated at the voxels that are asked for.

    Place is coarse: the deepest features know it first, the finest say where within them a voxel lies. As in APE
    (arXiv 2409.10291; methods.md, option A) each scale has a linear map, these are interpolated to the voxel, and
    summed; a nonlinearity and a second map follow.

    Args:
        feature_channels: channels of each scale.
        hidden: width of the one hidden layer.
    """

    def __init__(self, feature_channels: Sequence[int], hidden: int = 64):
        super().__init__()
        self.scales = nn.ModuleList(nn.Linear(channels, hidden) for channels in feature_channels)
        self.out = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 3))

    def forward(self, features: Sequence[Tensor], voxels: Tensor, shape: Sequence[int]) -> Tensor:
        """Coordinates at voxels: float32 (B, N, 3), in units of 300 mm up to one gauge common to all scans.

        Args:
            features: of each scale, (B, C, *smaller spatial shape).
            voxels: int64 (B, N, axes), indices in a patch of `shape`.
            shape: of the patch.
        """
        with torch.autocast(voxels.device.type, enabled=False):
            hidden = sum(
                scale(values_at(each, voxels, shape)) for scale, each in zip(self.scales, features, strict=True)
            )
            return self.out(hidden)

    def dense(self, features: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Coordinates of all voxels of a patch: float32 (B, 3, *shape)."""
        mode = "bilinear" if len(shape) == 2 else "trilinear"
        with torch.autocast(features[0].device.type, enabled=False):
            # a linear map and an interpolation may change places: few channels are interpolated
            hidden = sum(
                functional.interpolate(scale(each.float().movedim(1, -1)).movedim(-1, 1), tuple(shape), mode=mode)
                for scale, each in zip(self.scales, features, strict=True)
            )
            return self.out(hidden.movedim(1, -1)).movedim(-1, 1)


class FeatureTap:
    """Keeps the last outputs of some modules for a head outside the network, and what norms take away.

    Instance norms remove the mean and the spread of every channel over a patch, and with them much of what tells where
    in the body the patch lies: how much of it is air, bone, or whatever a filter answers to. Both are kept for the head
    as one more feature map, of a single voxel.

    Args:
        modules: whose outputs are kept.
        norms: whose inputs' means and standard deviations are kept, as the last feature map; none if empty.
    """

    def __init__(self, modules: Sequence[nn.Module], norms: Sequence[nn.Module] = ()):
        self._features: list[Tensor | None] = [None] * len(modules)
        self._statistics: list[Tensor | None] = [None] * len(norms)
        self._hooks = [module.register_forward_hook(self._keeper(index)) for index, module in enumerate(modules)]
        self._hooks += [norm.register_forward_pre_hook(self._reader(index)) for index, norm in enumerate(norms)]

    def _keeper(self, index: int):
        def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._features[index] = output

        return keep

    def _reader(self, index: int):
        def read(_norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._statistics[index] = patch_statistics(inputs[0])

        return read

    def take(self) -> list[Tensor]:
        """The features of the last forward pass, each (B, C, ...); they are handed over, not kept."""
        features, self._features = self._features, [None] * len(self._features)
        statistics, self._statistics = self._statistics, [None] * len(self._statistics)
        if any(feature is None for feature in (*features, *statistics)):
            raise RuntimeError("no forward pass since the features were last taken")
        return [*features, torch.cat(statistics, dim=1)] if statistics else features

    def close(self) -> None:
        """Keep nothing any more."""
        for hook in self._hooks:
            hook.remove()
        self._features, self._statistics = [None] * len(self._features), [None] * len(self._statistics)


def patch_statistics(features: Tensor) -> Tensor:
    """Mean and standard deviation of each channel over a patch: (B, C, ...) -> float32 (B, 2C, 1, ...)."""
    axes = tuple(range(2, features.ndim))
    mean = features.mean(axes, keepdim=True, dtype=torch.float32)
    # about the mean: squares of features far from zero lose their spread in bfloat16. About a constant that is nearly
    # the mean, in the features' own format, so that autograd keeps no float32 copy of them
    centre = mean.detach().to(features.dtype)
    centred = features - centre
    if features.dtype == torch.float16:  # which ends at 65504, the square of 256
        with torch.autocast(features.device.type, enabled=False):
            norm = torch.linalg.vector_norm(centred, dim=axes, keepdim=True, dtype=torch.float32)
        squares = norm.square() / math.prod(features.shape[2:])
    else:
        # no square(): CUDA's autocast takes that for a power, in a float32 copy
        squares = (centred * centred).mean(axes, keepdim=True, dtype=torch.float32)
    variance = squares - (mean - centre.float()).square()
    return torch.cat([mean, variance.clamp_min(_SMALLEST_VARIANCE).sqrt()], dim=1)


def stage_norms(network: nn.Module) -> list[nn.Module]:
    """The last affine norm of each encoder stage of a planned network."""
    last: dict[str, nn.Module] = {}
    for name, norm in affine_norms(network).items():
        if name.startswith("encoder."):
            # encoder.stem…, encoder.stages.3…
            last[".".join(name.split(".")[: 3 if name.startswith("encoder.stages.") else 2])] = norm
    return list(last.values())


def statistics_channels(norms: Sequence[nn.Module]) -> int:
    """Channels of the feature map that :class:`FeatureTap` makes of the norms' inputs."""
    return 2 * sum(norm.weight.numel() for norm in norms)


def head_on(network: nn.Module, hidden: int = 64, statistics: bool = True) -> tuple[CoordinateHead, FeatureTap]:
    """A head on a planned network, and the tap that feeds it: the bottleneck, every stage of the decoder from coarse to
    fine, and, unless told otherwise, the statistics of the patch as a whole."""
    norms = stage_norms(network) if statistics else []
    channels = [*reversed(network.encoder.output_channels), *([statistics_channels(norms)] if norms else [])]
    return CoordinateHead(channels, hidden), FeatureTap([network.encoder.stages[-1], *network.decoder.stages], norms)


class CoordinateRegressor(nn.Module):
    """A network of the planned topology with a coordinate head of its own: guidance's regressor.

    Args:
        network: its outputs are not used, and not trained.
        hidden: width of the head, which here is asked for every voxel.
    """

    def __init__(self, network: nn.Module, hidden: int = 16):
        super().__init__()
        self.network = network
        network.decoder.seg_layers.requires_grad_(False)
        self.head, self._tap = head_on(network, hidden)

    def features(self, patch: Tensor) -> list[Tensor]:
        """What the head reads of a patch (B, C, ...)."""
        self.network(patch)
        return self._tap.take()

    def forward(self, patch: Tensor) -> Tensor:
        """Coordinates of every voxel: (B, C, ...) -> float32 (B, 3, ...), in units of 300 mm."""
        return self.head.dense(self.features(patch), patch.shape[2:])


def values_at(features: Tensor, voxels: Tensor, shape: Sequence[int]) -> Tensor:
    """Features (B, C, ...) of any resolution at the voxels (B, N, axes) of a patch of `shape`: float32 (B, N, C).

    Interpolated linearly between voxel centres, as ``interpolate`` does with aligned outer faces.
    """
    if tuple(features.shape[2:]) == tuple(shape):
        return gather_voxels(features, voxels).float()
    sizes = torch.tensor(shape, device=voxels.device, dtype=torch.float32)
    places = (2 * voxels.float() + 1) / sizes - 1
    grid = places.flip(-1).reshape(len(voxels), *(1,) * (len(shape) - 1), -1, len(shape))
    read = functional.grid_sample(features.float(), grid, padding_mode="border", align_corners=False)
    return read.flatten(2).transpose(1, 2)


def gather_voxels(features: Tensor, voxels: Tensor) -> Tensor:
    """Feature vectors at voxels: (B, C, *spatial) and int64 (B, N, len(spatial)) -> (B, N, C)."""
    spatial = features.shape[2:]
    flat = torch.zeros(voxels.shape[:2], dtype=torch.int64, device=voxels.device)
    for axis, size in enumerate(spatial):
        flat = flat * size + voxels[..., axis]
    index = flat[:, None, :].expand(-1, features.shape[1], -1)
    return features.flatten(2).gather(2, index).transpose(1, 2)
