"""DSC, NSD and HD95 of structures: overlap of two volumes, overlap and distance of two surfaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import surface_distance
from numpy.typing import NDArray
from scipy import ndimage

HD95_PERCENT = 95
DSC_BOTH_EMPTY = 1.0
NSD_BOTH_EMPTY = 1.0
HD95_MM_BOTH_EMPTY = 0.0
DSC_ONE_EMPTY = 0.0
NSD_ONE_EMPTY = 0.0
HD95_MM_ONE_EMPTY = float("nan")

ABSENT_STRUCTURE_RULES = (
    "Structure empty in both reference and prediction: DSC = NSD = 1, HD95 = 0 mm. "
    "Empty in exactly one: DSC = NSD = 0, HD95 undefined (null or empty), left out of the mean of HD95 and counted."
)
DEFINITIONS = {
    "dsc": "2 |R and P| / (|R| + |P|) over voxels, 0 to 1.",
    "nsd": "Share of the area of both surfaces that lies within the tolerance of the other surface, 0 to 1 "
    "(Nikolov et al., arXiv:1809.04430).",
    "hd95_mm": "Larger of the two directed 95th percentiles of surface distance, weighted by surface area, in mm "
    "(deepmind surface-distance, compute_robust_hausdorff).",
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
    """

    dsc: float
    nsd: float
    hd95_mm: float
    reference_ml: float
    prediction_ml: float


def score_structure(
    reference: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    spacing_mm: Sequence[float],
    tolerance_mm: float,
) -> StructureScores:
    """Compare two masks of one structure; both masks may be exchanged without changing DSC, NSD and HD95.

    Args:
        reference: bool mask, shape (z, y, x).
        prediction: bool mask of the same shape.
        spacing_mm: voxel spacing in mm, in the order of the masks' axes.
        tolerance_mm: distance in mm within which two surfaces count as one (NSD).

    Returns:
        The scores; where a mask is empty, by ABSENT_STRUCTURE_RULES.

    Raises:
        ValueError: masks that are not bool, not 3D or not of one shape; a spacing that is not three positive numbers;
            a negative tolerance.

    Source: definitions and surface elements of Nikolov et al., arXiv:1809.04430, in deepmind's surface-distance.
    """
    _check(reference, prediction, spacing_mm, tolerance_mm)
    # The surfaces depend on nothing beyond the masks' neighbours, so the crop changes no score, only the time.
    box = joint_box(reference, prediction)
    reference, prediction = reference[box], prediction[box]
    n_reference, n_prediction = int(np.count_nonzero(reference)), int(np.count_nonzero(prediction))
    voxel_ml = float(np.prod(np.asarray(spacing_mm, dtype=float))) / 1000
    if n_reference and n_prediction:
        dsc = 2 * int(np.count_nonzero(reference & prediction)) / (n_reference + n_prediction)
        nsd, hd95_mm = _surface_scores(reference, prediction, spacing_mm, tolerance_mm)
    elif n_reference or n_prediction:
        dsc, nsd, hd95_mm = DSC_ONE_EMPTY, NSD_ONE_EMPTY, HD95_MM_ONE_EMPTY
    else:
        dsc, nsd, hd95_mm = DSC_BOTH_EMPTY, NSD_BOTH_EMPTY, HD95_MM_BOTH_EMPTY
    return StructureScores(dsc, nsd, hd95_mm, n_reference * voxel_ml, n_prediction * voxel_ml)


def score_label_maps(
    reference: NDArray[np.integer],
    prediction: NDArray[np.integer],
    structures: Mapping[str, Sequence[int]],
    spacing_mm: Sequence[float],
    tolerance_mm: float,
    ignore: int | None = None,
) -> dict[str, StructureScores]:
    """Compare all structures of two label maps.

    Args:
        reference: labels, whole numbers from 0, shape (z, y, x).
        prediction: labels of the same shape.
        structures: name to label values; the structure is the union of the values.
        spacing_mm: voxel spacing in mm, in the order of the axes.
        tolerance_mm: tolerance of NSD in mm.
        ignore: label of the reference whose voxels count for neither side.

    Returns:
        Name to scores, in the order of `structures`.

    Raises:
        ValueError: as in `score_structure`.
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"Reference {reference.shape} and prediction {prediction.shape} differ in shape.")
    boxes = [label_boxes(reference), label_boxes(prediction)]
    scores = {}
    for name, values in structures.items():
        # Masks of the whole volume, two for every structure, would cost more than the scores of small organs.
        box = _union([of_map[value] for of_map in boxes for value in values if value in of_map], reference.ndim)
        masks = [np.isin(labels[box], values) for labels in (reference, prediction)]
        if ignore is not None:
            counted = reference[box] != ignore
            masks = [mask & counted for mask in masks]
        scores[name] = score_structure(masks[0], masks[1], spacing_mm, tolerance_mm)
    return scores


def label_boxes(labels: NDArray[np.integer]) -> dict[int, Box]:
    """The bounding box of every label above 0 that is present, in one pass over the map."""
    found = enumerate(ndimage.find_objects(labels), start=1)
    return {value: box for value, box in found if box is not None}


def _union(boxes: Sequence[Box], ndim: int) -> Box:
    """The smallest box around all boxes, of size 0 without any."""
    if not boxes:
        return (slice(0, 0),) * ndim
    return tuple(slice(min(s.start for s in sides), max(s.stop for s in sides)) for sides in zip(*boxes, strict=True))


def joint_box(reference: NDArray[np.bool_], prediction: NDArray[np.bool_], margin: int = 1) -> Box:
    """The smallest box around both masks, widened by `margin` voxels within the volume; of size 0 if both are empty."""
    found = ndimage.find_objects((reference | prediction).view(np.uint8), max_label=1)[0]
    if found is None:
        return (slice(0, 0),) * reference.ndim
    return tuple(slice(max(0, side.start - margin), side.stop + margin) for side in found)


def _surface_scores(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing_mm: Sequence[float], tolerance_mm: float
) -> tuple[float, float]:
    """NSD and HD95 in mm of two masks that are not empty."""
    distances = surface_distance.compute_surface_distances(reference, prediction, spacing_mm)
    nsd = surface_distance.compute_surface_dice_at_tolerance(distances, tolerance_mm)
    hd95_mm = surface_distance.compute_robust_hausdorff(distances, HD95_PERCENT)
    # Two sums in different orders can exceed the whole by a rounding error.
    return min(1.0, float(nsd)), float(hd95_mm)


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
