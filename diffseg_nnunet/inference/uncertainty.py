"""How sure a prediction is of each voxel, as an image on the grid of the segmentation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
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


def write_map(probabilities: Path, segmentation: Path, target: Path, measure: Measure) -> None:
    """Write the uncertainty of each voxel as a float32 image.

    Args:
        probabilities: nnU-Net's .npz of a case, (classes, *shape of the image).
        segmentation: of the same case; gives the geometry.
        target: file to write.
        measure: of the uncertainty.
    """
    with np.load(probabilities) as content:
        found = _in_slabs(torch.from_numpy(content["probabilities"]), measure)
    image = sitk.GetImageFromArray(found.numpy())
    image.CopyInformation(sitk.ReadImage(str(segmentation)))
    sitk.WriteImage(image, str(target), useCompression=True)


def _in_slabs(probabilities: Tensor, measure: Measure) -> Tensor:
    """The measure of a whole image: on the way it holds further copies of all classes, of some slices only."""
    found = torch.empty(probabilities.shape[1:])
    for start in range(0, len(found), _SLAB):
        part = slice(start, start + _SLAB)
        found[part] = measure(probabilities[:, part])
    return found
