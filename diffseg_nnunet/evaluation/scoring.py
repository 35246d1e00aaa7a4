"""Score all structures of two label maps by the rules of a protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from diffseg_nnunet.evaluation.metrics import (
    NAN,
    Box,
    StructureScores,
    box_around,
    label_boxes,
    score_structure,
    volumes_ml,
)
from diffseg_nnunet.evaluation.protocols import PLAIN, Protocol
from diffseg_nnunet.evaluation.structures import Structure

OFFICIAL_SCRIPT_CRASHES = (
    "the reference has this structure on one slice only: the official script would end with an error here"
)
_SLICE_AXIS = 0  # of SimpleITK's (z, y, x): the last axis of the file


@dataclass(frozen=True)
class Scored:
    """One structure's scores, and what must be said about them (None: nothing)."""

    scores: StructureScores
    remark: str | None = None


def score_label_maps(
    reference: NDArray[np.integer],
    prediction: NDArray[np.integer],
    structures: Sequence[Structure],
    spacing_mm: Sequence[float],
    protocol: Protocol = PLAIN,
    ignore: int | None = None,
) -> dict[str, Scored]:
    """Compare structures of two label maps.

    Args:
        reference: labels, whole numbers, shape (z, y, x).
        prediction: labels of the same shape.
        structures: what to score, with the values of both maps and the tolerances.
        spacing_mm: voxel spacing in mm, in the order of the axes.
        protocol: the rules.
        ignore: label of the reference whose voxels count for neither side; where it has any, a structure that is empty
            on both sides beside them may not have been annotated at all, and its scores are undefined.

    Returns:
        Name to scores, in the order of `structures`; undefined scores are NaN.

    Raises:
        ValueError: as in `score_structure`.
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"Reference {reference.shape} and prediction {prediction.shape} differ in shape.")
    # the official scripts take a single slice for a volume
    slice_axis = None if protocol.file_axes or 1 not in reference.shape else reference.shape.index(1)
    reference_boxes, prediction_boxes = label_boxes(reference), label_boxes(prediction)
    partial, scored = ignore in reference_boxes, {}
    for structure in structures:
        # Masks of the whole volume, two for every structure, would cost more than the scores of small organs.
        present = [reference_boxes[value] for value in structure.reference if value in reference_boxes]
        present += [prediction_boxes[value] for value in structure.prediction if value in prediction_boxes]
        box = box_around(present, reference.ndim)
        masks = [np.isin(reference[box], structure.reference), np.isin(prediction[box], structure.prediction)]
        if ignore is not None:
            counted = reference[box] != ignore
            masks = [mask & counted for mask in masks]
        rules = replace(protocol, both_empty="left out") if partial else protocol
        scored[structure.name] = _score(masks[0], masks[1], structure, spacing_mm, rules, slice_axis)
    return scored


def _score(
    reference: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    structure: Structure,
    spacing_mm: Sequence[float],
    protocol: Protocol,
    slice_axis: int | None,
) -> Scored:
    volumes = volumes_ml(int(np.count_nonzero(reference)), int(np.count_nonzero(prediction)), spacing_mm)
    in_reference, in_prediction = volumes["reference_ml"] > 0, volumes["prediction_ml"] > 0
    if protocol.both_empty == "left out" and not in_reference and not in_prediction:
        return Scored(_undefined(volumes))
    cut = structure.name in protocol.slices.structures and in_reference
    if cut and (in_prediction or not protocol.empty_prediction_first):
        box = _slices_of(reference, protocol.slices.drops_last)
        reference, prediction = reference[box], prediction[box]
        if protocol.crashes_on_empty_crop and not reference.size:
            return Scored(_undefined(volumes), OFFICIAL_SCRIPT_CRASHES)
    if protocol.file_axes:
        reference, prediction, spacing_mm = reference.T, prediction.T, tuple(spacing_mm)[::-1]
    scores = score_structure(reference, prediction, spacing_mm, structure.tolerance_mm, slice_axis)
    nsd = 0.0 if scores.dsc < protocol.least_dsc_for_nsd else scores.nsd
    return Scored(
        replace(scores, dsc=_rounded(scores.dsc, protocol.digits), nsd=_rounded(nsd, protocol.digits), **volumes)
    )


def _undefined(volumes: dict[str, float]) -> StructureScores:
    return StructureScores(dsc=NAN, nsd=NAN, hd95_mm=NAN, iou=NAN, assd_mm=NAN, **volumes)


def _slices_of(mask: NDArray[np.bool_], drops_last: bool) -> Box:
    """The slices between the first and the last in which the mask is not empty."""
    others = tuple(axis for axis in range(mask.ndim) if axis != _SLICE_AXIS)
    slices = np.flatnonzero(mask.any(axis=others))
    return (slice(int(slices[0]), int(slices[-1]) + (0 if drops_last else 1)),)


def _rounded(score: float, digits: int | None) -> float:
    # numpy's rounding, which the official scripts get: Python's own can differ from it in the last digit.
    return score if digits is None else float(np.round(score, digits))
