"""What an evaluation holds, and means over cases with bootstrap intervals, per structure and over all structures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
RESAMPLES = 10_000
INTERVAL_METHOD = "percentile bootstrap over cases"
ALL_STRUCTURES = "mean over structures"
_BATCH = 1000


@dataclass(frozen=True)
class Estimate:
    """A mean over cases.

    Attributes:
        mean: mean of the defined values; NaN if there is none.
        ci_low: lower end of the confidence interval; None with fewer than two values.
        ci_high: upper end, likewise.
        n: number of defined values.
        n_undefined: number of NaN values that were left out.
    """

    mean: float
    ci_low: float | None
    ci_high: float | None
    n: int
    n_undefined: int


@dataclass(frozen=True)
class ScoreRow:
    """Scores of one structure in one case; units and undefined values as in `metrics.StructureScores`."""

    case: str
    structure: str
    dsc: float
    nsd: float
    hd95_mm: float
    reference_ml: float
    prediction_ml: float


@dataclass(frozen=True)
class CaseMean:
    """Means over the structures of one case; HD95 over those where it is defined, NaN if it is defined in none."""

    case: str
    dsc: float
    nsd: float
    hd95_mm: float
    n_structures: int
    n_undefined_hd95: int


@dataclass(frozen=True)
class Summary:
    """Means over cases of one structure, or of the per-case means over structures.

    Attributes:
        structure: its name, or ALL_STRUCTURES.
        dsc, nsd, hd95_mm: means with confidence intervals.
        n_undefined_hd95: pairs of case and structure whose HD95 is undefined and left out.
        n_both_empty: pairs of case and structure that are empty in reference and prediction and so score 1.
    """

    structure: str
    dsc: Estimate
    nsd: Estimate
    hd95_mm: Estimate
    n_undefined_hd95: int
    n_both_empty: int


@dataclass(frozen=True)
class CaseFailure:
    """A case that could not be scored, and why."""

    case: str
    reason: str


@dataclass(frozen=True)
class Evaluation:
    """Scores of all cases and what is said about them.

    Attributes:
        rows: one per case and structure, cases in order of name, structures in order of the labels.
        structures: one summary per structure.
        case_means: one per case, over its structures.
        overall: mean over the structures of each case, then over cases.
        settings: what the scores depend on: tolerance, labels, rules, definitions, interval, seed.
        failures: cases left out of everything above; empty when all is well.
    """

    rows: tuple[ScoreRow, ...]
    structures: tuple[Summary, ...]
    case_means: tuple[CaseMean, ...]
    overall: Summary
    settings: dict[str, Any]
    failures: tuple[CaseFailure, ...]


def mean_with_interval(
    values: ArrayLike, *, seed: int = 0, confidence: float = CONFIDENCE, resamples: int = RESAMPLES
) -> Estimate:
    """Mean and percentile bootstrap interval, NaN left out and counted.

    Args:
        values: numbers, shape (n,), one a case.
        seed: seed of the resampling; the same seed draws the same cases for every score of the same n.
        confidence: coverage of the interval, between 0 and 1.
        resamples: number of bootstrap samples.

    Raises:
        ValueError: `values` has not one axis.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. Equal to scipy.stats.bootstrap
    (method "percentile"), whose argument for the seed has another name in every few releases.
    """
    numbers = np.asarray(values, dtype=float)
    if numbers.ndim != 1:
        raise ValueError(f"The values must have the shape (n,), not {numbers.shape}.")
    defined = numbers[~np.isnan(numbers)]
    n, n_undefined = len(defined), len(numbers) - len(defined)
    if n < 2:
        return Estimate(float(defined[0]) if n else float("nan"), None, None, n, n_undefined)
    generator = np.random.default_rng(seed)
    sizes = [min(_BATCH, resamples - start) for start in range(0, resamples, _BATCH)]
    means = np.concatenate([defined[generator.integers(n, size=(size, n))].mean(axis=1) for size in sizes])
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Estimate(float(defined.mean()), float(low), float(high), n, n_undefined)


def case_means(rows: Sequence[ScoreRow]) -> tuple[CaseMean, ...]:
    """Means over the structures of each case, in the order in which the cases first appear."""
    by_case: dict[str, list[ScoreRow]] = {}
    for row in rows:
        by_case.setdefault(row.case, []).append(row)
    return tuple(_case_mean(case, of_case) for case, of_case in by_case.items())


def summarise_structure(structure: str, rows: Sequence[ScoreRow], *, seed: int = 0) -> Summary:
    """Means over cases of one structure, from the rows of all structures."""
    own = [row for row in rows if row.structure == structure]
    return _summary(structure, own, own, seed)


def summarise_all(rows: Sequence[ScoreRow], *, seed: int = 0) -> Summary:
    """Mean over the structures of each case first, then over cases: a case is the unit that is sampled."""
    return _summary(ALL_STRUCTURES, case_means(rows), rows, seed)


def _summary(name: str, units: Sequence[ScoreRow | CaseMean], rows: Sequence[ScoreRow], seed: int) -> Summary:
    dsc, nsd, hd95_mm = (
        mean_with_interval([getattr(unit, score) for unit in units], seed=seed) for score in ("dsc", "nsd", "hd95_mm")
    )
    undefined = sum(bool(np.isnan(row.hd95_mm)) for row in rows)
    both_empty = sum(row.reference_ml == 0 and row.prediction_ml == 0 for row in rows)
    return Summary(name, dsc, nsd, hd95_mm, undefined, both_empty)


def _case_mean(case: str, rows: Sequence[ScoreRow]) -> CaseMean:
    distances = [row.hd95_mm for row in rows if not np.isnan(row.hd95_mm)]
    return CaseMean(
        case=case,
        dsc=float(np.mean([row.dsc for row in rows])),
        nsd=float(np.mean([row.nsd for row in rows])),
        hd95_mm=float(np.mean(distances)) if distances else float("nan"),
        n_structures=len(rows),
        n_undefined_hd95=len(rows) - len(distances),
    )
