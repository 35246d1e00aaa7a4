"""What a plan takes over from a checkpoint's: spacing, normalisation and topology, as far as the data allow.

Spacing and topology are nnU-Net's lists, one entry an axis or a stage; nothing here knows nnU-Net's classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffseg_nnunet.planning.nnunet_rules import LEAST_EDGE

SPACING_FACTOR = 2.0
"""Largest ratio between a checkpoint's spacing and the one nnU-Net would choose, on each axis: within it nnU-Net too
treats axes as alike. Beyond it, most of what is resampled would be invented or lost."""
CT_NORMALISATION = "CTNormalization"
_FREE_OF_SCALE = ("ZScoreNormalization", "RescaleTo01Normalization")
_PER_STAGE = ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage")
BACKBONES = {"ResidualEncoderUNet": "resenc", "PlainConvUNet": "plain"}
"""nnU-Net's planned networks, and the planners here that plan them."""


@dataclass(frozen=True)
class Source:
    """A checkpoint a plan is made to start from.

    Attributes:
        name: of its file.
        sha256: of its content.
        weights: its network's state dict.
        configuration: 2d, 3d_fullres, …
        architecture: ``network_class_name``, ``arch_kwargs`` and ``_kw_requires_import`` of its plans.
        channels: it reads.
        spacing: mm, of its 2 or 3 axes in the order of its network.
        transpose_forward: array axes in the order of its network.
        normalisation: of its channels.
    """

    name: str
    sha256: str
    weights: Mapping[str, Tensor]
    configuration: str
    architecture: Mapping[str, Any]
    channels: int
    spacing: tuple[float, ...]
    transpose_forward: tuple[int, ...]
    normalisation: Normalisation

    @property
    def dimensions(self) -> int:
        return len(self.spacing)

    @property
    def backbone(self) -> str | None:
        """The planner of its network; None for one that none plans."""
        return BACKBONES.get(self.architecture["network_class_name"].rsplit(".", 1)[-1])

    @property
    def base_features(self) -> int:
        return int(per_stage(self.architecture["arch_kwargs"], "features_per_stage")[0])

    def spacing_of_array(self) -> list[float]:
        """Spacing of a 3D network in array order."""
        spacing = [0.0] * self.dimensions
        for position, axis in enumerate(self.transpose_forward):
            spacing[axis] = self.spacing[position]
        return spacing


@dataclass(frozen=True)
class Normalisation:
    """How intensities are normalised: one entry a channel.

    Attributes:
        schemes: names of nnU-Net's normalisations.
        masks: whether only non-zero voxels count.
        intensities: of the foreground, by the channel's number as text; CT's normalisation reads them.
    """

    schemes: tuple[str, ...]
    masks: tuple[bool, ...]
    intensities: Mapping[str, Mapping[str, float]]


def adopt_spacing(own: Sequence[float], source: Sequence[float]) -> list[float]:
    """For each axis the source's spacing if it is within :data:`SPACING_FACTOR` of the data's, else the data's."""
    return [
        float(theirs if max(theirs / ours, ours / theirs) <= SPACING_FACTOR else ours)
        for ours, theirs in zip(own, source, strict=True)
    ]


def adopt_normalisation(own: Normalisation, source: Normalisation) -> tuple[Normalisation, list[int]]:
    """The source's normalisation for each channel whose intensities mean the same.

    Those of CT in both: also the source's statistics, so that a HU has the same value. Z-scores and rescaling to 0..1
    take any intensities, so that the source's choice holds. Other kinds stay as the data have them. With equal numbers
    of channels they correspond by position; else all correspond to the source's first.

    Returns:
        The normalisation, and the channels that adopted.
    """
    schemes, masks, intensities = list(own.schemes), list(own.masks), dict(own.intensities)
    adopted = []
    for channel, scheme in enumerate(own.schemes):
        other = channel if len(source.schemes) == len(own.schemes) else 0
        theirs = source.schemes[other]
        if theirs != scheme and not (theirs in _FREE_OF_SCALE and scheme in _FREE_OF_SCALE):
            continue
        if theirs == CT_NORMALISATION:
            if str(other) not in source.intensities:
                continue
            intensities[str(channel)] = source.intensities[str(other)]
        schemes[channel], masks[channel] = theirs, source.masks[other]
        adopted.append(channel)
    return Normalisation(tuple(schemes), tuple(masks), intensities), adopted


