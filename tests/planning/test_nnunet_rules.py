"""nnU-Net's rules as restated for explanations, against nnU-Net itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis

from diffseg_nnunet.planning.nnunet_rules import batch_limit, resampled_apart, separate_axis, target_spacing

SPACINGS = st.tuples(*[st.sampled_from([0.5, 0.74, 1.0, 1.5, 2.5, 3.0, 5.0, 8.0])] * 3)
SHAPES = st.tuples(*[st.integers(1, 600)] * 3)
CASES = st.lists(st.tuples(SPACINGS, SHAPES), min_size=1, max_size=12)


def fingerprint_of(cases: list[tuple]) -> dict[str, Any]:
    spacings, shapes = (list(map(list, values)) for values in zip(*cases, strict=True))
    return {"spacings": spacings, "shapes_after_crop": shapes}


@settings(deadline=None, max_examples=200)
@given(CASES)
def test_target_spacing(cases: list[tuple]) -> None:
    planner = ExperimentPlanner.__new__(ExperimentPlanner)  # it would read a data set
    planner.overwrite_target_spacing, planner.anisotropy_threshold = None, 3
    planner.dataset_fingerprint = fingerprint_of(cases)
    target = target_spacing(planner.dataset_fingerprint)
    np.testing.assert_allclose(target.spacing, planner.determine_fullres_target_spacing(), rtol=1e-12)
    assert target.lowered or target.spacing == target.median


def test_each_branch_of_the_target_spacing() -> None:
    def rule(thick: list[float], slices: int) -> tuple:
        found = target_spacing(fingerprint_of([((1.0, z, 1.0), (300, slices, 300)) for z in thick]))
        assert found.coarse_axis == 1
        return found.spacing[1], found.lowered, found.limited

    assert rule([5.0] * 9 + [2.0], 40) == (pytest.approx(4.7), True, False)
    assert rule([5.0] * 9 + [2.0], 100) == (5.0, False, False)  # enough slices
    assert rule([3.0] * 10, 40) == (3.0, False, False)  # not more than 3 times as coarse
    assert rule([5.0] * 6 + [0.5] * 4, 40) == (1.00001, True, True)


@settings(deadline=None, max_examples=200)
@given(CASES, SPACINGS)
def test_axes_resampled_apart(cases: list[tuple], target: tuple) -> None:
    fingerprint = fingerprint_of(cases)
    apart = [determine_do_sep_z_and_axis(None, np.array(s), np.array(target)) for s in fingerprint["spacings"]]
    assert resampled_apart(fingerprint, target) == sum(bool(separate) for separate, _ in apart)
    same, axis = determine_do_sep_z_and_axis(None, np.array(target), np.array(target))
    assert separate_axis(target) == (axis if same else None)


@pytest.mark.parametrize(
    ("patch", "voxels", "cases", "limit"),
    [((64, 160, 160), 128 * 512 * 512, 10, 10), ((40, 56, 40), 36 * 50 * 35, 260, 9), ((512, 512), 0, 0, 0)],
)
def test_batch_limit(patch: tuple, voxels: float, cases: int, limit: int) -> None:
    assert batch_limit(patch, voxels * cases) == limit
