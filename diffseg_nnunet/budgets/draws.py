"""Seeded draws that nest: what a smaller budget draws is among what a larger one draws.

Everything is ordered by a hash of the seed and its name, and a budget takes the first ones. The order neither depends
on a random generator's version, nor on which other cases there are.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T", int, str)


def seeded_order(items: Iterable[T], *key: int | str) -> list[T]:
    """`items` in a random order that `key` decides."""
    return sorted(items, key=lambda item: (digest(*key, item), item))


def digest(*key: int | str) -> bytes:
    """32 bytes, evenly distributed, that `key` decides."""
    return hashlib.sha256("/".join(map(str, key)).encode()).digest()


def draw_slices(
    cases: Iterable[str], count: int, seed: int, slices_of: Callable[[str], Iterable[int]]
) -> dict[str, list[int]]:
    """Slices to annotate, spread over the cases: each case gives one in turn, drawn at random, until there are enough.

    Args:
        slices_of: the numbers of the slices of a case that may be drawn; asked for only those cases that are needed.

    Returns:
        case -> the numbers drawn, sorted; of fewer than `count` in all where there are no more.
    """
    turns = deque(seeded_order(cases, seed))
    left: dict[str, deque[int]] = {}
    drawn: dict[str, list[int]] = {}
    while turns and count > 0:
        case = turns.popleft()
        if case not in left:
            left[case] = deque(seeded_order(slices_of(case), seed, case))
        if left[case]:
            drawn.setdefault(case, []).append(left[case].popleft())
            turns.append(case)
            count -= 1
    return {case: sorted(numbers) for case, numbers in sorted(drawn.items())}
