"""Fits both stages of a configuration into a memory budget, on one topology."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from torch._subclasses.fake_tensor import FakeTensorMode

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.planning.memory import Allowances, PeakMemory, peak_of
from diffseg_nnunet.planning.nnunet_rules import LEAST_EDGE
from diffseg_nnunet.planning.search import (
    Choice,
    NothingFitsError,
    Patch,
    Topology,
    best_fit,
)
from diffseg_nnunet.training.settings import PretrainingSettings

from .steps import (
    PRETRAINING_DTYPE,
    Shape,
    inference_window_gib,
    pretraining_steps,
    sliding_window_gib,
    training_step,
)

FEWEST_STAGES = 3
_POOLED_TWICE = 24  # voxels of an axis that is surely pooled twice, be it the only one
_NO_LIMIT = 999_999
# of one voxel of a batch, where the search begins: a plain 3D network's at 128 x 128 x 128 voxels
_GIB_PER_FEATURE, _GIB_PER_CLASS = 4.4e-8, 2e-8


@dataclass(frozen=True)
class Fitted:
    """A stage's patch and batch, and what its step takes."""

    choice: Choice
    memory: PeakMemory


def nnunet_topology(spacing: Sequence[float], patch: Sequence[int]) -> Topology:
    """nnU-Net's topology for a patch: pooled until its edges are 4 to 7 voxels, coarse axes later."""
    _, strides, kernels, padded, _ = get_pool_and_conv_props(list(spacing), list(patch), LEAST_EDGE, _NO_LIMIT)
    return Topology(
        tuple(int(n) for n in padded),
        tuple(tuple(int(n) for n in stride) for stride in strides),
        tuple(tuple(int(n) for n in kernel) for kernel in kernels),
    )


def poolable(spacing: Sequence[float], patch: Sequence[int]) -> Topology:
    """The topology of a patch, enlarged where it is too small to be pooled twice.

    nnU-Net leaves the coarsest of the supervised outputs out of the loss, so a network of two stages has none.
    """
    topology, enlarged = nnunet_topology(spacing, patch), list(patch)
    if topology.stages < FEWEST_STAGES:
        finest = min(spacing)
        enlarged = [
            max(side, _POOLED_TWICE) if mm < 2 * finest else side for side, mm in zip(patch, spacing, strict=True)
        ]
        topology = nnunet_topology(spacing, enlarged)
    return topology


def reduced(spacing: Sequence[float], patch: Patch, axis: int) -> Topology | None:
    """The next smaller patch along an axis, by nnU-Net's steps; None where it could not be pooled twice any more."""
    trial = list(patch)
    trial[axis] -= nnunet_topology(spacing, patch).divisor[axis]
    if trial[axis] < 1:
        return None
    # by the divisor of the smaller patch: 256 is followed by 224, not by 192
    trial[axis] = patch[axis] - nnunet_topology(spacing, trial).divisor[axis]
    if trial[axis] < 1:
        return None
    topology = nnunet_topology(spacing, trial)
    return topology if topology.stages >= FEWEST_STAGES and topology.patch != patch else None


