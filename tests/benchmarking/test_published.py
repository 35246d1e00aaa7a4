"""Published figures stand beside ours only where everything that is known of both is equal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from diffseg_nnunet.benchmarking.published import PUBLISHED, Conditions, PublishedFigure, compared, why_not
from diffseg_nnunet.evaluation.protocols import BTCV_ORGANS, PROTOCOLS

FIGURE = PublishedFigure(83.08, "nnU-Net", "btcv", "24/6", "btcv", BTCV_ORGANS, 24, "somewhere")
SAME = Conditions("btcv", "24/6", True, "btcv", tuple(name.replace(" ", "_") for name in BTCV_ORGANS), (2, 24))


def test_equal_is_equal() -> None:
    assert why_not(FIGURE, SAME) is None
    assert compared(SAME, [FIGURE]) == ([FIGURE], [])


@pytest.mark.parametrize(
    ("conditions", "reason"),
    [
        (replace(SAME, split="18/12"), "its split is 24/6, not 18/12"),
        (replace(SAME, split="own"), "its split is 24/6, not own"),
        (replace(SAME, complete=False), "only some folds"),
        (replace(SAME, evaluation="plain"), "its rules are btcv's, not plain's"),
        (replace(SAME, structures=SAME.structures[1:]), "other organs"),
        (replace(SAME, labelled_cases=(2, 23)), "24 labelled cases"),
    ],
)
def test_any_difference_is_named(conditions: Conditions, reason: str) -> None:
    assert reason in (why_not(FIGURE, conditions) or "")
    assert not compared(conditions, [FIGURE])[0]


def test_unknown_test_cases_and_known_differences_never_match() -> None:
    assert why_not(replace(FIGURE, split=None), SAME) == "its test cases are not published"
    assert why_not(replace(FIGURE, differs="another grid"), SAME) == "another grid"


def test_other_data_are_not_even_mentioned() -> None:
    assert compared(replace(SAME, converter="folder"), [FIGURE]) == ([], [])


def test_figures_say_where_they_are_from() -> None:
    for figure in PUBLISHED:
        assert figure.source
        assert 40 < figure.dsc < 100
        assert figure.evaluation in PROTOCOLS


def test_flare22_tuning_has_company() -> None:
    organs = PROTOCOLS["flare22"].structures
    beside, apart = compared(Conditions("flare22", "tuning", True, "flare22", organs, (1, 5, 50)))
    assert [figure.dsc for figure in beside] == [90.64, 87.73, 89.56]
    assert {reason for _, reason in apart} == {"its test cases are not published"}
