"""Two predictions of the same cases, case by case: differences, Wilcoxon's signed-rank test, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.evaluation.statistics import ALL_STRUCTURES, Estimate, Evaluation, ScoreRow, mean_with_interval

HIGHER_IS_BETTER = {"dsc": True, "nsd": True, "iou": True, "hd95_mm": False, "assd_mm": False}
"""The scores that are compared, and which way is better."""
COMPARISON_METHOD = (
    "Differences are prediction minus against, per case; overall: of each case's mean over the structures "
    "that both sides define. Interval: "
    "percentile bootstrap over cases. p: two-sided Wilcoxon signed-rank test, zero differences dropped (1 if there is "
    "none else). p_holm: Holm's correction over the structures, per score; overall is one test of its own and is not "
    "corrected. rank_biserial: matched-pairs rank-biserial correlation, -1 to 1, above 0 where the prediction is "
    "better. A score that is undefined on either side is left out and counted: a side that misses a structure "
    "altogether is punished by its DSC, IoU and NSD, not by its distances. Where one side invents a structure, "
    "one that rightly leaves it out has these scores of 1, also by protocols that leave out what is in neither map."
)

_OVERLAPS = ("dsc", "nsd", "iou")
LEVEL = 0.05
_DECIMALS = 9


@dataclass(frozen=True)
class PairedScore:
    """Two predictions compared by one score of one structure.

    Attributes:
        structure: its name, or ALL_STRUCTURES.
        metric: a key of HIGHER_IS_BETTER.
        difference: mean of prediction minus against, with its interval; n counts the pairs.
        p: of the Wilcoxon signed-rank test; None without any pair.
        p_holm: corrected over the structures; None for the mean over structures, and without p.
        rank_biserial: effect size, above 0 where the prediction is better; None without any pair.
        wins, ties, losses: of the prediction, in cases.
    """

    structure: str
    metric: str
    difference: Estimate
    p: float | None
    p_holm: float | None
    rank_biserial: float | None
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class Comparison:
    """All comparisons, and the cases that could not be compared.

    Attributes:
        scores: by structure in the evaluations' order, then the mean over structures; by metric within each.
        cases: those scored on both sides.
        left_out: cases that failed on one side at least.
        method: how to read it, and whether the cases suffice to show anything.
    """

    scores: tuple[PairedScore, ...]
    cases: tuple[str, ...]
    left_out: tuple[str, ...]
    method: str = COMPARISON_METHOD


def compare(prediction: Evaluation, against: Evaluation, *, seed: int = 0) -> Comparison:
    """Compare two evaluations of the same references, structure by structure and overall.

    Raises:
        BadInputError: they share no scored case, or differ in structures, protocol or tolerances.
    """
    for what in ("protocol", "structures"):
        if prediction.settings.get(what) != against.settings.get(what):
            raise BadInputError(f"The two evaluations differ in their {what}.", "Evaluate both by the same rules.")
    cases = _shared_cases(prediction, against)
    if not cases:
        raise BadInputError("No case was scored in both predictions.", "See the failures of both evaluations.")
    prediction, against = completed([prediction, against])
    structures = [summary.structure for summary in prediction.structures]
    scores: list[PairedScore] = []
    for metric in HIGHER_IS_BETTER:
        differences = _table(prediction, metric, structures, cases) - _table(against, metric, structures, cases)
        means = _mean_of_defined(differences)
        # Equal scores of two maps may differ in the last bit: neither a win nor a rank of its own.
        differences, means = (np.round(values, _DECIMALS) for values in (differences, means))
        of_metric = [_paired_score(name, metric, row, seed) for name, row in zip(structures, differences, strict=True)]
        scores += [*_with_holm(of_metric), _paired_score(ALL_STRUCTURES, metric, means, seed)]
    order = {structure: place for place, structure in enumerate([*structures, ALL_STRUCTURES])}
    scores.sort(key=lambda score: order[score.structure])
    left_out = {failure.case for failure in (*prediction.failures, *against.failures)}
    limit = out_of_reach(len(cases), len(structures), "structures")
    method = COMPARISON_METHOD if limit is None else f"{COMPARISON_METHOD} {limit}"
    return Comparison(tuple(scores), cases, tuple(sorted(left_out)), method)


def completed(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Evaluations of the same references, in which what is rightly left out scores 1 where another one invents it.

    Protocols that leave a structure out which is in neither map define its overlap for a prediction that invents it
    alone: compared or averaged with one that does not, the error would fall out of both. The rows alone are changed;
    means over them are the caller's to make anew.
    """
    scored = [{(row.case, row.structure): row for row in each.rows} for each in evaluations]
    changes: list[dict[tuple[str, str], dict[str, float]]] = [{} for _ in evaluations]
    for key in set().union(*scored):
        rows = [rows.get(key) for rows in scored]
        for metric in _OVERLAPS:
            if any(row is not None and not math.isnan(getattr(row, metric)) for row in rows):
                for row, changed in zip(rows, changes, strict=True):
                    if row is not None and _is_left_out(row, metric):
                        changed.setdefault(key, {})[metric] = 1.0
    return [
        replace(each, rows=tuple(replace(row, **changed.get((row.case, row.structure), {})) for row in each.rows))
        for each, changed in zip(evaluations, changes, strict=True)
    ]