def per_stage(arguments: Mapping[str, Any], name: str) -> list[Any]:
    """One entry a stage of an argument of nnU-Net's networks, which may be one number for all."""
    value = arguments[name]
    return list(value) if isinstance(value, (list, tuple)) else [value] * int(arguments["n_stages"])


def adopt_topology(
    own: Mapping[str, Any], source: Mapping[str, Any], same_spacing: bool, patch: Sequence[int]
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The source's architecture for a patch of the data, and the patch padded to what its pooling divides.

    Its features, blocks and layers are the source's. At the source's spacing so are strides and kernels, but an axis is
    no longer pooled where less than :data:`LEAST_EDGE` voxels would be left; at another spacing strides and kernels
    are nnU-Net's own. The network has no more stages than the source's, and ends where nothing is left to pool.

    Args:
        own: nnU-Net's architecture for the patch, of the same kind of network.
        source: the checkpoint's.
        same_spacing: whether the data are resampled to the source's spacing.
        patch: size, 2 or 3 axes.

    Returns:
        Both unchanged where the source has another number of axes.
    """
    ours, theirs = own["arch_kwargs"], source["arch_kwargs"]
    pooling = [_axes(strides, len(patch)) for strides in per_stage(theirs, "strides")]
    if any(strides is None for strides in pooling):
        return dict(own), tuple(patch)
    kernels = per_stage(theirs, "kernel_sizes")
    stages = int(theirs["n_stages"])
    if same_spacing:
        strides = _possible_strides(pooling, patch)
        kernels = kernels[: len(strides)]
    else:
        strides = [list(each) for each in ours["strides"][:stages]]
        # nnU-Net's lowest stage always has whole kernels
        kernels = [list(each) for each in ours["kernel_sizes"][: len(strides) - 1]] + [[3] * len(patch)]
    depth = len(strides)
    arguments = {**theirs, "n_stages": depth}
    arguments |= {name: per_stage(theirs, name)[:depth] for name in _PER_STAGE if name in theirs}
    arguments |= {"strides": strides, "kernel_sizes": kernels}
    decoder = per_stage({**theirs, "n_stages": stages - 1}, "n_conv_per_stage_decoder")
    # counted from the deepest stage, which is the one to go
    arguments["n_conv_per_stage_decoder"] = decoder[len(decoder) - (depth - 1) :]
    factors = [math.prod(column) for column in zip(*strides, strict=True)]
    padded = tuple(-(-int(size) // factor) * factor for size, factor in zip(patch, factors, strict=True))
    # the network's class by its name of today: older plans have it in a module that is gone
    return {**source, "network_class_name": own["network_class_name"], "arch_kwargs": arguments}, padded


def _axes(value: Any, dimensions: int) -> list[int] | None:
    """One number an axis; None if there are other axes."""
    if not isinstance(value, (list, tuple)):
        return [int(value)] * dimensions
    return [int(each) for each in value] if len(value) == dimensions else None


def _possible_strides(pooling: Sequence[Sequence[int]], patch: Sequence[int]) -> list[list[int]]:
    """The strides of as many stages as there is something to pool in, each axis while enough of it is left."""
    sizes, strides = [int(size) for size in patch], [list(pooling[0])]
    for wanted in pooling[1:]:
        chosen = [stride if size >= stride * LEAST_EDGE else 1 for stride, size in zip(wanted, sizes, strict=True)]
        if max(chosen) == 1 < max(wanted):
            if len(strides) > 1:
                break
            chosen = list(wanted)  # a U-Net has two stages at least: the patch is padded
        strides.append(chosen)
        sizes = [-(-size // stride) for size, stride in zip(sizes, chosen, strict=True)]
    return strides
