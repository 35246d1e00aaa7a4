"""From the scores of runs to what a table says: means over seeds, intervals over cases, differences to the twin."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from diffseg_nnunet.benchmarking.protocol import TWIN
from diffseg_nnunet.benchmarking.runs import Run, RunRecord
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.evaluation.comparison import Comparison, PairedScore, compare, completed, holm, out_of_reach
from diffseg_nnunet.evaluation.statistics import (
    ALL_STRUCTURES,
    Evaluation,
    ScoreRow,
    case_means,
    summarise_all,
    summarise_structure,
)

SHOWN_METRICS = ("dsc", "nsd", "hd95_mm")
METHOD = (
    "The scores of a test case are averaged over the seeds first; means and 95 % intervals (percentile bootstrap) are "
    "over test cases, the spread is over the seeds' own means. Differences to the twin are of the same case and the "
    "same seeds, averaged over the seeds in which both define the score; p is of a two-sided Wilcoxon signed-rank test "
    "over test cases, and Holm's correction is over the label budgets of a strategy."
)
_SCORES = tuple(each.name for each in fields(ScoreRow) if each.name not in ("case", "structure"))


@dataclass(frozen=True)
class Outcome:
    """A run that has finished."""

    run: Run
    record: RunRecord
    evaluation: Evaluation


@dataclass(frozen=True)
class Spread:
    """How much the mean over test cases differs from seed to seed; `deviation` (n - 1) is None for one seed."""

    by_seed: Mapping[int, float]

    @property
    def deviation(self) -> float | None:
        return float(np.std([*self.by_seed.values()], ddof=1)) if len(self.by_seed) > 1 else None

    @property
    def range(self) -> tuple[float, float]:
        return min(self.by_seed.values()), max(self.by_seed.values())


@dataclass(frozen=True)
class Group:
    """All runs of one strategy and budget.

    Attributes:
        strategy, labels: what they have in common.
        labelled_cases: mean over seeds and folds of the training cases with labels.
        seeds: those all of whose folds have finished.
        evaluation: of the scores averaged over the seeds.
        evaluations: by seed.
        comparison: with the twin, over the seeds that both have; None for the twin itself, or without such a seed.
        compared_seeds: these.
        p_holm: metric -> p of the mean over structures, corrected over the strategy's budgets.
    """

    strategy: str
    labels: str
    labelled_cases: float
    seeds: tuple[int, ...]
    evaluation: Evaluation
    evaluations: Mapping[int, Evaluation]
    comparison: Comparison | None = None
    compared_seeds: tuple[int, ...] = ()
    p_holm: Mapping[str, float] | None = None

    def spread(self, metric: str, structure: str = ALL_STRUCTURES) -> Spread:
        return Spread({seed: _mean(evaluation, metric, structure) for seed, evaluation in self.evaluations.items()})

    def paired(self, metric: str, structure: str = ALL_STRUCTURES) -> PairedScore | None:
        """The difference to the twin by one score of one structure."""
        scores = () if self.comparison is None else self.comparison.scores
        return next((each for each in scores if (each.metric, each.structure) == (metric, structure)), None)


def _mean(evaluation: Evaluation, metric: str, structure: str) -> float:
    summaries = (*evaluation.structures, evaluation.overall)
    return next(getattr(summary, metric).mean for summary in summaries if summary.structure == structure)


def averaged(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Scores of the same cases averaged, structure by structure, over evaluations that differ in the seed.

    An undefined score is left out of the average of its structure and case, unless another seed invents what this one
    rightly leaves out (:func:`~diffseg_nnunet.evaluation.comparison.completed`); a case that one of them could not
    score is left out altogether, and is a failure.
    """
    first, evaluations = evaluations[0], completed(evaluations)
    scored = set.intersection(*({mean.case for mean in evaluation.case_means} for evaluation in evaluations))
    values: dict[tuple[str, str], list[ScoreRow]] = defaultdict(list)
    for row in (row for evaluation in evaluations for row in evaluation.rows if row.case in scored):
        values[row.case, row.structure].append(row)
    rows = [ScoreRow(*key, **_defined_means(same)) for key, same in values.items()]
    failures = {failure.case: failure for evaluation in evaluations for failure in evaluation.failures}
    return _evaluation(first, rows, [failures[case] for case in sorted(failures)])


