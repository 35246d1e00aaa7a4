"""Paired comparison: tests and corrections against enumeration, tables and thought."""

from __future__ import annotations

import csv
import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.evaluation.comparison import (
    Comparison,
    PairedScore,
    compare,
    holm,
    out_of_reach,
    rank_biserial,
    signed_rank_test,
    smallest_p,
)
from diffseg_nnunet.evaluation.report import write_comparison
from diffseg_nnunet.evaluation.statistics import (
    ALL_STRUCTURES,
    CaseFailure,
    Evaluation,
    ScoreRow,
    case_means,
    summarise_all,
    summarise_structure,
)
from diffseg_nnunet.evaluation.tables import comparison_table

NAN = float("nan")
STRUCTURES = ("liver", "spleen")


def evaluation(
    scores: dict[tuple[str, str], tuple[float, float]],
    failed: tuple[str, ...] = (),
    structures: tuple[str, ...] = STRUCTURES,
) -> Evaluation:
    """From (case, structure) to DSC (and NSD) and HD95 (and ASSD)."""
    rows = tuple(
        ScoreRow(case, structure, dsc, dsc, hd95, 1.0, 1.0, iou=dsc / (2 - dsc), assd_mm=hd95)
        for (case, structure), (dsc, hd95) in scores.items()
    )
    return Evaluation(
        rows,
        tuple(summarise_structure(structure, rows) for structure in structures),
        case_means(rows),
        summarise_all(rows),
        {"protocol": {"name": "plain"}, "structures": {}},
        tuple(CaseFailure(case, "broken") for case in failed),
    )


def of(comparison: Comparison, structure: str, metric: str = "dsc") -> PairedScore:
    (score,) = (s for s in comparison.scores if (s.structure, s.metric) == (structure, metric))
    return score


def enumerated_p(differences: np.ndarray) -> float:
    """Two-sided p over all signs."""
    order = np.abs(differences).argsort().argsort() + 1
    centre = order.sum() / 2
    seen = abs(order[differences > 0].sum() - centre)
    sums = [
        sum(rank for rank, sign in zip(order, signs, strict=True) if sign)
        for signs in itertools.product((0, 1), repeat=len(order))
    ]
    return float(np.mean([abs(value - centre) >= seen for value in sums]))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-1000, 1000).filter(bool), min_size=3, max_size=9, unique_by=abs))
def test_p_is_the_share_of_all_signs(values: list[int]) -> None:
    differences = np.array(values) / 1000
    assert signed_rank_test(differences) == pytest.approx(enumerated_p(differences))


def test_equal_predictions_have_p_1_and_no_effect() -> None:
    assert (signed_rank_test([0.0, 0.0]), rank_biserial([0.0, 0.0])) == (1.0, 0.0)


def test_rank_biserial_by_hand() -> None:
    # ranks of 1, -2, 3, 4 (the zero is dropped): positive 1 + 3 + 4, negative 2, of 10
    assert rank_biserial([0.1, -0.2, 0.0, 0.3, 0.4]) == pytest.approx(0.6)
    assert rank_biserial([0.1, 0.2]) == 1.0
    assert rank_biserial([0.5, -0.5]) == 0.0


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.4: times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.4
    assert holm([0.03, 0.01, 0.4, 0.02]) == pytest.approx([0.06, 0.04, 0.4, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]).size == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_none_and_bonferroni(p: list[float]) -> None:
    corrected = holm(p)
    assert (corrected >= np.array(p)).all()
    assert (corrected <= np.minimum(1, len(p) * np.array(p)) + 1e-12).all()
    assert (np.diff(corrected[np.argsort(p, kind="stable")]) >= 0).all()
    # Source of the definition: a hypothesis falls at level a if all smaller ones do, each against a / (those left).
    rejected = 0
    for place, value in enumerate(sorted(p)):
        if value > 0.05 / (len(p) - place):
            break
        rejected += 1
    assert (corrected <= 0.05 + 1e-15).sum() >= rejected


