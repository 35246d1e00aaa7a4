"""Stepping down: the largest batch whose measured peak memory keeps to a budget, and what to plan with if none does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from diffseg_nnunet.planning.gpus import GPU_RESERVE_GIB, SMALLEST_BUDGET_GIB

_AFTER_RUNNING_OUT = 0.9  # [default] of the budget: how much too large it was is not known then


@dataclass(frozen=True)
class Trial:
    """One batch that was tried.

    Attributes:
        batch_size: patches.
        peak_gib: measured, GiB; None: the memory ran out.
    """

    batch_size: int
    peak_gib: float | None


def step_down(
    batch_size: int, group: int, smallest: int, budget_gib: float, measure: Callable[[int], float | None]
) -> list[Trial]:
    """Try batches from the planned one downwards until one keeps to the budget or the smallest has been tried.

    A step is one group. Where a measured peak is so far above the budget that memory in proportion to the batch would
    still be, smaller batches are skipped: some memory does not shrink with the batch, so none of them could fit.

    Args:
        batch_size: planned.
        group: samples that stay together.
        smallest: batch that is of use.
        measure: from a batch to its peak in GiB; None where the memory runs out.

    Returns:
        All that was tried, the last being the result: see :func:`fits`.
    """
    trials = []
    while True:
        trials.append(Trial(batch_size, measure(batch_size)))
        if fits(trials[-1], budget_gib) or batch_size - group < smallest:
            return trials
        below, peak = batch_size - group, trials[-1].peak_gib
        if peak is not None:
            in_proportion = math.floor(batch_size * budget_gib / peak / group) * group
            below = min(below, max(in_proportion, smallest))
        batch_size = below


def fits(trial: Trial, budget_gib: float) -> bool:
    """Whether a batch was measured, and kept to the budget."""
    return trial.peak_gib is not None and trial.peak_gib <= budget_gib


def smaller_budget(budget_gib: float, free_gib: float, peak_gib: float | None) -> float | None:
    """The budget to plan with where the smallest batch does not fit: smaller by what the prediction was too low.

    Args:
        budget_gib: planned for.
        free_gib: free on the GPU before.
        peak_gib: measured of the smallest batch; None: the memory ran out.

    Returns:
        GiB, rounded down to 0.1; None where nothing of use is left.
    """
    if peak_gib is None:
        wanted = min(_AFTER_RUNNING_OUT * budget_gib, free_gib - GPU_RESERVE_GIB)
    else:
        wanted = budget_gib * min(1.0, budget_gib / peak_gib)
    wanted = math.floor(wanted * 10) / 10
    return wanted if wanted >= SMALLEST_BUDGET_GIB else None
