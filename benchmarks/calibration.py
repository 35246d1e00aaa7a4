"""How far a segmentation's probabilities can be believed: calibration error, and whether the entropy finds the errors.

All of it over the voxels of the box around the reference's foreground, widened by a margin: the same voxels for every
prediction of a case, chosen by none of them. Most of a scan is background that nobody mistakes, which would hide every
difference; and voxels that a prediction calls foreground are others before and after refinement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from diffseg_nnunet.inference.uncertainty import entropy
from diffseg_nnunet.verification import read_volume

BINS = 15
MARGIN_MM = 15.0


@dataclass(frozen=True)
class Calibration:
    """Of one case.

    Attributes:
        error: expected calibration error, 0..1.
        auroc: of the voxels' entropy for "the label is wrong"; NaN where all or none are.
        mean_bits: mean entropy.
    """

    error: float
    auroc: float
    mean_bits: float


def expected_calibration_error(confidence: NDArray, correct: NDArray[np.bool_], bins: int = BINS) -> float:
    """Mean over voxels of |accuracy - confidence| of the bin they are in, bins of equal width.

    Args:
        confidence: probability of the most probable class, 0..1, of any shape.
        correct: whether that class is the reference's, of the same shape.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, eq. 3.
    """
    confidence = np.asarray(confidence, dtype=np.float64)
    surplus = confidence - correct
    edges = np.linspace(0, 1, bins + 1)
    sums, _ = np.histogram(confidence, edges, weights=surplus)
    return float(np.abs(sums).sum() / confidence.size)


def calibration(probabilities: NDArray[np.floating], reference: NDArray[np.integer]) -> Calibration:
    """Of the voxels given.

    Args:
        probabilities: (K, *shape), of classes 0..K-1 that exclude each other.
        reference: (*shape), labels 0..K-1.
    """
    bits = entropy(regions=False)(torch.from_numpy(np.ascontiguousarray(probabilities))).numpy()
    correct = probabilities.argmax(axis=0) == reference
    # float16 and resampling may take a probability a rounding error beyond 1
    confidence = np.clip(probabilities.max(axis=0), 0, 1)
    mixed = 0 < np.count_nonzero(correct) < correct.size
    auroc = float(roc_auc_score(~correct.ravel(), bits.ravel())) if mixed else float("nan")
    return Calibration(expected_calibration_error(confidence, correct), auroc, float(bits.mean()))


def foreground_box(
    reference: NDArray[np.integer], spacing_mm: Sequence[float], margin_mm: float = MARGIN_MM
) -> tuple[slice, ...]:
    """The box around all foreground, widened by a margin on every side, within the volume; all of it without any."""
    found = find_objects((reference > 0).astype(np.uint8))
    if not found:
        return tuple(slice(0, size) for size in reference.shape)
    steps = [int(np.ceil(margin_mm / spacing)) for spacing in spacing_mm]
    return tuple(
        slice(max(0, axis.start - step), min(size, axis.stop + step))
        for axis, step, size in zip(found[0], steps, reference.shape, strict=True)
    )


def case_calibration(probabilities: Path, reference: Path) -> Calibration:
    """Of one case on disk.

    Args:
        probabilities: nnU-Net's .npz, on the grid of the image.
        reference: the label map, labels 0..K-1.
    """
    image = read_volume(reference)
    labels = sitk.GetArrayFromImage(image)
    box = foreground_box(labels, image.GetSpacing()[::-1])
    with np.load(probabilities, allow_pickle=False) as content:
        found = content["probabilities"]
    if found.shape[1:] != labels.shape:
        raise ValueError(f"{probabilities} is of shape {found.shape[1:]}, its reference of {labels.shape}")
    return calibration(found[(slice(None), *box)].astype(np.float32), labels[box])


def rank_correlation(bits: Sequence[float], dsc: Sequence[float]) -> float:
    """Spearman's, over cases, of the mean entropy with 1 - DSC; NaN with fewer than three cases."""
    if len(bits) < 3:
        return float("nan")
    return float(spearmanr(bits, 1 - np.asarray(dsc)).statistic)
