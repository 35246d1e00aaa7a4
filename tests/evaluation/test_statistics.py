"""Means, intervals and counts against scipy and against hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diffseg_nnunet.evaluation.statistics import (
    ALL_STRUCTURES,
    INTERVAL_METHOD,
    ScoreRow,
    case_means,
    mean_with_interval,
    summarise_all,
    summarise_structure,
    worst_cases,
)

NAN = float("nan")
ROWS = (
    ScoreRow("a", "liver", 0.8, 0.6, 4.0, 100.0, 90.0),
    ScoreRow("a", "spleen", 0.0, 0.0, NAN, 10.0, 0.0),
    ScoreRow("b", "liver", 0.6, 0.4, 8.0, 100.0, 70.0),
    ScoreRow("b", "spleen", 1.0, 1.0, 0.0, 0.0, 0.0),
    ScoreRow("c", "liver", 0.0, 0.0, NAN, 0.0, 5.0),
    ScoreRow("c", "spleen", 0.0, 0.0, NAN, 0.0, 5.0),
)


def test_the_interval_is_scipys() -> None:
    values = np.random.default_rng(1).beta(8, 2, size=23)
    ours = mean_with_interval(values, seed=3)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(3)
    ).confidence_interval
    spread = theirs.high - theirs.low
    assert ours.mean == pytest.approx(values.mean())
    assert ours.ci_low == pytest.approx(theirs.low, abs=0.02 * spread)
    assert ours.ci_high == pytest.approx(theirs.high, abs=0.02 * spread)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    estimates = [mean_with_interval(generator.normal(size=40), resamples=1000, confidence=0.8) for _ in range(400)]
    covered = np.mean([estimate.ci_low <= 0 <= estimate.ci_high for estimate in estimates])
    assert covered == pytest.approx(0.8, abs=0.06)


def test_the_seed_decides() -> None:
    values = np.linspace(0, 1, 9)
    assert mean_with_interval(values, seed=1) == mean_with_interval(values, seed=1)
    assert mean_with_interval(values, seed=1) != mean_with_interval(values, seed=2)


def test_any_number_of_resamples_is_drawn() -> None:
    one = mean_with_interval([0.0, 1.0, 5.0], resamples=1)
    assert one.ci_low == one.ci_high
    many = mean_with_interval(np.arange(9), resamples=2500)
    assert many.ci_low < many.mean < many.ci_high


def test_undefined_values_are_left_out_and_counted() -> None:
    estimate = mean_with_interval([1.0, NAN, 3.0, NAN])
    assert (estimate.mean, estimate.n, estimate.n_undefined) == (2.0, 2, 2)
    assert (estimate.ci_low, estimate.ci_high) == (1.0, 3.0)


def test_one_value_has_no_interval() -> None:
    estimate = mean_with_interval([0.7, NAN])
    assert (estimate.mean, estimate.ci_low, estimate.ci_high, estimate.n) == (0.7, None, None, 1)


@pytest.mark.parametrize("values", [[], [NAN, NAN]])
def test_no_value_has_no_mean(values: list[float]) -> None:
    estimate = mean_with_interval(values)
    assert np.isnan(estimate.mean)
    assert (estimate.ci_low, estimate.ci_high, estimate.n, estimate.n_undefined) == (None, None, 0, len(values))


def test_a_table_of_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(n,\)"):
        mean_with_interval([[1.0, 2.0]])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_the_interval_lies_within_the_values(values: list[float]) -> None:
    estimate = mean_with_interval(values, resamples=500)
    slack = 1e-9
    assert min(values) - slack <= estimate.ci_low <= estimate.ci_high <= max(values) + slack


def test_structures_are_summarised_over_cases() -> None:
    liver, spleen = (summarise_structure(name, ROWS) for name in ("liver", "spleen"))
    assert liver.dsc.mean == pytest.approx(1.4 / 3)
    assert (liver.hd95_mm.mean, liver.hd95_mm.n, liver.n_undefined_hd95) == (6.0, 2, 1)
    assert (spleen.hd95_mm.mean, spleen.hd95_mm.ci_low, spleen.n_undefined_hd95) == (0.0, None, 2)
    assert (liver.n_both_empty, spleen.n_both_empty) == (0, 1)


def test_cases_are_averaged_over_structures_first() -> None:
    a, b, c = case_means(ROWS)
    assert (a.case, a.dsc, a.nsd, a.hd95_mm) == ("a", pytest.approx(0.4), pytest.approx(0.3), 4.0)
    assert (a.n_structures, a.n_undefined_hd95) == (2, 1)
    assert (b.dsc, b.hd95_mm) == (pytest.approx(0.8), 4.0)
    assert np.isnan(c.hd95_mm)
    overall = summarise_all(ROWS)
    assert overall.structure == ALL_STRUCTURES
    assert overall.dsc.mean == pytest.approx(0.4)
    assert (overall.dsc.n, overall.hd95_mm.n, overall.hd95_mm.n_undefined) == (3, 2, 1)
    assert (overall.hd95_mm.mean, overall.n_undefined_hd95, overall.n_both_empty) == (4.0, 3, 1)


def test_the_worst_cases_skip_what_is_undefined() -> None:
    rows = (*ROWS, ScoreRow("d", "liver", NAN, NAN, NAN, 0.0, 0.0), ScoreRow("e", "liver", 0.1, 0.1, 9.0, 1.0, 1.0))
    worst = worst_cases(rows, 3)
    assert [(case.case, case.structure) for case in worst] == [("c", "liver"), ("e", "liver"), ("a", "spleen")]
    assert worst_cases(rows, 0) == ()


def test_undefined_dsc_is_left_out_of_the_mean() -> None:
    rows = (ScoreRow("a", "liver", 0.5, 0.5, 1.0, 1.0, 1.0), ScoreRow("a", "spleen", NAN, NAN, NAN, 0.0, 0.0))
    (mean,) = case_means(rows)
    assert (mean.dsc, mean.n_structures, mean.n_undefined_hd95) == (0.5, 2, 1)
    assert summarise_structure("spleen", rows).dsc.n_undefined == 1


@pytest.mark.parametrize(("cases", "said"), [(6, 0.87), (10, 0.90)])
def test_intervals_of_few_cases_cover_as_the_reports_say(cases: int, said: float) -> None:
    assert f"{said:.0%}".replace("%", " %") in INTERVAL_METHOD
    generator = np.random.default_rng(0)
    found = [mean_with_interval(generator.normal(size=cases), resamples=1000) for _ in range(1500)]
    covered = np.mean([each.ci_low <= 0 <= each.ci_high for each in found])
    assert covered == pytest.approx(said, abs=0.03)