def paired() -> tuple[Evaluation, Evaluation]:
    """Six cases: a better liver in five of them, a worse spleen in one, its distance undefined in another."""
    mine, theirs = {}, {}
    for number in range(6):
        case = f"c{number}"
        mine[case, "liver"], theirs[case, "liver"] = (0.9, 5.0), (0.9 - 0.01 * number, 5.0 + number)
        mine[case, "spleen"], theirs[case, "spleen"] = (0.8, 4.0), (0.8, 4.0)
    mine["c0", "spleen"] = (0.5, 6.0)
    theirs["c5", "spleen"] = (0.0, NAN)
    return evaluation(mine), evaluation(theirs)


def test_structures_and_the_mean_are_compared_case_by_case() -> None:
    comparison = compare(*paired())
    liver, spleen, overall = (of(comparison, name) for name in (*STRUCTURES, ALL_STRUCTURES))
    assert liver.difference.mean == pytest.approx(0.025)
    assert liver.difference.ci_low <= 0.025 <= liver.difference.ci_high
    assert (liver.wins, liver.ties, liver.losses, liver.rank_biserial) == (5, 1, 0, 1.0)
    assert liver.p == pytest.approx(2 / 2**5)
    assert liver.p_holm == pytest.approx(2 * liver.p)
    assert (spleen.wins, spleen.ties, spleen.losses) == (1, 4, 1)
    assert overall.difference.mean == pytest.approx((liver.difference.mean + spleen.difference.mean) / 2)
    assert overall.p_holm is None
    assert [score.structure for score in comparison.scores][::5] == [*STRUCTURES, ALL_STRUCTURES]


def test_smaller_distances_win_and_undefined_ones_are_left_out() -> None:
    comparison = compare(*paired())
    liver, spleen, overall = (of(comparison, name, "hd95_mm") for name in (*STRUCTURES, ALL_STRUCTURES))
    assert liver.difference.mean == pytest.approx(-2.5)
    assert (liver.wins, liver.losses, liver.rank_biserial) == (5, 0, 1.0)
    assert (spleen.difference.n, spleen.difference.n_undefined) == (5, 1)
    # of c5 the liver alone: the mean is over what both sides define
    assert overall.difference.mean == pytest.approx(np.mean([(0 + 2) / 2, -0.5, -1, -1.5, -2, -5]))


def test_an_invented_structure_is_a_loss_also_where_its_absence_is_left_out() -> None:
    """Six cases without a spleen: left out of the means of a side that finds none, 0 of one that invents it."""
    mine = {(f"c{n}", name): value for n in range(6) for name, value in (("liver", (0.9, 1.0)), ("spleen", (0.0, NAN)))}
    theirs = {(f"c{n}", "liver"): (0.89, 1.0) for n in range(6)}
    inventing, absent = evaluation(mine), evaluation(theirs)
    rows = (*absent.rows, *(ScoreRow(f"c{n}", "spleen", NAN, NAN, NAN, 0.0, 0.0) for n in range(6)))
    right = replace(absent, rows=rows)
    comparison = compare(inventing, right)
    for metric in ("dsc", "nsd", "iou"):
        spleen, overall = (of(comparison, name, metric) for name in ("spleen", ALL_STRUCTURES))
        assert (spleen.difference.mean, spleen.wins, spleen.losses) == (-1, 0, 6)
        assert overall.losses == 6
    assert of(comparison, "spleen", "hd95_mm").difference.n == 0
    # of two that find none, there is nothing to compare
    assert of(compare(right, right), "spleen").difference.n == 0


def test_exchanging_the_predictions_exchanges_the_signs() -> None:
    there, back = compare(*paired()), compare(*paired()[::-1])
    for one, other in zip(there.scores, back.scores, strict=True):
        assert (one.p, one.p_holm, one.wins, one.losses) == (other.p, other.p_holm, other.losses, other.wins)
        assert one.difference.mean == pytest.approx(-other.difference.mean)
        assert one.rank_biserial == pytest.approx(-other.rank_biserial)


