"""A label budget as it is written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffseg_nnunet.budgets.budget import LabelBudget
from diffseg_nnunet.errors import BadInputError


@pytest.mark.parametrize(
    ("text", "kind", "amount", "written"),
    [
        ("2cases", "cases", 2, "2cases"),
        ("1cases", "cases", 1, "1case"),
        (" 2 Cases ", "cases", 2, "2cases"),
        ("4slices", "slices", 4, "4slices"),
        ("10%", "share of cases", 10, "10%"),
        ("1.0%", "share of cases", 1, "1%"),
        ("10% cases", "share of cases", 10, "10%"),
        ("0.5%voxels", "voxels", 0.5, "0.5%voxels"),
        ("100%voxels", "voxels", 100, "100%voxels"),
        ("0.00001%voxels", "voxels", 1e-5, "0.00001%voxels"),
        ("2000000000000000cases", "cases", 2e15, "2000000000000000cases"),
    ],
)
def test_budgets(text: str, kind: str, amount: float, written: str) -> None:
    budget = LabelBudget.parse(text)
    assert (budget.kind, budget.amount, str(budget)) == (kind, amount, written)
    assert LabelBudget.parse(written) == budget


@pytest.mark.parametrize(
    "text",
    [
        *("", "2", "cases", "0cases", "-1cases", "1.5cases", "2.5slices", "0%", "101%", "100.1%voxels", "3voxels"),
        *("5%slices", "nan%", "1e3cases", "2cases 4slices", "2 patients", "1.0 %"),
    ],
)
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(BadInputError, match=r"is no label budget.* Write it like 2cases, 10%") as raised:
        LabelBudget.parse(text)
    assert f"'{text}'" in str(raised.value)


@given(st.integers(1, 1000), st.integers(1, 100), st.integers(1, 100))
def test_a_share_is_rounded_and_never_nothing(cases: int, one: int, other: int) -> None:
    counts = [LabelBudget("share of cases", share).case_count(cases) for share in sorted((one, other))]
    assert 1 <= counts[0] <= counts[1] <= cases
    assert abs(counts[1] - max(one, other) / 100 * cases) <= 0.5 or counts[1] == 1


def test_shares_of_the_field() -> None:
    """1 % and 10 % of 160 cases, as the hippocampus has in a fold of training cases."""
    assert [LabelBudget.parse(text).case_count(160) for text in ("1%", "10%", "100%")] == [2, 16, 160]
