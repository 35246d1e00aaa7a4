"""The refiner that goes with a planned segmentor: its stages, strides and kernels, and as wide as memory allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffseg_nnunet.refinement.network import RefinerArchitecture

WIDTHS = (32, 24, 16, 8)
"""Channels of the first stage that are tried, widest first: 32 is HiDiff's narrow pattern (methods.md 3.9)."""
_PATTERN = (1, 1, 2, 2, 4, 4)
"""HiDiff's widths of its six stages, in those of the first; deeper ones are as wide as the sixth."""
_UNCONDITIONED, _MOST_FEATURE_MAPS = 2, 4
"""HiDiff conditions its coarsest four stages of six: the two finest see nothing of the segmentor's features."""


def planned_refiner(
    arguments: Mapping[str, Any], image_channels: int, classes: int, width: int, binary: bool
) -> RefinerArchitecture:
    """The architecture for a planned segmentor.

    Args:
        arguments: of the segmentor, nnU-Net's ``arch_kwargs``.
        image_channels: the segmentor's inputs.
        classes: the segmentor's outputs.
        width: channels of the first stage.
        binary: 1-bit weights and activations.

    Raises:
        ValueError: the segmentor's first stage pools, so there are no features at full resolution.
    """
    strides, kernels = (
        tuple(tuple(int(n) for n in axes) for axes in arguments[name]) for name in ("strides", "kernel_sizes")
    )
    stages = len(strides)
    conditioned = min(_MOST_FEATURE_MAPS, max(1, stages - _UNCONDITIONED))
    return RefinerArchitecture(
        image_channels=image_channels,
        classes=classes,
        channels=tuple(width * _PATTERN[min(stage, len(_PATTERN) - 1)] for stage in range(stages)),
        strides=strides,
        kernel_sizes=kernels,
        pyramid_channels=tuple(int(n) for n in arguments["features_per_stage"][-conditioned:]),
        binary=binary,
    )
