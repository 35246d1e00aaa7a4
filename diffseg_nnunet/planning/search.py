"""Patch and batch that fill a memory budget: patch first, then batch, and for training not less for more memory.

Candidates are grouped by how many voxels a batch of theirs holds, in bands of a few percent; each band is represented
by its best: for training the fewest, so the largest, patches. From band to band voxels strictly rise, so the last band
before one that no longer fits rises with the budget. Memory hardly depends on the shape of a patch of given size, so
the band is guessed from what others took and then confirmed: a handful of measurements instead of one a candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from diffseg_nnunet.planning.nnunet_rules import LEAST_BATCH

BAND = 1.08
"""Ratio of the voxels of neighbouring bands: where none is empty, at most BAND² of the budget is given away."""
MOST_UNBALANCED = 1.5
_MOST_OF_A_SMALLER_PATCH = 6  # patches in a batch while the largest patch does not fit: enough to fill every band
_ABOUT_AS_LARGE = 0.85  # as the planned patch: only such ones come in more than the smallest batch in pretraining
_LARGER_BATCHES = 8  # a pretraining batch has at most so many times the voxels of a training batch

Patch = tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """What nnU-Net makes of a patch: how it is pooled.

    Attributes:
        patch: padded to what its pooling divides.
        strides: of each stage.
        kernels: of each stage.
    """

    patch: Patch
    strides: tuple[Patch, ...]
    kernels: tuple[Patch, ...]

    @property
    def divisor(self) -> Patch:
        """What the pooling divides each axis by."""
        return tuple(math.prod(stride) for stride in zip(*self.strides, strict=True))

    @property
    def stages(self) -> int:
        return len(self.strides)


@dataclass(frozen=True)
class Choice:
    """A patch and a batch.

    Attributes:
        patch: voxels.
        batch: patches.
        key: of the topology; equal keys share a network.
    """

    patch: Patch
    batch: int
    key: Hashable = None

    @property
    def voxels(self) -> int:
        return self.batch * math.prod(self.patch)


class NothingFitsError(Exception):
    """Not even the smallest candidate fits; `smallest_gib` is what it takes."""

    def __init__(self, smallest: Choice, smallest_gib: float):
        super().__init__(f"{smallest} takes {smallest_gib:.2f} GiB")
        self.smallest, self.smallest_gib = smallest, smallest_gib


def imbalance(patch: Sequence[int], shape: Sequence[float]) -> float:
    """Largest over smallest share that a patch has of the axes of a shape: 1 where it is a scaled copy."""
    shares = [size / of for size, of in zip(patch, shape, strict=True)]
    return max(shares) / min(shares)


def smaller_patches(
    largest: Topology, shape: Sequence[float], reduced: Callable[[Patch, int], Topology | None]
) -> list[Topology]:
    """The largest patch and all that reducing its axes one after the other leads to, about as balanced as it is.

    Args:
        largest: where to start.
        shape: the data's median shape; nnU-Net keeps a patch's shares of it alike.
        reduced: the next smaller patch along an axis; None where there is none.
    """
    limit = max(MOST_UNBALANCED, imbalance(largest.patch, shape)) + 1e-9
    found = {largest.patch: largest}
    waiting = [largest]
    while waiting:
        current = waiting.pop()
        for axis in range(len(current.patch)):
            smaller = reduced(current.patch, axis)
            if smaller is None or smaller.patch in found or imbalance(smaller.patch, shape) > limit:
                continue
            found[smaller.patch] = smaller
            waiting.append(smaller)
    return list(found.values())


def training_ladder(
    patches: Sequence[Topology], shape: Sequence[float], most_patches: Callable[[Patch], int]
) -> list[Choice]:
    """The choices worth a try for training, voxels strictly rising; the largest patch comes last, in rising batches.

    Args:
        patches: of :func:`smaller_patches`, the largest first.
        shape: the data's median shape.
        most_patches: largest batch of a patch (nnU-Net: 5 % of the data set), at least LEAST_BATCH.
    """
    largest, *others = patches
    top = LEAST_BATCH * math.prod(largest.patch)
    choices = [
        Choice(each.patch, batch, (each.strides, each.kernels))
        for each in others
        for batch in _batches(LEAST_BATCH, min(most_patches(each.patch), _MOST_OF_A_SMALLER_PATCH))
    ]
    choices = [choice for choice in choices if choice.voxels < top]
    # few and large patches rather than many small ones
    best = _one_a_band(choices, lambda choice: (-choice.batch, -imbalance(choice.patch, shape), choice.voxels))
    key = (largest.strides, largest.kernels)
    batches = range(LEAST_BATCH, most_patches(largest.patch) + 1)
    return [*best, *(Choice(largest.patch, batch, key) for batch in batches)]


def pretraining_ladder(
    planned: Choice, divisor: Patch, shape: Sequence[float], most_patches: Callable[[Patch], int], group: int
) -> list[Choice]:
    """The choices for pretraining on the topology planned for training, voxels strictly rising.

    Whole groups of patches, of the planned size or larger; smaller ones only for a budget that takes no group of those.

    Args:
        planned: for training.
        divisor: of the topology; a patch has at least two voxels an axis where it is coarsest, or as many as planned.
        shape: the data's median shape; no patch needs to be larger, but for the padding.
        most_patches: largest batch of a patch, at least `group`.
        group: patches of one scan in a batch.
    """
    axes = []
    for size, step, length in zip(planned.patch, divisor, shape, strict=True):
        most = max(size, math.ceil(length / step) * step)
        axes.append(range(min(size, 2 * step), most + 1, step))
    limit = max(MOST_UNBALANCED, imbalance(planned.patch, shape)) + 1e-9
    patches = [patch for patch in _products(axes) if imbalance(patch, shape) <= limit]
    smallest = max(LEAST_BATCH, group)
    size = math.prod(planned.patch)
    most = _LARGER_BATCHES * max(smallest, planned.batch) * size
    choices = []
    for patch in patches:
        largest_batch = min(most_patches(patch), most_patches(planned.patch), most // math.prod(patch))
        large = math.prod(patch) >= _ABOUT_AS_LARGE * size
        batches = _batches(smallest, largest_batch if large else smallest, group)
        choices += [Choice(patch, batch, planned.key) for batch in batches]

    def preference(choice: Choice) -> tuple[float, ...]:
        holds_planned = all(own >= side for own, side in zip(choice.patch, planned.patch, strict=True))
        return holds_planned, choice.batch, -imbalance(choice.patch, shape)

    return _one_a_band(choices, preference)


def best_fit(
    ladder: Sequence[Choice], gib_of: Callable[[Choice], float], budget_gib: float, first_guess: int | None = None
) -> Choice:
    """The last choice before one that no longer fits; before the first such one where memory rises along the ladder.

    Args:
        ladder: choices, voxels rising.
        gib_of: measures a choice.
        budget_gib: to stay within.
        first_guess: voxels that may fit.

    Raises:
        NothingFitsError: not even the first one fits.
    """
    known: dict[int, float] = {}
    low, high = -1, len(ladder)  # the last known to fit, the first known not to
    guess = ladder[len(ladder) // 2].voxels if first_guess is None else first_guess
    while high - low > 1:
        below = sum(choice.voxels <= guess for choice in ladder) - 1
        index = min(max(below, low + 1), high - 1)
        known[ladder[index].voxels] = gib = gib_of(ladder[index])
        if gib <= budget_gib:
            low = index
        else:
            high = index
        guess = _voxels_at(budget_gib, known)
    if low < 0:
        raise NothingFitsError(ladder[0], known[ladder[0].voxels])
    return ladder[low]


def _voxels_at(gib: float, known: dict[int, float]) -> float:
    """Where the line through the two closest measurements reaches `gib`; through one and the origin at first."""
    closest = sorted(known, key=lambda voxels: abs(known[voxels] - gib))[:2]
    if len(closest) == 1:
        return closest[0] * gib / known[closest[0]]
    (x0, y0), (x1, y1) = ((voxels, known[voxels]) for voxels in closest)
    slope = (y1 - y0) / (x1 - x0)
    return x0 + (gib - y0) / slope if slope > 0 else x0


def _one_a_band(choices: Iterable[Choice], preference: Callable[[Choice], tuple[float, ...]]) -> list[Choice]:
    bands: dict[int, Choice] = {}
    for choice in choices:
        band = math.floor(math.log(choice.voxels) / math.log(BAND) + 1e-9)
        if band not in bands or preference(choice) > preference(bands[band]):
            bands[band] = choice
    return [bands[band] for band in sorted(bands)]


def _batches(smallest: int, most: int, group: int = 1) -> Iterator[int]:
    """Batches in whole groups, at most `most`; the smallest at any rate."""
    yield smallest
    yield from range(smallest + group, most + 1, group)


def _products(axes: Sequence[range]) -> Iterator[Patch]:
    if not axes:
        yield ()
        return
    for first in axes[0]:
        for rest in _products(axes[1:]):
            yield (first, *rest)
