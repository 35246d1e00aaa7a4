"""The pseudo DSC of a refiner's training: hard counts of patches, added up over batches and processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from torch import Tensor

from diffseg_nnunet.refinement.masks import labels_of, masks_of
from diffseg_nnunet.training import processes
from diffseg_nnunet.training.refining import Targets


def hard_counts(probability: Tensor, target: Any, targets: Targets) -> list[np.ndarray]:
    """True positives, false positives and false negatives of each class but the background, as nnU-Net's.

    Args:
        probability: (B, K, ...).
        target: nnU-Net's.
        targets: how that is read.
    """
    clean, valid = targets.masks(target)
    hard = (probability > 0.5).float() if targets.regions else masks_of(labels_of(probability), range(targets.classes))
    axes = [0, *range(2, hard.ndim)]
    counts = get_tp_fp_fn_tn(hard, clean, axes=axes, mask=None if valid is None else valid.float())[:3]
    return [count.cpu().numpy()[0 if targets.regions else 1 :] for count in counts]


def mean_dsc(counts: Sequence[Sequence[np.ndarray]]) -> float:
    """Mean over the classes, of the counts of all batches of all processes; NaN without any."""
    rows = [row for part in processes.gathered(list(counts)) for row in part]
    if not rows:
        return math.nan
    tp, fp, fn = np.sum(rows, axis=0)
    with np.errstate(invalid="ignore"):
        return float(np.nanmean(2 * tp / (2 * tp + fp + fn)))
