"""Draws are decided by the seed and nest."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from diffseg_nnunet.budgets.draws import draw_slices, seeded_order

CASES = st.lists(st.text("abc019_", min_size=1, max_size=5), unique=True, max_size=12)
SLICES = st.dictionaries(
    st.text("abc019_", min_size=1, max_size=4), st.sets(st.integers(0, 30), max_size=6), max_size=6
)
SEEDS = st.integers(0, 5)


@given(CASES, SEEDS)
def test_an_order_is_of_the_same_items_and_reproducible(cases: list[str], seed: int) -> None:
    order = seeded_order(cases, seed)
    assert sorted(order) == sorted(cases)
    assert seeded_order(reversed(cases), seed) == order


@given(CASES, SEEDS, st.text("xyz", min_size=1, max_size=3))
def test_another_case_leaves_the_order_of_the_others(cases: list[str], seed: int, new: str) -> None:
    assert [case for case in seeded_order([*cases, new], seed) if case != new] == seeded_order(cases, seed)


def test_the_order_is_the_same_everywhere() -> None:
    """Published subsets depend on it."""
    assert seeded_order("abcdef", 0) == ["f", "c", "b", "e", "d", "a"]  # by sha256sum
    assert seeded_order("abcdef", 1) != seeded_order("abcdef", 0)


def test_every_case_is_as_likely_to_be_first() -> None:
    first = [seeded_order("abcd", seed)[0] for seed in range(4000)]
    assert all(900 < first.count(case) < 1100 for case in "abcd")


@given(SLICES, SEEDS, st.integers(0, 40), st.integers(0, 40))
def test_slices_nest_and_are_spread(slices: dict[str, set[int]], seed: int, one: int, other: int) -> None:
    few, many = (draw_slices(slices, count, seed, slices.__getitem__) for count in sorted((one, other)))
    for drawn, count in ((few, min(one, other)), (many, max(one, other))):
        assert all(set(numbers) <= slices[case] and numbers == sorted(set(numbers)) for case, numbers in drawn.items())
        assert sum(map(len, drawn.values())) == min(count, sum(map(len, slices.values())))
        fullest = max(map(len, drawn.values()), default=0)
        for case, there in slices.items():
            assert len(drawn.get(case, [])) >= min(len(there), fullest - 1)
    assert all(set(numbers) <= set(many[case]) for case, numbers in few.items())


def test_only_the_cases_needed_are_read() -> None:
    read = []

    def slices_of(case: str) -> list[int]:
        read.append(case)
        return [1, 2]

    draw_slices([f"case_{number}" for number in range(50)], 4, 0, slices_of)
    assert len(read) == 4
