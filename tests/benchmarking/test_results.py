"""Means over seeds, differences to the twin and their p, against hand-made numbers and scipy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from diffseg_nnunet.benchmarking.results import Outcome, averaged, group, joined
from diffseg_nnunet.benchmarking.runs import Run, RunRecord
from tests.benchmarking.conftest import Scores, evaluation

NAN = math.nan
RECORD = RunRecord("finished", "", labelled_cases=2)


def outcome(strategy: str, seed: int, scores: Scores, labels: str = "2cases", fold: int = 0) -> Outcome:
    return Outcome(Run(strategy, labels, seed, fold), RECORD, evaluation(scores))


def random_scores(seed: int, plus: float = 0.0, cases: int = 10) -> Scores:
    generator = np.random.default_rng(seed)
    return {f"c{i}": {"liver": 0.5 + plus + 0.1 * generator.random(), "spleen": 0.3} for i in range(cases)}


def test_scores_are_averaged_case_by_case() -> None:
    first = evaluation({"a": {"liver": 0.2, "spleen": 0.4}, "b": {"liver": 0.6, "spleen": NAN}})
    second = evaluation({"b": {"liver": 0.8, "spleen": NAN}, "a": {"liver": 0.4, "spleen": NAN}})
    found = averaged([first, second])
    rows = {(row.case, row.structure): row for row in found.rows}
    assert rows["a", "liver"].dsc == pytest.approx(0.3)
    assert rows["a", "liver"].nsd == pytest.approx(0.15)
    assert rows["b", "liver"].dsc == pytest.approx(0.7)
    assert rows["a", "spleen"].dsc == pytest.approx(0.4), "undefined in one seed"
    assert math.isnan(rows["b", "spleen"].dsc)
    assert found.overall.dsc.mean == pytest.approx(((0.3 + 0.4) / 2 + 0.7) / 2)


def test_a_seed_that_invents_a_structure_does_not_speak_for_those_that_do_not() -> None:
    """A protocol that leaves out what is in neither map: one of three networks invents the spleen."""
    right, wrong = evaluation({"a": {"liver": 0.5, "spleen": NAN}}), evaluation({"a": {"liver": 0.5, "spleen": 0.0}})
    absent = replace(right, rows=tuple(replace(row, reference_ml=0.0, prediction_ml=0.0) for row in right.rows[1:]))
    absent = replace(absent, rows=(right.rows[0], *absent.rows))
    (_, spleen) = averaged([absent, wrong, absent]).rows
    assert spleen.dsc == pytest.approx(2 / 3)
    assert math.isnan(averaged([absent, absent]).rows[1].dsc)


def test_one_seed_is_left_as_it_is() -> None:
    only = evaluation({"a": {"liver": 0.2}, "b": {"liver": 0.6}})
    assert averaged([only]).overall == only.overall
    assert averaged([only]).structures == only.structures


def test_a_case_that_one_seed_could_not_score_is_out() -> None:
    whole = evaluation({"a": {"liver": 0.2}, "b": {"liver": 0.6}})
    part = evaluation({"a": {"liver": 0.4}}, failures=["b"])
    found = averaged([whole, part])
    assert [mean.case for mean in found.case_means] == ["a"]
    assert [failure.case for failure in found.failures] == ["b"]


def test_folds_are_joined() -> None:
    found = joined([evaluation({"a": {"liver": 0.2}}), evaluation({"b": {"liver": 0.6}})])
    assert found.overall.dsc.mean == pytest.approx(0.4)
    assert found.overall.dsc.n == 2


def test_groups_are_compared_with_their_twin() -> None:
    twin, tuned = ({seed: random_scores(10 * seed + k, 0.03 * k) for seed in (0, 1, 2)} for k in (0, 1))
    outcomes = [
        outcome(strategy, seed, scores[seed])
        for seed in (0, 1, 2)
        for strategy, scores in (("scratch", twin), ("finetune", tuned))
    ]
    of_twin, of_tuned = group(outcomes, folds=1)
    assert (of_twin.strategy, of_twin.comparison) == ("scratch", None)
    by_seed = [[np.mean([*tuned[s][c].values()]) - np.mean([*twin[s][c].values()]) for c in tuned[s]] for s in tuned]
    differences = np.mean(by_seed, axis=0)
    paired = of_tuned.paired("dsc")
    assert paired.difference.mean == pytest.approx(differences.mean())
    assert paired.p == pytest.approx(stats.wilcoxon(differences).pvalue)
    assert paired.wins == (differences > 0).sum()
    means = [np.mean([np.mean([*of_case.values()]) for of_case in tuned[seed].values()]) for seed in (0, 1, 2)]
    spread = of_tuned.spread("dsc")
    assert [*spread.by_seed.values()] == pytest.approx(means)
    assert spread.deviation == pytest.approx(np.std(means, ddof=1))
    assert spread.range == pytest.approx((min(means), max(means)))


def test_holm_is_over_the_budgets() -> None:
    gains = {"2cases": 0.2, "6cases": 0.02, "24cases": 0.0}
    outcomes = []
    for number, (labels, gain) in enumerate(gains.items()):
        outcomes.append(outcome("scratch", 0, random_scores(number), labels))
        outcomes.append(outcome("finetune", 0, random_scores(number + 7, gain), labels))
    groups = [each for each in group(outcomes, 1) if each.strategy == "finetune"]
    p = np.array([each.paired("dsc").p for each in groups])
    by_hand = np.empty(3)
    running = 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        running = max(running, p[index] * (3 - rank))
        by_hand[index] = min(1.0, running)
    assert [each.p_holm["dsc"] for each in groups] == pytest.approx(by_hand)


def test_only_seeds_that_both_have_are_compared() -> None:
    outcomes = [outcome("scratch", 0, random_scores(0)), outcome("scratch", 1, random_scores(1))]
    outcomes += [outcome("finetune", 1, random_scores(5)), outcome("finetune", 2, random_scores(6))]
    of_tuned = group(outcomes, 1)[1]
    assert of_tuned.seeds == (1, 2)
    assert of_tuned.compared_seeds == (1,)


def test_a_seed_counts_when_all_folds_are_there() -> None:
    outcomes = [outcome("scratch", 0, {"a": {"liver": 0.5}}), outcome("scratch", 0, {"b": {"liver": 0.7}}, fold=1)]
    outcomes += [outcome("scratch", 1, {"a": {"liver": 0.9}})]
    (found,) = group(outcomes, folds=2)
    assert found.seeds == (0,)
    assert found.evaluation.overall.dsc.mean == pytest.approx(0.6)


def test_without_a_twin_nothing_is_compared() -> None:
    (found,) = group([outcome("finetune", 0, random_scores(0))], 1)
    assert found.comparison is None
    assert found.p_holm is None
    assert found.spread("dsc").deviation is None


def test_a_score_that_one_side_does_not_define_in_a_seed_counts_on_neither() -> None:
    """In one seed the networks are equal; in the other the twin's score is undefined, and the strategy's is low."""
    equal = {f"c{i}": {"liver": 0.8 + 0.01 * i} for i in range(6)}
    low, none = ({case: {"liver": value} for case in equal} for value in (0.1, NAN))
    outcomes = [
        outcome(strategy, seed, scores)
        for strategy, seed, scores in (
            ("scratch", 0, equal),
            ("scratch", 1, none),
            ("finetune", 0, equal),
            ("finetune", 1, low),
        )
    ]
    _, tuned = group(outcomes, folds=1)
    for structure in ("liver", "mean over structures"):
        paired = tuned.paired("dsc", structure)
        assert paired.difference.mean == 0
        assert (paired.wins, paired.losses, paired.p) == (0, 0, 1)
