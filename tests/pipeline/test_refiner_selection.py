"""The refiner is used for the structures whose validation cases gain, beyond chance."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from diffseg_nnunet.evaluation.comparison import holm
from diffseg_nnunet.evaluation.statistics import Evaluation, ScoreRow, case_means, summarise_all
from diffseg_nnunet.inference.merging import merged_labels
from diffseg_nnunet.pipeline.refiner_selection import cases_needed, chosen, compare, too_few


def evaluation(scores: dict[str, list[float]], first_case: int = 0) -> Evaluation:
    rows = tuple(
        ScoreRow(f"case_{first_case + index}", structure, dsc, dsc, 1.0, 1.0, 1.0)
        for structure, values in scores.items()
        for index, dsc in enumerate(values)
    )
    return Evaluation(rows, (), case_means(rows), summarise_all(rows), {}, ())


LIVER, VEIN, SPLEEN = "liver", "vein", "spleen"
STEPS = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07]


def gaining(gains: dict[str, list[float]], start: float = 0.5) -> tuple[Evaluation, Evaluation]:
    """Before and after, of cases that gain so much DSC in each structure."""
    before = evaluation({structure: [start] * len(values) for structure, values in gains.items()})
    return before, evaluation({structure: [start + gain for gain in values] for structure, values in gains.items()})


def test_structures_that_gain_beyond_chance_are_refined() -> None:
    before, after = gaining({LIVER: [*STEPS[:-1], -0.07], VEIN: STEPS, SPLEEN: [-gain for gain in STEPS]})
    comparisons = compare([before], [after])
    assert [each.structure for each in comparisons] == [LIVER, VEIN, SPLEEN, "mean over structures"]
    liver, vein, spleen, _ = comparisons
    # 7 cases of one sign: 2 of the 2^7 outcomes, times three structures; the liver's ranks are 21 against 7
    assert vein.p == pytest.approx(2 / 2**7)
    assert vein.p_holm == pytest.approx(3 * 2 / 2**7)
    assert liver.p > 0.2
    assert str(vein).startswith("vein: DSC 0.5000, refined 0.5400, +0.0400 [+0.02")
    assert str(vein).endswith("], p 0.047: refined")
    # the liver's mean gains too, but not beyond chance; the spleen loses beyond it
    assert liver.gain > 0
    assert spleen.p_holm == vein.p_holm
    assert chosen(comparisons, overlapping=False) == (VEIN,)
    assert too_few(comparisons, overlapping=False) is None
    # regions are taken together or not at all
    assert chosen(comparisons, overlapping=True) == ()
    assert chosen(compare(*([each] for each in gaining({LIVER: STEPS, VEIN: STEPS}))), True) == (LIVER, VEIN)


def test_what_the_segmentor_learns_meanwhile_is_not_the_refiners() -> None:
    """The vein gains, and more so by the segmentor that learnt in turn, alone; the liver by the refiner."""
    before, after = gaining({LIVER: STEPS, VEIN: STEPS})
    _, alone = gaining({LIVER: [gain / 2 for gain in STEPS], VEIN: [2 * gain for gain in STEPS]})
    comparisons = compare([before], [after], [alone])
    assert [each.gains for each in comparisons] == [True] * 3
    assert chosen(comparisons, overlapping=False) == (LIVER,)
    assert chosen(comparisons, overlapping=True) == (), "over both the segmentor alone gains more"
    assert comparisons[0].alone == pytest.approx(0.52)
    assert str(comparisons[0]).endswith("its segmentor alone 0.5200: refined")
    assert str(comparisons[1]).endswith(
        "its segmentor alone 0.5800: left as it is, since the gain is of the segmentor's longer training"
    )


def test_cases_of_several_folds_are_tested_together() -> None:
    before = [evaluation({LIVER: [0.5] * 3}), evaluation({LIVER: [0.5] * 3}, first_case=3)]
    after = [evaluation({LIVER: [0.51, 0.52, 0.53]}), evaluation({LIVER: [0.54, 0.55, 0.56]}, first_case=3)]
    comparisons = compare(before, after)
    assert comparisons[0].cases == 6
    assert comparisons[0].p_holm == pytest.approx(2 / 2**6)
    assert chosen(comparisons, overlapping=False) == (LIVER,)


def test_three_cases_cannot_speak_for_a_structure() -> None:
    comparisons = compare(*([each] for each in gaining({LIVER: STEPS[:3], VEIN: [0.3] * 3})))
    assert all(each.gain_low > 0 for each in comparisons)
    assert [each.p for each in comparisons] == [0.25] * 3
    assert chosen(comparisons, overlapping=False) == ()
    assert too_few(comparisons, overlapping=False).startswith("3 validation case(s) are too few to tell a gain from")
    assert "the test of 2 structure(s) needs 7 at least" in too_few(comparisons, overlapping=False)
    assert "the test of the mean over structures needs 6 at least" in too_few(comparisons, overlapping=True)


def test_equal_gains_are_no_surer_than_the_signs_allow() -> None:
    """Of tied differences the normal approximation would say less than 2 / 2^5."""
    for gains in ([0.1] * 5, [0.1] * 5 + [0.0] * 4):
        comparisons = compare(*([each] for each in gaining({LIVER: gains})))
        assert comparisons[0].p >= 2 / 2**5
        assert chosen(comparisons, overlapping=False) == ()


@pytest.mark.parametrize(("tests", "needed"), [(1, 6), (2, 7), (3, 7), (4, 8), (13, 10), (104, 13)])
def test_cases_that_are_needed(tests: int, needed: int) -> None:
    """By the distribution of the signed-rank statistic 0.05 is reached with them, and not with less."""
    assert cases_needed(tests) == needed
    for cases, reached in ((needed, True), (needed - 1, False)):
        smallest = float(stats.wilcoxon(np.arange(1.0, cases + 1), method="exact").pvalue)
        assert (holm([smallest] + [1.0] * (tests - 1))[0] < 0.05) == reached


def test_without_an_effect_one_outcome_in_64_is_chosen() -> None:
    """Six cases whose gains have either sign: of all outcomes, only that in which every case gains."""
    found = [
        signs
        for signs in itertools.product((1, -1), repeat=6)
        if chosen(compare(*([each] for each in gaining({LIVER: list(np.multiply(signs, STEPS[:6]))}))), False)
    ]
    assert found == [(1,) * 6]


def test_one_case_says_nothing() -> None:
    comparisons = compare([evaluation({LIVER: [0.5]})], [evaluation({LIVER: [0.9]})])
    assert comparisons[0].gain_low is None
    assert comparisons[0].p == 1
    assert chosen(comparisons, overlapping=False) == ()
    assert math.isclose(comparisons[0].gain, 0.4)


def test_chosen_structures_come_from_the_refined_map() -> None:
    plain = np.array([0, 1, 2, 1, 2, 3, 0])
    refined = np.array([2, 0, 2, 2, 3, 1, 3])
    # 2 wherever either says so; what else the refined map says is not taken over
    assert merged_labels(plain, refined, [2]).tolist() == [2, 1, 2, 2, 3, 3, 0]
    assert merged_labels(plain, refined, [1, 2, 3]).tolist() == refined.tolist()
    assert merged_labels(plain, refined, []).tolist() == plain.tolist()
