"""A patch of the network as images: nnU-Net's transposition of the axes undone, with the plan's spacing.

A patch that was never part of a scan has no place in a body: the images lie at the origin, along the axes.
"""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray


def patch_spacing(plans: PlansManager, configuration: ConfigurationManager) -> tuple[float, float, float]:
    """Spacing of a patch's voxels in mm, in the plan's order of axes.

    A 2D configuration keeps the distance of slices, so a single slice gets the data set's median.
    """
    planned = [float(mm) for mm in configuration.spacing]
    if len(planned) == 3:
        return tuple(planned)
    return (float(plans.original_median_spacing_after_transp[0]), *planned)


def patch_images(
    patch: NDArray[np.float32], plans: PlansManager, configuration: ConfigurationManager
) -> list[sitk.Image]:
    """Each channel of a patch as a 3D image.

    Args:
        patch: (C, *size), 2 or 3 axes in the plan's order; a 2D patch becomes an image of one slice.
    """
    spacing = patch_spacing(plans, configuration)
    volume = patch if patch.ndim == 4 else patch[:, None]
    backward = list(plans.transpose_backward)
    volume = volume.transpose(0, *(axis + 1 for axis in backward))
    images = [sitk.GetImageFromArray(np.ascontiguousarray(channel)) for channel in volume]
    for image in images:
        image.SetSpacing([spacing[axis] for axis in backward][::-1])
    return images
