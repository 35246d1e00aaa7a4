"""How sure a prediction is of each voxel, as an image on the grid of the segmentation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffseg_nnunet.refinement.sampling import entropy_bits

UNCERTAINTY_FOLDER = "uncertainty"
READER = "SimpleITKIO"
"""nnU-Net's reader whose arrays have the axes of SimpleITK's; the map takes its geometry from the segmentation."""

_SLAB = 8  # slices

Measure = Callable[[Tensor], Tensor]
"""From probabilities (classes, *shape) to the uncertainty of each voxel, float32 (*shape)."""


def entropy(regions: bool) -> Measure:
    """Entropy in bits: of one variable with as many values as classes, or of regions the mean of theirs."""
    return partial(_entropy, regions)


def _entropy(regions: bool, probabilities: Tensor) -> Tensor:
    return entropy_bits(probabilities[None], exclusive=not regions)[0, 0]


def write_map(uncertainty: NDArray, path: Path, file_ending: str) -> None:
    """Write the uncertainty of each voxel as an image, ``uncertainty/CASE`` + ending.

    Args:
        uncertainty: float32, of the image's shape.
        path: of the segmentation, without its ending; it gives the geometry, and the folder is beside it.
        file_ending: of both images.
    """
    image = sitk.GetImageFromArray(uncertainty)
    image.CopyInformation(sitk.ReadImage(f"{path}{file_ending}"))
    target = path.with_name(UNCERTAINTY_FOLDER) / f"{path.name}{file_ending}"
    target.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(target), useCompression=True)


def measured(probabilities: NDArray, measure: Measure) -> NDArray:
    """The measure of a whole image's probabilities, (classes, *shape): on the way it holds further copies of all
    classes, of some slices only."""
    found = np.empty(probabilities.shape[1:], np.float32)
    for start in range(0, len(found), _SLAB):
        part = slice(start, start + _SLAB)
        found[part] = measure(torch.from_numpy(probabilities[:, part])).numpy()
    return found
