"""How much the voters of a pixel ensemble disagree, as an image on the grid of the segmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from diffseg_nnunet.probing.ensemble import shares_behind, vote_entropy

UNCERTAINTY_FOLDER = "uncertainty"
READER = "SimpleITKIO"
"""nnU-Net's reader whose arrays have the axes of SimpleITK's; the map takes its geometry from the segmentation."""


def write_disagreement(probabilities: Path, segmentation: Path, target: Path) -> None:
    """Write the vote entropy of each voxel, 0 (all agree) to 1, as a float32 image.

    Args:
        probabilities: nnU-Net's .npz of a case, (classes, *shape of the image): a softmax of the shares of the votes.
        segmentation: of the same case; gives the geometry.
        target: file to write.
    """
    with np.load(probabilities) as content:
        shares = shares_behind(torch.from_numpy(content["probabilities"]))
    image = sitk.GetImageFromArray(vote_entropy(shares).numpy())
    image.CopyInformation(sitk.ReadImage(str(segmentation)))
    sitk.WriteImage(image, str(target), useCompression=True)
