"""Scores of one structure: overlap and size of two volumes, overlap and distance of two surfaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from diffseg_nnunet.evaluation.surfaces import surface_distances

HD95_PERCENT = 95
NAN = float("nan")

ABSENT_STRUCTURE_RULES = (
    "Structure empty in both reference and prediction: DSC = IoU = NSD = 1, HD95 = ASSD = 0 mm, volume error 0 "
    "(where the reference has voxels to ignore, in which it may be: undefined, left out of all means). "
    "Empty in exactly one: DSC = IoU = NSD = 0, HD95 and ASSD undefined (null or empty), left out of their means and "
    "counted; the relative volume error is undefined too where the reference is empty."
)
DEFINITIONS = {
    "dsc": "2 |R and P| / (|R| + |P|) over voxels, 0 to 1.",
    "iou": "|R and P| / |R or P| over voxels, 0 to 1.",
    "nsd": "Share of the area of both surfaces that lies within the tolerance of the other surface, 0 to 1 "
    "(Nikolov et al., arXiv:1809.04430).",
    "hd95_mm": "Larger of the two directed 95th percentiles of surface distance, weighted by surface area, in mm "
    "(as in deepmind's surface-distance, compute_robust_hausdorff). Of an image of one slice, surfaces are contours.",
    "assd_mm": "Mean surface distance over the area of both surfaces together, in mm.",
    "volume_error_ml": "|P| - |R| in ml: above 0 where the prediction is too large.",
    "volume_error_relative": "(|P| - |R|) / |R|.",
}

Box = tuple[slice, ...]


@dataclass(frozen=True)
class StructureScores:
    """Scores of one structure in one case.

    Attributes:
        dsc: Dice similarity coefficient, 0 to 1.
        nsd: normalised surface Dice at the tolerance, 0 to 1.
        hd95_mm: 95th percentile of the Hausdorff distance in mm; NaN where undefined (see ABSENT_STRUCTURE_RULES).
        reference_ml: volume of the reference in millilitres.
        prediction_ml: volume of the prediction in millilitres.
        iou: intersection over union (Jaccard index), 0 to 1.
        assd_mm: average symmetric surface distance in mm; NaN where undefined.
        volume_error_ml: prediction minus reference, in millilitres.
        volume_error_relative: the same over the reference's volume; NaN where the reference alone is empty.
    """

    dsc: float
    nsd: float
    hd95_mm: float
    reference_ml: float
    prediction_ml: float
    iou: float
    assd_mm: float
    volume_error_ml: float
    volume_error_relative: float


def score_structure(
    reference: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    spacing_mm: Sequence[float],
    tolerance_mm: float,
    slice_axis: int | None = None,
) -> StructureScores:
    """Compare two masks of one structure; both masks may be exchanged without changing DSC, NSD and HD95.

    Args:
        reference: bool mask, shape (z, y, x).
        prediction: bool mask of the same shape.
        spacing_mm: voxel spacing in mm, in the order of the masks' axes.
        tolerance_mm: distance in mm within which two surfaces count as one (NSD).
        slice_axis: across which the whole image is a single slice, whose surfaces are contours; None: it is a volume.

    Returns:
        The scores; where a mask is empty, by ABSENT_STRUCTURE_RULES.

    Raises:
        ValueError: masks that are not bool, not 3D or not of one shape; a spacing that is not three positive numbers;
            a negative tolerance.

    Source: definitions and surface elements of Nikolov et al., arXiv:1809.04430, in deepmind's surface-distance.
    """
    _check(reference, prediction, spacing_mm, tolerance_mm)
    # Beyond the masks all is empty, so the crop changes no score, only the time.
    box = joint_box(reference, prediction)
    reference, prediction = reference[box], prediction[box]
    n_reference, n_prediction = int(np.count_nonzero(reference)), int(np.count_nonzero(prediction))
    if n_reference and n_prediction:
        shared = int(np.count_nonzero(reference & prediction))
        dsc, iou = 2 * shared / (n_reference + n_prediction), shared / (n_reference + n_prediction - shared)
        kept = [axis for axis in range(reference.ndim) if axis != slice_axis]
        shape = [reference.shape[axis] for axis in kept]
        surfaces = surface_distances(
            reference.reshape(shape), prediction.reshape(shape), [spacing_mm[axis] for axis in kept]
        )
        nsd, hd95_mm = surfaces.dice(tolerance_mm), surfaces.hausdorff_mm(HD95_PERCENT)
        assd_mm = surfaces.average_mm()
    elif n_reference or n_prediction:
        dsc, iou, nsd, hd95_mm, assd_mm = 0.0, 0.0, 0.0, NAN, NAN
    else:
        dsc, iou, nsd, hd95_mm, assd_mm = 1.0, 1.0, 1.0, 0.0, 0.0
    volumes = volumes_ml(n_reference, n_prediction, spacing_mm)
    return StructureScores(dsc=dsc, nsd=nsd, hd95_mm=hd95_mm, iou=iou, assd_mm=assd_mm, **volumes)


def volumes_ml(n_reference: int, n_prediction: int, spacing_mm: Sequence[float]) -> dict[str, float]:
    """Volumes of two masks of so many voxels, and the prediction's error, as `StructureScores` names them."""
    voxel_ml = float(np.prod(np.asarray(spacing_mm, dtype=float))) / 1000
    error = n_prediction - n_reference
    relative = error / n_reference if n_reference else (NAN if error else 0.0)
    return {
        "reference_ml": n_reference * voxel_ml,
        "prediction_ml": n_prediction * voxel_ml,
        "volume_error_ml": error * voxel_ml,
        "volume_error_relative": relative,
    }


def label_boxes(labels: NDArray[np.integer]) -> dict[int, Box]:
    """The bounding box of every label above 0 that is present, in one pass over the map."""
    found = enumerate(ndimage.find_objects(labels), start=1)
    return {value: box for value, box in found if box is not None}


def box_around(boxes: Sequence[Box], ndim: int) -> Box:
    """The smallest box around all boxes, of size 0 without any."""
    if not boxes:
        return (slice(0, 0),) * ndim
    return tuple(slice(min(s.start for s in sides), max(s.stop for s in sides)) for sides in zip(*boxes, strict=True))


def joint_box(reference: NDArray[np.bool_], prediction: NDArray[np.bool_]) -> Box:
    """The smallest box around both masks, of size 0 if both are empty."""
    found = ndimage.find_objects((reference | prediction).view(np.uint8), max_label=1)[0]
    return (slice(0, 0),) * reference.ndim if found is None else found


def _check(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing_mm: Sequence[float], tolerance_mm: float
) -> None:
    for name, mask in (("reference", reference), ("prediction", prediction)):
        if mask.dtype != np.bool_ or mask.ndim != 3:
            raise ValueError(f"The {name} must be a 3D bool mask, not {mask.ndim}D {mask.dtype}.")
    if reference.shape != prediction.shape:
        raise ValueError(f"Reference {reference.shape} and prediction {prediction.shape} differ in shape.")
    if len(spacing_mm) != 3 or not all(np.isfinite(side) and side > 0 for side in spacing_mm):
        raise ValueError(f"The spacing must be three positive numbers in mm, not {tuple(spacing_mm)}.")
    if not tolerance_mm >= 0:
        raise ValueError(f"The tolerance must be 0 mm or more, not {tolerance_mm}.")