class Fitting:
    """Measures the steps of a data set's networks and chooses among patches and batches; measurements are kept.

    Args:
        budget_gib: for the largest step of either stage.
        channels: of the image.
        heads: outputs of the segmentation network.
        regions: whether they may overlap.
        ignore: whether there is an ignore label.
        pretraining: settings of the first stage.
        pretraining_dtype: of its autocast; None where the GPU at hand has no bfloat16.
        allowances: for what cannot be counted.
    """

    def __init__(
        self,
        budget_gib: float,
        channels: int,
        heads: int,
        regions: bool,
        ignore: bool,
        pretraining: PretrainingSettings,
        pretraining_dtype: torch.dtype | None = PRETRAINING_DTYPE,
        allowances: Allowances | None = None,
    ):
        self.budget_gib = budget_gib
        self.channels, self.regions, self.ignore = channels, regions, ignore
        self.heads = heads if regions else max(2, heads)  # data without labels have the background alone
        self.pretraining, self.pretraining_dtype = pretraining, pretraining_dtype
        self.allowances = allowances or Allowances()
        self._kept: dict[Any, PeakMemory] = {}

    def shape(self, architecture: Mapping[str, Any], choice: Choice, extra_channels: int = 0) -> Shape:
        channels = self.channels + extra_channels
        return Shape(architecture, channels, self.heads, choice.patch, choice.batch, self.regions, self.ignore)

    def training_memory(self, shape: Shape) -> PeakMemory:
        return self._measure("training", shape)

    def pretraining_memory(self, shape: Shape) -> PeakMemory:
        return self._measure("pretraining", shape)

    def _measure(self, stage: str, shape: Shape) -> PeakMemory:
        key = (stage, repr(shape))
        if key not in self._kept:
            with FakeTensorMode():
                if stage == "training":
                    steps = iter([training_step(shape)])
                else:
                    steps = pretraining_steps(shape, self.pretraining, self.pretraining_dtype)
                peaks = [peak_of(step, self.allowances) for step in steps]
            self._kept[key] = max(peaks, key=lambda peak: peak.total_gib)
        return self._kept[key]

    def fit_training(self, ladder: Sequence[Choice], architecture_of: Any, extra_channels: int = 0) -> Fitted:
        """The best choice of a ladder for training.

        Args:
            architecture_of: Choice -> nnU-Net's architecture entry.

        Raises:
            NothingFitsError: none of them fits.
        """

        return self._best(
            ladder,
            architecture_of(ladder[0]),
            lambda choice: self.training_memory(self.shape(architecture_of(choice), choice, extra_channels)),
        )

    def fit_pretraining(self, ladder: Sequence[Choice], architecture: Mapping[str, Any]) -> Fitted:
        """The best choice of a ladder for pretraining.

        Raises:
            NothingFitsError: none of them fits.
        """

        return self._best(
            ladder, architecture, lambda choice: self.pretraining_memory(self.shape(architecture, choice))
        )

    def _best(
        self, ladder: Sequence[Choice], architecture: Mapping[str, Any], memory: Callable[[Choice], PeakMemory]
    ) -> Fitted:
        """The best choice of a ladder, whose first one has this architecture."""
        guess = self._voxels_that_may_fit(architecture)
        choice = best_fit(ladder, lambda choice: memory(choice).total_gib, self.budget_gib, guess)
        return Fitted(choice, memory(choice))

    def _voxels_that_may_fit(self, architecture: Mapping[str, Any]) -> int:
        per_voxel = _GIB_PER_FEATURE * architecture["arch_kwargs"]["features_per_stage"][0]
        per_voxel += _GIB_PER_CLASS * self.heads
        return round(max(0.0, self.budget_gib - self.allowances.context_gib) / per_voxel)

    def inference(
        self, architecture: Mapping[str, Any], patch: Patch, median: Sequence[int], largest: Sequence[int]
    ) -> dict[str, float]:
        """Memory of prediction, GiB: of the median and of the largest case, resampled to these shapes."""
        shape = self.shape(architecture, Choice(patch, 1))
        with FakeTensorMode():
            window = inference_window_gib(shape) + self.allowances.context_gib
        sizes = {"median_case_gib": median, "largest_case_gib": largest}
        cases = {name: round(window + sliding_window_gib(shape, image), 3) for name, image in sizes.items()}
        return {"predicted_peak_gib": cases["largest_case_gib"], "window_gib": round(window, 3), **cases}


def too_small(error: NothingFitsError, budget_gib: float, configuration: str) -> BadInputError:
    """What the user is told when no patch fits the budget."""
    needed = math.ceil(error.smallest_gib * 10) / 10
    patch = " × ".join(str(side) for side in error.smallest.patch)
    return BadInputError(
        f"{configuration} does not fit {budget_gib:g} GiB: even a patch of {patch} in batches of "
        f"{error.smallest.batch} takes {error.smallest_gib:.2f} GiB.",
        f"Plan with --gpu-memory {needed:g} or more, or with fewer --base-features.",
    )
