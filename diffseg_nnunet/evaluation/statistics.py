"""What an evaluation holds; means over cases with bootstrap intervals, per structure and overall; the worst cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
RESAMPLES = 10_000
INTERVAL_METHOD = (
    "percentile bootstrap over cases, which of few cases covers less than it says: about 90 % of 10, 87 % of 6"
)
ALL_STRUCTURES = "mean over structures"
METRICS = ("dsc", "nsd", "hd95_mm", "iou", "assd_mm", "volume_error_ml", "volume_error_relative")
"""Fields of `ScoreRow` that are averaged."""
WORST_CASES = 5
_BATCH = 1000
_NAN = float("nan")


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


_NO_ESTIMATE = Estimate(_NAN, None, None, 0, 0)


@dataclass(frozen=True)
class ScoreRow:
    """Scores of one structure in one case; units and undefined values as in `metrics.StructureScores`.

    What has a default is missing in reports of version 0.1.
    """

    case: str
    structure: str
    dsc: float
    nsd: float
    hd95_mm: float
    reference_ml: float
    prediction_ml: float
    iou: float = _NAN
    assd_mm: float = _NAN
    volume_error_ml: float = _NAN
    volume_error_relative: float = _NAN


@dataclass(frozen=True)
class CaseMean:
    """Means over the structures of one case; each over those where it is defined, NaN if it is defined in none."""

    case: str
    dsc: float
    nsd: float
    hd95_mm: float
    n_structures: int
    n_undefined_hd95: int
    iou: float = _NAN
    assd_mm: float = _NAN
    volume_error_ml: float = _NAN
    volume_error_relative: float = _NAN


@dataclass(frozen=True)
class Summary:
    """Means over cases of one structure, or of the per-case means over structures.

    Attributes:
        structure: its name, or ALL_STRUCTURES.
        dsc, nsd, hd95_mm, iou, assd_mm, volume_error_ml, volume_error_relative: means with confidence intervals.
        n_undefined_hd95: pairs of case and structure whose HD95 is undefined and left out.
        n_both_empty: pairs of case and structure that are empty in reference and prediction.
    """

    structure: str
    dsc: Estimate
    nsd: Estimate
    hd95_mm: Estimate
    n_undefined_hd95: int
    n_both_empty: int
    iou: Estimate = _NO_ESTIMATE
    assd_mm: Estimate = _NO_ESTIMATE
    volume_error_ml: Estimate = _NO_ESTIMATE
    volume_error_relative: Estimate = _NO_ESTIMATE


@dataclass(frozen=True)
class WorstCase:
    """A case of low mean DSC, and the structure that scores lowest in it."""

    case: str
    dsc: float
    structure: str
    structure_dsc: float


@dataclass(frozen=True)
class Remark:
    """What a reader must know about one structure of one case."""

    case: str
    structure: str
    text: str


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
        settings: what the scores depend on: protocol, tolerances, labels, rules, definitions, interval, seed.
        failures: cases left out of everything above; empty when all is well.
        worst_cases: the cases of lowest mean DSC, the worst first.
        remarks: structures of single cases whose scores need a word.
        official: the protocol's own means (FLARE23's Liver_DSC, Organ_DSC …); empty where it has none.
    """

    rows: tuple[ScoreRow, ...]
    structures: tuple[Summary, ...]
    case_means: tuple[CaseMean, ...]
    overall: Summary
    settings: dict[str, Any]
    failures: tuple[CaseFailure, ...]
    worst_cases: tuple[WorstCase, ...] = ()
    remarks: tuple[Remark, ...] = ()
    official: dict[str, float] = field(default_factory=dict)


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

    Of few values it is too narrow, as if divided by n instead of n - 1, and by normal instead of t quantiles.

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
    return tuple(_case_mean(case, of_case) for case, of_case in _by_case(rows).items())


def summarise_structure(structure: str, rows: Sequence[ScoreRow], *, seed: int = 0) -> Summary:
    """Means over cases of one structure, from the rows of all structures."""
    own = [row for row in rows if row.structure == structure]
    return _summary(structure, own, own, seed)


def summarise_all(rows: Sequence[ScoreRow], *, seed: int = 0) -> Summary:
    """Mean over the structures of each case first, then over cases: a case is the unit that is sampled."""
    return _summary(ALL_STRUCTURES, case_means(rows), rows, seed)


def worst_cases(rows: Sequence[ScoreRow], most: int = WORST_CASES) -> tuple[WorstCase, ...]:
    """The cases of lowest mean DSC over their structures, the worst first, each with its lowest structure.

    Cases in which no structure has a DSC are left out; equal cases come in their order.
    """
    by_case = _by_case(rows)
    means = [mean for mean in case_means(rows) if not np.isnan(mean.dsc)]
    found = []
    for mean in sorted(means, key=lambda mean: mean.dsc)[:most]:
        lowest = min((row for row in by_case[mean.case] if not np.isnan(row.dsc)), key=lambda row: row.dsc)
        found.append(WorstCase(mean.case, mean.dsc, lowest.structure, lowest.dsc))
    return tuple(found)


def _by_case(rows: Sequence[ScoreRow]) -> dict[str, list[ScoreRow]]:
    by_case: dict[str, list[ScoreRow]] = {}
    for row in rows:
        by_case.setdefault(row.case, []).append(row)
    return by_case


def _summary(name: str, units: Sequence[ScoreRow | CaseMean], rows: Sequence[ScoreRow], seed: int) -> Summary:
    estimates = {metric: mean_with_interval([getattr(unit, metric) for unit in units], seed=seed) for metric in METRICS}
    undefined = sum(bool(np.isnan(row.hd95_mm)) for row in rows)
    both_empty = sum(row.reference_ml == 0 and row.prediction_ml == 0 for row in rows)
    return Summary(structure=name, n_undefined_hd95=undefined, n_both_empty=both_empty, **estimates)


def _case_mean(case: str, rows: Sequence[ScoreRow]) -> CaseMean:
    means = {metric: _mean([getattr(row, metric) for row in rows]) for metric in METRICS}
    undefined = sum(bool(np.isnan(row.hd95_mm)) for row in rows)
    return CaseMean(case=case, n_structures=len(rows), n_undefined_hd95=undefined, **means)


def _mean(values: Sequence[float]) -> float:
    """The mean of the defined values; NaN if there is none."""
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else _NAN