def _is_left_out(row: ScoreRow, metric: str) -> bool:
    """Whether a score is undefined since neither map has the structure."""
    return math.isnan(getattr(row, metric)) and row.reference_ml == 0 and row.prediction_ml == 0


def smallest_p(cases: int) -> float:
    """Of the exact two-sided signed-rank test: all differences have one sign, as 2 of 2^n outcomes have."""
    return min(1.0, 2.0 ** (1 - cases))


def out_of_reach(cases: int, tests: int, over: str) -> str | None:
    """That so few cases cannot give a p below LEVEL whatever they are, as a sentence; None where they can.

    Args:
        tests: that Holm's correction is over.
        over: what these are, in the plural.
    """
    least = min(1.0, tests * smallest_p(cases))
    if least < LEVEL:
        return None
    return (
        f"With {cases} case(s) the smallest p there can be is {smallest_p(cases):.2g}, and corrected over {tests} "
        f"{over} {least:.2g}: nothing can be below {LEVEL:g} after correction."
    )


def signed_rank_test(differences: ArrayLike) -> float:
    """p of the two-sided Wilcoxon signed-rank test, zeros dropped; 1 if all are zero.

    scipy's exact distribution for few differences without ties, its normal approximation for the rest.
    """
    values = np.asarray(differences, dtype=float)
    values = values[values != 0]
    return float(stats.wilcoxon(values).pvalue) if values.size else 1.0


def rank_biserial(differences: ArrayLike) -> float:
    """Matched-pairs rank-biserial correlation: share of the ranks of positive differences minus that of negative ones.

    Zeros are dropped; 0 if all are zero. Source: Kerby, Comprehensive Psychology 3, 2014.
    """
    values = np.asarray(differences, dtype=float)
    values = values[values != 0]
    if not values.size:
        return 0.0
    ranks = stats.rankdata(np.abs(values))
    return float((ranks[values > 0].sum() - ranks[values < 0].sum()) / ranks.sum())


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down correction, in the order given.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    steps = p[order] * np.arange(len(p), 0, -1)
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected


def _shared_cases(prediction: Evaluation, against: Evaluation) -> tuple[str, ...]:
    others = {mean.case for mean in against.case_means}
    return tuple(mean.case for mean in prediction.case_means if mean.case in others)


def _table(evaluation: Evaluation, metric: str, structures: Sequence[str], cases: Sequence[str]) -> NDArray[np.float64]:
    """Scores, shape (structures, cases)."""
    scores = {(row.structure, row.case): getattr(row, metric) for row in evaluation.rows}
    return np.array([[scores[structure, case] for case in cases] for structure in structures], dtype=float)


def _mean_of_defined(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over structures of each case, shape (cases,): over those that both sides define, NaN without any."""
    defined = ~np.isnan(differences)
    count = defined.sum(axis=0)
    total = np.where(defined, differences, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(differences.shape[1], np.nan), where=count > 0)


def _paired_score(structure: str, metric: str, differences: NDArray[np.float64], seed: int) -> PairedScore:
    defined = differences[~np.isnan(differences)]
    better = defined if HIGHER_IS_BETTER[metric] else -defined
    return PairedScore(
        structure=structure,
        metric=metric,
        difference=mean_with_interval(differences, seed=seed),
        p=signed_rank_test(defined) if defined.size else None,
        p_holm=None,
        rank_biserial=rank_biserial(better) if defined.size else None,
        wins=int((better > 0).sum()),
        ties=int((better == 0).sum()),
        losses=int((better < 0).sum()),
    )


def _with_holm(scores: Sequence[PairedScore]) -> list[PairedScore]:
    """The scores of all structures by one metric, with their corrected p."""
    tested = [index for index, score in enumerate(scores) if score.p is not None]
    corrected = dict(zip(tested, holm([scores[index].p for index in tested]).tolist(), strict=True))
    return [replace(score, p_holm=corrected.get(index)) for index, score in enumerate(scores)]
