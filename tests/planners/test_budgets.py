"""Any data there may be, planned within the budget: tiny and huge, flat and coarse, with many channels and classes."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch._subclasses.fake_tensor import FakeTensorMode

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.planners import DiffSegPlainPlanner, DiffSegPlanner
from diffseg_nnunet.planners.fitting import FEWEST_STAGES, Fitting, nnunet_topology, poolable, reduced
from diffseg_nnunet.planners.steps import Shape, training_step
from diffseg_nnunet.planning.gpus import MemoryBudget
from diffseg_nnunet.planning.memory import PeakMemory, peak_of
from diffseg_nnunet.planning.nnunet_rules import LEAST_BATCH, batch_limit
from diffseg_nnunet.planning.search import smaller_patches, training_ladder
from diffseg_nnunet.training.settings import PretrainingSettings

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from counted_memory import architecture
from fingerprints import FLARE22, HIPPOCAMPUS, Fingerprint, workspace_of

DATA = {
    "tiny": Fingerprint("tiny", (1.0, 1.0, 1.0), (35, 50, 36), 20, 2),
    "hardly anything": Fingerprint("hardly anything", (1.0, 1.0, 1.0), (5, 6, 4), 3, 1),
    "huge": Fingerprint("huge", (1.0, 0.8, 0.8), (1000, 512, 512), 30, 5),
    "coarse slices, four channels": Fingerprint("coarse", (8.0, 0.6, 0.6), (14, 320, 300), 40, 3, 4, "MRI"),
    "flat": Fingerprint("flat", (999.0, 1.0, 1.0), (1, 400, 380), 60, 2),
    "many classes": Fingerprint("many", (1.5, 1.5, 1.5), (150, 160, 150), 1000, 117),
}


def plans_of(
    fingerprint: Fingerprint,
    gib: float,
    planner_class: type = DiffSegPlainPlanner,
    target_spacing: tuple[float, ...] | None = None,
    **options: Any,
) -> dict:
    with workspace_of(fingerprint) as (_, dataset), contextlib.redirect_stdout(io.StringIO()):
        planner = planner_class(dataset, overwrite_target_spacing=target_spacing)
        planner.configure(budget=MemoryBudget(gib, "test"), **{"base_features": 8, **options})
        return planner.plan_experiment()


@pytest.mark.parametrize("name", DATA)
def test_any_data_are_planned_within_the_budget(name: str) -> None:
    gib = 2.0
    plans = plans_of(DATA[name], gib)
    manager = PlansManager(plans)
    for configuration, stages in plans["diffseg"]["configurations"].items():
        planned = manager.get_configuration(configuration)
        assert len(planned.pool_op_kernel_sizes) >= FEWEST_STAGES
        for stage in ("training", "pretraining"):
            if stage in stages:
                assert stages[stage]["predicted_peak_gib"] <= gib
                assert not any(np.mod(stages[stage]["patch_size"], np.prod(planned.pool_op_kernel_sizes, axis=0)))
        assert (planned.patch_size, planned.batch_size) == tuple(
            stages["training"][key] for key in ("patch_size", "batch_size")
        )
        full = stages["training"]["predicted_peak_gib"] / gib >= 0.85
        assert full or stages["reasons"]["patch"].startswith("the largest nnU-Net would take")
        if "reasons" in stages and planned.batch_size > LEAST_BATCH:  # two of a larger one may fit as well
            assert not stages["reasons"]["patch"].startswith("the largest whose")


@pytest.mark.parametrize("planner_class", [DiffSegPlainPlanner, DiffSegPlanner])
def test_small_data_in_large_memory_are_planned_as_by_nnunet(planner_class: type) -> None:
    """Where memory is no matter, the patch holds the case and a batch 5 % of the data set."""
    plans = plans_of(HIPPOCAMPUS, 8.0, planner_class, base_features=32)
    configuration = plans["configurations"]["3d_fullres"]
    assert (configuration["patch_size"], configuration["batch_size"]) == ([40, 56, 40], 9)


def test_a_budget_that_holds_nothing_is_refused_with_one_that_does() -> None:
    with pytest.raises(BadInputError) as refused:
        plans_of(FLARE22, 0.3)
    needed = float(str(refused.value).split("--gpu-memory ")[1].split()[0])
    assert 0.3 < needed < 1.5


def test_a_spacing_that_leaves_nothing_of_the_images() -> None:
    words = r"Resampled to 1000 × 9 × 1000 mm, .* has 0 × 27 × 0 voxels.* a finer --spacing"
    with pytest.raises(BadInputError, match=words):
        plans_of(FLARE22, 2.0, target_spacing=(9.0, 1000.0, 1000.0))


spacings = st.tuples(st.sampled_from([0.5, 0.8, 1.0, 2.5, 6.0]), *[st.sampled_from([0.5, 0.8, 1.0, 1.2])] * 2)
shapes = st.tuples(st.integers(4, 600), *[st.integers(16, 600)] * 2)


@settings(deadline=None, max_examples=15)
@given(spacings, shapes, st.integers(1, 500))
def test_every_candidate_is_a_topology_of_nnunet(
    spacing: tuple[float, ...], shape: tuple[int, ...], cases: int
) -> None:
    wanted = 1 / np.array(spacing)
    initial = [min(round(n), m) for n, m in zip(wanted * (256**3 / wanted.prod()) ** (1 / 3), shape, strict=True)]
    candidates = smaller_patches(poolable(spacing, initial), shape, lambda patch, axis: reduced(spacing, patch, axis))
    for each in candidates:
        assert nnunet_topology(spacing, each.patch) == each  # padded already: nnU-Net leaves it as it is
        assert each.stages >= FEWEST_STAGES
        assert not any(np.mod(each.patch, each.divisor))
    voxels = float(np.prod(shape)) * cases
    ladder = training_ladder(candidates, shape, lambda patch: max(2, batch_limit(patch, voxels)))
    assert ladder
    assert all(choice.batch <= max(2, round(voxels * 0.05 / np.prod(choice.patch))) for choice in ladder)


class ByVoxels(Fitting):
    """Memory in closed form, in place of steps that are counted: a plan in a second."""

    def training_memory(self, shape: Shape) -> PeakMemory:
        per_voxel = 1e-7 + 1e-8 * (shape.heads + shape.channels)
        return PeakMemory(0.1, 0.1, 0.1, 0.0, 0.0, per_voxel * shape.batch * float(np.prod(shape.patch)))

    def pretraining_memory(self, shape: Shape) -> PeakMemory:
        return PeakMemory(0.1, 0.1, 0.2, 0.1, 0.0, 2e-7 * shape.batch * float(np.prod(shape.patch)))

    def inference(self, *_: Any) -> dict[str, float]:
        return {"predicted_peak_gib": 0.5}


def by_voxels(fingerprint: Fingerprint, gib: float) -> dict[str, Any] | BadInputError:
    """The stages of a plan, or why there is none."""
    with workspace_of(fingerprint) as (_, dataset), contextlib.redirect_stdout(io.StringIO()):
        planner = DiffSegPlainPlanner(dataset)
        planner.configure(budget=MemoryBudget(gib, "test"))
        heads = fingerprint.classes + 1
        planner.fitting = ByVoxels(gib, fingerprint.channels, heads, False, False, PretrainingSettings())
        try:
            return planner.plan_experiment()["diffseg"]["configurations"]
        except BadInputError as error:
            return error


def training_voxels(stages: dict[str, Any]) -> int:
    training = stages["3d_fullres" if "3d_fullres" in stages else "2d"]["training"]
    return training["batch_size"] * int(np.prod(training["patch_size"]))


@settings(deadline=None, max_examples=8)
@given(
    spacings,
    st.tuples(st.integers(1, 700), *[st.integers(8, 700)] * 2),
    st.integers(1, 500),
    st.sampled_from([0, 1, 14, 117]),
    st.sampled_from([1, 4]),
    st.sampled_from([1.0, 2.0, 4.0, 11.0]),
)
def test_random_fingerprints_are_planned_within_the_budget_or_refused(
    spacing: tuple[float, ...], shape: tuple[int, ...], cases: int, classes: int, channels: int, gib: float
) -> None:
    fingerprint = Fingerprint("random", spacing, shape, cases, classes, channels, "MRI")
    less, more = by_voxels(fingerprint, gib), by_voxels(fingerprint, 2 * gib)
    for planned, budget in ((less, gib), (more, 2 * gib)):
        if isinstance(planned, BadInputError):
            assert f"does not fit {budget:g} GiB" in str(planned)
            continue
        for stages in planned.values():
            for stage in {"training", "pretraining"} & set(stages):
                assert stages[stage]["predicted_peak_gib"] <= budget
    if not isinstance(less, BadInputError):
        assert training_voxels(more) >= training_voxels(less)


@pytest.mark.parametrize("gib", [0.2, 0.4])  # which hold neither stage, and the training alone
def test_the_budget_that_is_named_suits_both_stages(gib: float) -> None:
    refused = by_voxels(HIPPOCAMPUS, gib)
    assert str(refused).startswith(f"Pretraining of 3d_fullres does not fit {gib:g} GiB")
    needed = float(str(refused).split("--gpu-memory ")[1].split()[0])
    assert "3d_fullres" in by_voxels(HIPPOCAMPUS, needed)


def test_a_cascade_of_large_batches_fits_with_smaller_ones() -> None:
    """Its last stage reads a channel more for every class: fewer patches, then smaller ones."""
    many = Fingerprint("many", (1.0, 1.0, 1.0), (300, 350, 350), 1000, 60)
    plans = plans_of(many, 3.0)
    stages = plans["diffseg"]["configurations"]
    fullres, cascade = stages["3d_fullres"]["training"], stages["3d_cascade_fullres"]["training"]
    assert cascade["predicted_peak_gib"] <= 3.0
    assert all(own <= side for own, side in zip(cascade["patch_size"], fullres["patch_size"], strict=True))
    assert cascade["batch_size"] <= fullres["batch_size"]


@pytest.mark.parametrize("regions", [False, True])
def test_an_ignore_label_is_counted(regions: bool) -> None:
    shape = Shape(architecture("plain", 3), 1, 30, (32, 32, 32), 2, regions)
    with FakeTensorMode():
        without, ignoring = (peak_of(training_step(replace(shape, ignore=ignore))) for ignore in (False, True))
    assert without.activations < ignoring.activations < 1.2 * without.activations
