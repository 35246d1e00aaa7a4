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
from diffseg_nnunet.planners.fitting import FEWEST_STAGES, nnunet_topology, poolable, reduced
from diffseg_nnunet.planners.steps import Shape, training_step
from diffseg_nnunet.planning.hardware import MemoryBudget
from diffseg_nnunet.planning.memory import peak_of
from diffseg_nnunet.planning.nnunet_rules import batch_limit
from diffseg_nnunet.planning.search import smaller_patches, training_ladder

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


def plans_of(fingerprint: Fingerprint, gib: float, planner_class: type = DiffSegPlainPlanner, **options: Any) -> dict:
    with workspace_of(fingerprint) as (_, dataset), contextlib.redirect_stdout(io.StringIO()):
        planner = planner_class(dataset)
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
