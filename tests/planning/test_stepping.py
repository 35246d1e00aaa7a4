"""Stepping down against a plain search over all batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffseg_nnunet.planning.section import predicted_gib
from diffseg_nnunet.planning.stepping import Trial, fits, smaller_budget, step_down


def test_what_fits_is_measured_once() -> None:
    assert step_down(4, 1, 2, 8.0, lambda _: 7.9) == [Trial(4, 7.9)]


def test_one_group_less_where_the_memory_runs_out() -> None:
    trials = step_down(6, 2, 2, 8.0, lambda batch: None if batch > 2 else 5.0)
    assert trials == [Trial(6, None), Trial(4, None), Trial(2, 5.0)]


def test_the_smallest_batch_ends_it() -> None:
    assert step_down(3, 1, 2, 8.0, lambda _: 9.0) == [Trial(3, 9.0), Trial(2, 9.0)]
    assert step_down(2, 2, 2, 8.0, lambda _: None) == [Trial(2, None)]


def test_far_above_the_budget_batches_are_skipped() -> None:
    trials = step_down(100, 1, 2, 8.0, lambda batch: 1.0 + 0.14 * batch)
    assert trials[-1].batch_size == 50
    assert len(trials) < 6


@given(
    groups=st.integers(1, 60),
    group=st.sampled_from([1, 2]),
    fixed=st.floats(0, 6),
    each=st.floats(0.01, 2),
    budget=st.floats(1, 12),
    most=st.floats(1, 30),
)
def test_the_largest_batch_that_fits_is_found(
    groups: int, group: int, fixed: float, each: float, budget: float, most: float
) -> None:
    """Where memory grows with the batch, as it does: `most` is where it runs out."""

    def peak(batch: int) -> float | None:
        gib = fixed + each * batch
        return gib if gib <= most else None

    trials = step_down(groups * group, group, group, budget, peak)
    fitting = [n * group for n in range(1, groups + 1) if fits(Trial(n * group, peak(n * group)), budget)]
    assert fits(trials[-1], budget) == bool(fitting)
    assert trials[-1].batch_size == max(fitting, default=group)
    tried = [trial.batch_size for trial in trials]
    assert tried == sorted(set(tried), reverse=True)


@pytest.mark.parametrize(
    ("budget", "free", "peak", "expected"),
    [
        (10.0, 23.0, 12.5, 8.0),  # a quarter more was taken than was planned
        (10.0, 23.0, 10.01, 9.9),
        (10.0, 23.0, None, 9.0),
        (10.0, 6.54, None, 5.5),  # others have taken memory since
        (1.0, 23.0, 1.1, None),
        (10.0, 1.5, None, None),
    ],
)
def test_the_next_budget_is_smaller(budget: float, free: float, peak: float | None, expected: float | None) -> None:
    assert smaller_budget(budget, free, peak) == expected


def test_processes_share_what_patches_take_and_nothing_else() -> None:
    planned = {
        "predicted_peak_gib": 5.2,
        "memory_gib": {"weights": 0.2, "batch": 0.4, "activations": 3.6, "context": 1.0},
    }
    assert predicted_gib(planned, 1) == pytest.approx(5.2)
    assert predicted_gib(planned, 4) == pytest.approx(0.2 + 0.1 + 0.9 + 1.0)
    assert predicted_gib({"predicted_peak_gib": 5.2}, 4) == pytest.approx(1.3)