def joined(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Evaluations of the test cases of several folds as one."""
    if len(evaluations) == 1:
        return evaluations[0]
    rows = [row for evaluation in evaluations for row in evaluation.rows]
    return _evaluation(evaluations[0], rows, [each for evaluation in evaluations for each in evaluation.failures])


def _evaluation(like: Evaluation, rows: Sequence[ScoreRow], failures: Sequence) -> Evaluation:
    names = [summary.structure for summary in like.structures]
    return replace(
        like,
        rows=tuple(rows),
        structures=tuple(summarise_structure(name, rows) for name in names),
        case_means=case_means(rows),
        overall=summarise_all(rows),
        failures=tuple(failures),
        worst_cases=(),
        remarks=(),
        official={},
    )


def _defined_means(rows: Sequence[ScoreRow]) -> dict[str, float]:
    table = np.array([[getattr(row, name) for name in _SCORES] for row in rows], dtype=float)
    defined = ~np.isnan(table)
    total, count = np.where(defined, table, 0.0).sum(axis=0), defined.sum(axis=0)
    means = np.divide(total, count, out=np.full(len(_SCORES), np.nan), where=count > 0)
    return dict(zip(_SCORES, means.tolist(), strict=True))


def group(outcomes: Iterable[Outcome], folds: int) -> list[Group]:
    """Outcomes by strategy and budget, in the order of their runs, each compared with the twin.

    Args:
        folds: of the benchmark; a seed counts where all of them have finished.
    """
    by_kind: dict[tuple[str, str], dict[int, list[Outcome]]] = defaultdict(lambda: defaultdict(list))
    for outcome in outcomes:
        by_kind[outcome.run.strategy, outcome.run.labels][outcome.run.seed].append(outcome)
    groups = []
    for (strategy, labels), by_seed in by_kind.items():
        complete = {seed: of_seed for seed, of_seed in by_seed.items() if len(of_seed) == folds}
        if complete:
            groups.append(_group(strategy, labels, complete))
    twins = {each.labels: each for each in groups if each.strategy == TWIN}
    return _corrected([_with_comparison(each, twins.get(each.labels)) for each in groups])


def _group(strategy: str, labels: str, by_seed: Mapping[int, Sequence[Outcome]]) -> Group:
    evaluations = {seed: joined([each.evaluation for each in of_seed]) for seed, of_seed in by_seed.items()}
    counts = [each.record.labelled_cases or 0 for of_seed in by_seed.values() for each in of_seed]
    return Group(
        strategy,
        labels,
        sum(counts) / len(counts),
        tuple(by_seed),
        averaged([*evaluations.values()]),
        evaluations,
    )


def _with_comparison(one: Group, twin: Group | None) -> Group:
    if one.strategy == TWIN or twin is None:
        return one
    shared = tuple(seed for seed in one.seeds if seed in twin.evaluations)
    if not shared:
        return one
    both = completed([each.evaluations[seed] for each in (one, twin) for seed in shared])
    pairs = [_of_equal_scores(*pair) for pair in zip(both[: len(shared)], both[len(shared) :], strict=True)]
    own, theirs = (averaged(side) for side in zip(*pairs, strict=True))
    try:
        comparison = compare(own, theirs)
    except BadInputError:  # no case was scored on both sides: each side's failures say so
        return one
    return replace(one, comparison=comparison, compared_seeds=shared)


def reach(groups: Sequence[Group]) -> str | None:
    """That the test cases are too few for what is compared, as a sentence; None where they may suffice."""
    compared = [each for each in groups if each.comparison is not None]
    if not compared:
        return None
    budgets = max(sum(each.strategy == other.strategy for other in compared) for each in compared)
    return out_of_reach(max(len(each.comparison.cases) for each in compared), budgets, "label budgets")


def _of_equal_scores(one: Evaluation, other: Evaluation) -> tuple[Evaluation, Evaluation]:
    """Both, a score of a case and structure that either does not define being undefined in both: averages over seeds
    are then of the same seeds on both sides."""
    sides = [{(row.case, row.structure): row for row in each.rows} for each in (one, other)]
    undefined = {
        key: {name: math.nan for name in _SCORES if any(math.isnan(getattr(side[key], name)) for side in sides)}
        for key in sides[0].keys() & sides[1].keys()
    }
    return tuple(
        replace(each, rows=tuple(replace(row, **undefined.get((row.case, row.structure), {})) for row in each.rows))
        for each in (one, other)
    )


def _corrected(groups: Sequence[Group]) -> list[Group]:
    """With p of the mean over structures corrected over the budgets of each strategy, for each metric."""
    p_holm: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for strategy in {each.strategy for each in groups}:
        for metric in SHOWN_METRICS:
            own = [(each.labels, each.paired(metric)) for each in groups if each.strategy == strategy]
            tested = [(labels, paired.p) for labels, paired in own if paired is not None and paired.p is not None]
            if tested:
                for (labels, _), p in zip(tested, holm([p for _, p in tested]).tolist(), strict=True):
                    p_holm[strategy, labels][metric] = p
    return [replace(each, p_holm=p_holm.get((each.strategy, each.labels))) for each in groups]
