"""The search: what it never does (exceed the budget, give less for more memory), against trying everything."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffseg_nnunet.planning.nnunet_rules import LEAST_BATCH
from diffseg_nnunet.planning.search import (
    Choice,
    NothingFitsError,
    Patch,
    Topology,
    best_fit,
    imbalance,
    pretraining_ladder,
    smaller_patches,
    training_ladder,
)

STEP = 8


def topology(patch: Patch) -> Topology:
    """Every axis is pooled three times, whatever its size."""
    axes = len(patch)
    return Topology(patch, ((1,) * axes, *((2,) * axes,) * 3), ((3,) * axes,) * 4)


def reduced(patch: Patch, axis: int) -> Topology | None:
    smaller = tuple(side - STEP * (index == axis) for index, side in enumerate(patch))
    return topology(smaller) if smaller[axis] >= 2 * STEP else None


sides = st.integers(3, 16).map(lambda n: n * STEP)
patches = st.one_of(st.tuples(sides, sides), st.tuples(sides, sides, sides))
budgets = st.floats(0.7, 200)


def memory(choice: Choice, weights: float = 0.6, per_voxel: float = 2e-6) -> float:
    """As steps behave: something for the weights, the rest in proportion; shapes differ a little."""
    shape = 0.02 * math.sin(sum(choice.patch))
    return weights + per_voxel * (1 + shape) * choice.voxels


def ladder_of(largest: Patch, most: int = 9) -> list[Choice]:
    found = smaller_patches(topology(largest), largest, reduced)
    return training_ladder(
        found, largest, lambda patch: max(LEAST_BATCH, most * math.prod(largest) // math.prod(patch))
    )


def test_topology_of_strides() -> None:
    each = Topology((16, 64), ((1, 1), (1, 2), (2, 2)), ((3, 3),) * 3)
    assert each.divisor == (2, 4)
    assert each.stages == 3


@given(patches)
def test_smaller_patches_keep_their_proportions(largest: Patch) -> None:
    found = smaller_patches(topology(largest), largest, reduced)
    assert found[0].patch == largest
    assert len({each.patch for each in found}) == len(found)
    for each in found:
        assert all(side <= of for side, of in zip(each.patch, largest, strict=True))
        assert imbalance(each.patch, largest) <= 1.5 + 1e-6


@given(patches, st.integers(2, 12))
def test_voxels_rise_along_the_ladder(largest: Patch, most: int) -> None:
    ladder = ladder_of(largest, most)
    voxels = [choice.voxels for choice in ladder]
    assert voxels == sorted(set(voxels))
    assert all(choice.batch >= LEAST_BATCH for choice in ladder)
    # the largest patch at last, in every batch up to the most there may be
    tops = [choice.batch for choice in ladder if choice.patch == largest]
    assert tops == list(range(LEAST_BATCH, most + 1))
    assert ladder[-1] == Choice(largest, most, ladder[-1].key)


@given(patches, budgets)
def test_the_best_fit_is_that_of_trying_everything(largest: Patch, budget: float) -> None:
    ladder = ladder_of(largest)
    fitting = [memory(choice) <= budget for choice in ladder]
    tried: list[Choice] = []

    def measured(choice: Choice) -> float:
        tried.append(choice)
        return memory(choice)

    if not fitting[0]:
        with pytest.raises(NothingFitsError) as failed:
            best_fit(ladder, measured, budget)
        assert failed.value.smallest == ladder[0]
        assert failed.value.smallest_gib == memory(ladder[0])
        return
    chosen = best_fit(ladder, measured, budget)
    assert memory(chosen) <= budget
    following = ladder.index(chosen) + 1
    assert following == len(ladder) or memory(ladder[following]) > budget
    assert len(tried) <= 8  # of up to hundreds


@given(patches, budgets, st.floats(1.0, 3.0), st.integers(1, 10**7))
def test_more_memory_never_gives_less(largest: Patch, budget: float, factor: float, guess: int) -> None:
    ladder = ladder_of(largest)

    def smooth(choice: Choice) -> float:
        return 0.6 + 2e-6 * choice.voxels

    if smooth(ladder[0]) > budget:
        return
    less, more = best_fit(ladder, smooth, budget), best_fit(ladder, smooth, budget * factor, guess)
    assert more.voxels >= less.voxels


@given(st.tuples(*[st.integers(6, 16).map(lambda n: n * STEP)] * 3), st.floats(0.05, 1.0))
def test_the_budget_is_filled_where_patches_can_grow(largest: Patch, share: float) -> None:
    ladder = ladder_of(largest)
    budget = share * 2e-6 * LEAST_BATCH * math.prod(largest)

    def proportional(choice: Choice) -> float:
        return 2e-6 * choice.voxels

    if proportional(ladder[0]) > budget / 4:  # close to the smallest patch, a step of its sides is a large one
        return
    chosen = best_fit(ladder, proportional, budget)
    assert proportional(chosen) / budget >= 0.8


@given(patches, st.integers(2, 7), st.sampled_from([1, 2]))
def test_pretraining_batches_are_whole_groups_on_the_same_topology(planned: Patch, batch: int, group: int) -> None:
    shape = tuple(1.4 * side for side in planned)
    ladder = pretraining_ladder(Choice(planned, batch, "key"), (STEP,) * len(planned), shape, lambda _: 12, group)
    voxels = [choice.voxels for choice in ladder]
    assert voxels == sorted(set(voxels))
    for choice in ladder:
        assert choice.key == "key"
        assert choice.batch % group == 0
        assert 2 <= choice.batch <= 12
        assert all(side % STEP == 0 for side in choice.patch)
        # never more than holds the case, but for the padding
        assert all(side < length + STEP for side, length in zip(choice.patch, shape, strict=True))
        if choice.batch > max(2, group):
            assert math.prod(choice.patch) >= 0.85 * math.prod(planned)


def test_pretraining_takes_the_planned_patch_where_batches_are_few() -> None:
    planned = Choice((40, 56, 40), 9)
    ladder = pretraining_ladder(planned, (8, 8, 8), (36, 50, 35), lambda _: 9, 2)
    assert (ladder[-1].patch, ladder[-1].batch) == ((40, 56, 40), 8)