def test_a_difference_in_the_last_bit_is_a_tie() -> None:
    mine, theirs = ({("a", structure): (dsc, 6.0) for structure in STRUCTURES} for dsc in (0.3, 0.1 + 0.2))
    score = of(compare(evaluation(mine), evaluation(theirs)), "liver")
    assert (score.wins, score.ties, score.losses, score.p) == (0, 1, 0, 1.0)


def test_differences_that_cancel_are_a_tie_of_the_means() -> None:
    """0.1 + 0.2 - 0.3 is not 0 in floating point."""
    structures = ("liver", "spleen", "stomach")
    mine, theirs = (
        evaluation({("a", name): (dsc, 6.0) for name, dsc in zip(structures, values, strict=True)}, (), structures)
        for values in ((0.6, 0.7, 0.2), (0.5, 0.5, 0.5))
    )
    overall = of(compare(mine, theirs), ALL_STRUCTURES)
    assert (overall.wins, overall.ties, overall.losses, overall.p, overall.rank_biserial) == (0, 1, 0, 1.0, 0.0)


def test_failed_cases_are_left_out_and_named() -> None:
    mine, theirs = paired()
    shorter = evaluation({(r.case, r.structure): (r.dsc, r.hd95_mm) for r in theirs.rows if r.case != "c3"}, ("c3",))
    comparison = compare(mine, shorter)
    assert comparison.left_out == ("c3",)
    assert "c3" not in comparison.cases
    assert of(comparison, "liver").difference.n == 5


def test_what_cannot_be_compared_is_refused() -> None:
    mine, theirs = paired()
    with pytest.raises(BadInputError, match="differ in their protocol"):
        compare(mine, replace(theirs, settings={**theirs.settings, "protocol": {"name": "btcv"}}))
    with pytest.raises(BadInputError, match="No case was scored in both"):
        compare(mine, evaluation({}, ("c0",)))


def test_nothing_defined_leaves_no_p() -> None:
    one = evaluation({("a", structure): (0.0, NAN) for structure in STRUCTURES})
    score = of(compare(one, one), "liver", "hd95_mm")
    assert (score.p, score.p_holm, score.rank_biserial, score.difference.n) == (None, None, None, 0)


def test_the_report_and_the_table_hold_everything(tmp_path: Path) -> None:
    comparison = compare(*paired())
    paths = write_comparison(comparison, tmp_path)
    content = json.loads(paths["comparison.json"].read_text())
    assert content["method"] == comparison.method
    assert len(content["scores"]) == 3 * 5
    rows = list(csv.DictReader(paths["comparison.csv"].open()))
    assert list(rows[0])[:4] == ["structure", "metric", "difference_mean", "difference_ci_low"]
    assert float(rows[0]["difference_mean"]) == pytest.approx(0.025)
    assert float(rows[0]["p"]) == pytest.approx(0.0625)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(comparison_table(comparison))
    text = console.export_text()
    for expected in ("+0.025 [", "0.062", "5/1/0", "HD95 (mm)", "Holm", "mean over structures", "Wilcoxon"):
        assert expected in text


@pytest.mark.parametrize(("cases", "tests", "least"), [(6, 4, "0.12"), (5, 1, "0.062"), (8, 13, "0.1"), (2, 13, "1")])
def test_too_few_cases_to_show_anything_are_said_to_be(cases: int, tests: int, least: str) -> None:
    assert out_of_reach(cases, tests, "budgets").endswith(
        f"over {tests} budgets {least}: nothing can be below 0.05 after correction."
    )
    clean_sweep = stats.wilcoxon(np.arange(1.0, cases + 1), method="exact").pvalue
    assert smallest_p(cases) == pytest.approx(clean_sweep)
    assert holm([clean_sweep] * tests)[0] >= 0.05


@pytest.mark.parametrize(("cases", "tests"), [(6, 1), (10, 13), (40, 100)])
def test_cases_that_may_suffice(cases: int, tests: int) -> None:
    assert out_of_reach(cases, tests, "budgets") is None
