"""From the network's intensities back to the image's, where nnU-Net's normalisation can be undone.

CTNormalization clips to the 0.5th and 99.5th percentile of the foreground, then subtracts its mean and divides by its
standard deviation, the same for every case: this can be undone. The other schemes use the image's own figures, which an
image that was never there has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray

_CT = "CTNormalization"
_SMALLEST_STD = 1e-8  # nnU-Net's


@dataclass(frozen=True)
class Intensities:
    """One channel's normalisation.

    Attributes:
        scheme: nnU-Net's name.
        unit: "HU", or "normalised" where it cannot be undone.
        mean, std: image = normalised · std + mean; 0 and 1 where it cannot be undone.
        low, high: what normalised training images are clipped to; infinite where they are not.
    """

    scheme: str
    unit: str = "normalised"
    mean: float = 0.0
    std: float = 1.0
    low: float = -np.inf
    high: float = np.inf

    def restored(self, normalised: NDArray[np.float32]) -> NDArray[np.float32]:
        """In `unit`, of the same shape."""
        return (normalised.astype(np.float64) * self.std + self.mean).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        return {name: None if value in (-np.inf, np.inf) else value for name, value in asdict(self).items()}


def channel_intensities(plans: PlansManager, configuration: ConfigurationManager, channels: int) -> list[Intensities]:
    """The normalisation of each image channel."""
    found = []
    for index, scheme in enumerate(configuration.normalization_schemes[:channels]):
        if scheme != _CT:
            found.append(Intensities(scheme))
            continue
        figures = plans.foreground_intensity_properties_per_channel[str(index)]
        mean, std = figures["mean"], max(figures["std"], _SMALLEST_STD)
        low, high = ((figures[f"percentile_{name}"] - mean) / std for name in ("00_5", "99_5"))
        found.append(Intensities(scheme, "HU", mean, std, low, high))
    return found


def limits(channels: Sequence[Intensities], dimensions: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Smallest and largest normalised value of each channel, float32 (C, 1, ...), for patches with `dimensions` axes;
    None if no channel is clipped."""
    if all(np.isinf([c.low, c.high]).all() for c in channels):
        return None
    shape = (-1, *(1,) * dimensions)
    low, high = (
        torch.tensor(values).reshape(shape) for values in zip(*((c.low, c.high) for c in channels), strict=True)
    )
    return low, high
