"""One seed reaches every generator, streams are independent, and a stream leaves the caller's generators alone."""

from __future__ import annotations

import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffseg_nnunet.training.seeding import derived_seed, random_stream, seed_everything

keys = st.lists(st.integers(0, 2**40), min_size=1, max_size=4).map(tuple)


def draws() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_seed_reaches_every_generator() -> None:
    seed_everything(5)
    first = draws()
    seed_everything(6)
    other = draws()
    seed_everything(5)
    assert draws() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_large_seeds_are_taken() -> None:
    seed_everything(2**40 + 1)
    first = draws()
    seed_everything(2**40 + 1)
    assert draws() == first


@given(key=keys)
@settings(max_examples=30, deadline=None)
def test_stream_depends_on_its_key_alone(key: tuple[int, ...]) -> None:
    with random_stream(*key):
        first = draws()
    draws()
    with random_stream(*key):
        assert draws() == first


@example(one=(0,), other=(0, 0))
@given(one=keys, other=keys)
@settings(max_examples=30, deadline=None)
def test_different_keys_give_different_streams(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    if one == other:
        return
    with random_stream(*one):
        first = draws()
    with random_stream(*other):
        second = draws()
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_neighbouring_streams_are_uncorrelated() -> None:
    """Streams of (seed, stream, batch) with small, close numbers are what the loaders use."""
    values = []
    for batch in range(200):
        with random_stream(0, 0, batch):
            values.append([random.random(), np.random.rand(), torch.rand(1).item()])
    table = np.asarray(values)
    assert len(np.unique(table)) == table.size
    for column in table.T:
        assert column.mean() == pytest.approx(0.5, abs=0.08)
        assert abs(np.corrcoef(column[:-1], column[1:])[0, 1]) < 0.25
    # nor do the three generators of one stream say the same thing
    off_diagonal = np.corrcoef(table.T)[~np.eye(3, dtype=bool)]
    assert np.abs(off_diagonal).max() < 0.25


@pytest.mark.parametrize("fails", [False, True])
def test_generators_go_on_as_if_nothing_had_been(fails: bool) -> None:
    seed_everything(0)
    expected = [draws(), draws()]
    seed_everything(0)
    first = draws()
    with suppress(InterruptedError), random_stream(1, 2, 3):
        draws()
        if fails:
            raise InterruptedError
    assert [first, draws()] == expected


def test_streams_nest() -> None:
    with random_stream(1):
        draws()
        expected = draws()
    with random_stream(1):
        draws()
        with random_stream(2):
            draws()
        assert draws() == expected


@given(key=keys)
@settings(max_examples=30, deadline=None)
def test_derived_seeds_suit_every_generator(key: tuple[int, ...]) -> None:
    seed = derived_seed(*key)
    assert 0 <= seed < 2**63
    assert derived_seed(*key) == seed
    torch.Generator().manual_seed(seed)
