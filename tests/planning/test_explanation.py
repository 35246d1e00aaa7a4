"""Explanations of plans written by hand, whose reasons are worked out by hand."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from diffseg_nnunet.cli.plan import explanation_table
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.planning.decisions import Decision, shown
from diffseg_nnunet.planning.explanation import explain

# like FLARE22's: slices of 2.5 mm mostly; the 10th percentile of these ten is 1 + 0.9 × (2 - 1) = 1.9 mm
THICKNESSES = [1.0, 2.0, *[2.5] * 6, 5.0, 5.0]
ABDOMEN = {
    "spacings": [[z, 0.74, 0.74] for z in THICKNESSES],
    "shapes_after_crop": [[97, 512, 512]] * 10,
    "median_relative_size_after_cropping": 1.0,
}
HIPPOCAMPUS = {
    "spacings": [[1.0, 1.0, 1.0]] * 260,
    "shapes_after_crop": [[36, 50, 35]] * 260,
    "median_relative_size_after_cropping": 0.5,
}
CT = {"percentile_00_5": -970.0, "percentile_99_5": 279.0, "mean": 80.0, "std": 140.0}
MIRRORING = {
    "allowed_axes": [0, 1],
    "allowed_axes_2d": [0],
    "left_right_axis": 2,
    "pairs": [["left kidney", "right kidney"]],
    "reason": "left and right have labels of their own (left kidney / right kidney), and axis 2 runs left-right",
    "warning": "The left-right axis of these cases points the other way than that of most: case_03.",
}


def configuration(spacing: list, median: list, patch: list, batch: int, **changes: Any) -> dict[str, Any]:
    """As nnU-Net writes it, with a network of three stages that halves every axis but the first one once."""
    flat = [1] * (len(patch) - 2)
    return {
        "spacing": spacing,
        "median_image_size_in_voxels": median,
        "patch_size": patch,
        "batch_size": batch,
        "batch_dice": False,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "architecture": {
            "arch_kwargs": {
                "strides": [[1] * len(patch), [*flat, 2, 2], [2] * len(patch)],
                "kernel_sizes": [[*flat, 3, 3], [3] * len(patch), [3] * len(patch)],
                "features_per_stage": [16, 32, 64],
                "n_blocks_per_stage": [1, 3, 4],
                "n_conv_per_stage_decoder": [1, 1],
            }
        },
        **changes,
    }


def stage(patch: list, batch: int, gib: float) -> dict[str, Any]:
    return {"patch_size": patch, "batch_size": batch, "predicted_peak_gib": gib}


def abdomen_plans() -> dict[str, Any]:
    """As the first version of the planner wrote them: no reasons, no memory by part, no inference."""
    return {
        "dataset_name": "Dataset022_Abdomen",
        "plans_name": "DiffSegPlans",
        "transpose_forward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": CT},
        "configurations": {
            "2d": configuration([0.74, 0.74], [512, 512], [512, 512], 12, batch_dice=True),
            "3d_lowres": configuration([1.9, 1.5, 1.5], [128, 253, 253], [80, 160, 160], 2),
            "3d_fullres": configuration([1.9, 0.74, 0.74], [128, 512, 512], [64, 160, 160], 2, batch_dice=True),
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
            "3d_mine": {"inherits_from": "3d_fullres", "batch_size": 5},
        },
        "diffseg": {
            "version": 1,
            "backbone": "resenc",
            "base_features": 16,
            "memory": {"budget_gib": 8.0, "budget_source": "requested", "rule": "a rule of thumb"},
            "mirroring": MIRRORING,
            "pool": {"unlabelled_datasets": ["Dataset008_More"]},
            "diffusion": {"timesteps": 1000, "schedule": "linear_beta", "prediction": "epsilon", "fold_timestep": 100},
            "coordinates": {"mode": "guidance"},
            "configurations": {
                "2d": {"training": stage([512, 512], 12, 7.6), "pretraining": stage([512, 512], 12, 7.0)},
                "3d_lowres": {"training": stage([80, 160, 160], 2, 7.2), "pretraining": stage([80, 160, 160], 4, 7.9)},
                "3d_fullres": {
                    "training": stage([64, 160, 160], 2, 6.0),
                    "pretraining": stage([64, 192, 160], 2, 7.0),
                },
                "3d_cascade_fullres": {"training": stage([64, 160, 160], 2, 6.4)},
            },
        },
    }


def hippocampus_plans() -> dict[str, Any]:
    """As a later version writes them: with reasons, memory by part, and inference."""
    mr = {"normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [True]}
    memory = {"weights": 0.25, "gradients": 0.25, "activations": 2.5}
    return {
        "dataset_name": "Dataset004_Hippocampus",
        "plans_name": "DiffSegPlans",
        "transpose_forward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration([1, 1, 1], [36, 50, 35], [40, 56, 40], 9, **mr)},
        "diffseg": {
            "memory": {"budget_gib": 4.0, "budget_source": "free on GPU 0", "gpus": 2},
            "pool": {"unlabelled_datasets": []},
            "configurations": {
                "3d_fullres": {
                    "training": stage([40, 56, 40], 9, 3.0) | {"memory_gib": memory},
                    "pretraining": stage([40, 56, 40], 12, 3.2),
                    "inference": {"predicted_peak_gib": 0.5, "median_case_gib": 0.4, "largest_case_gib": 0.5},
                    "reasons": {"topology": "as its sibling", "two_stages": "one topology for both"},
                }
            },
        },
    }


def found(decisions: list[Decision], scope: str, what: str) -> Decision:
    (decision,) = (each for each in decisions if (each.scope, each.what) == (scope, what))
    return decision


ABDOMEN_DECISIONS = [
    ("data set", "backbone", "resenc", "residual-encoder U-Net"),
    ("data set", "base features", 16, "as asked for"),
    ("data set", "memory budget, GiB", 8.0, "requested"),
    ("data set", "order of axes", [0, 1, 2], "kept: the axis of the largest target spacing, 1.9 mm, is the first"),
    ("data set", "normalisation", ["CTNormalization"], "-970 and 279, minus its mean 80, divided by its standard"),
    ("data set", "mirrored axes", [0, 1], "left kidney / right kidney), and axis 2 runs left-right. The left-right"),
    ("data set", "mirrored axes", [0, 1], "case_03"),
    ("data set", "mirrored axes of 2d", [0], "slices run along axis 0"),
    ("data set", "pretraining pool", ["Dataset008_More"], "--unlabeled"),
    ("data set", "coordinates", "guidance", "trained first"),
    ("data set", "time steps", 1000, "linear_beta"),
    ("2d", "target spacing, mm", [0.74, 0.74], "that of 3d_fullres within a slice"),
    # 10 cases of 128 × 512 × 512 voxels: 5 % are 16.8 million
    ("2d", "batch of training", 12, "as many as fit the budget; 5% of the voxels of the 10 labelled cases"),
    ("2d", "batch of training", 12, "are 64 patches"),
    ("2d", "patch of training, voxels", [512, 512], "the whole median image"),
    ("2d", "Dice loss over the batch", True, "slices"),
    ("2d", "memory of training, GiB", {"peak": 7.6}, "95% of the budget"),
    ("3d_lowres", "planned", True, "covers 5% of the median image's voxels, less than 25%"),
    ("3d_lowres", "batch of training", 2, "the least; 5% of the voxels of the 10 labelled cases are 2 patches"),
    ("3d_lowres", "batch of pretraining", 4, "pairs"),
    ("3d_lowres", "Dice loss over the batch", False, "much of the image"),
    ("3d_fullres", "target spacing, mm", [1.9, 0.74, 0.74], "along axis 0 the 10th percentile: its median, 2.5 mm"),
    # 2.5 and 5 mm are more than 3 × 0.74 mm; the target's 1.9 mm is not
    ("3d_fullres", "order of resampling", {"image": 3, "labels": 1, "across coarse slices": 0}, ": 8 of 10"),
    ("3d_fullres", "stages", 3, "64×160×160 is halved 1, 2, 2 times along its axes, to feature maps of 32×40×40"),
    ("3d_fullres", "features", [16, 32, 64], "at most 320"),
    ("3d_fullres", "strides", [[1, 1, 1], [1, 2, 2], [2, 2, 2]], "less than twice as long as the shortest"),
    ("3d_fullres", "kernels", [[1, 3, 3], [3, 3, 3], [3, 3, 3]], "1 along axis 0 in the first 1 stage(s)"),
    ("3d_fullres", "blocks", {"encoder": [1, 3, 4], "decoder": [1, 1]}, "residual blocks"),
    ("3d_fullres", "patch of training, voxels", [64, 160, 160], "fits the budget: 5% of the median image's voxels"),
    ("3d_fullres", "batch of training", 2, "the least, for which the patch was chosen"),
    ("3d_fullres", "batch of training", 2, "are 10 patches"),
    ("3d_fullres", "patch of pretraining, voxels", [64, 192, 160], "its own"),
    ("3d_fullres", "Dice loss over the batch", True, "where there is a 3d_lowres"),
    ("3d_cascade_fullres", "planned", True, "3d_fullres that reads the segmentation of 3d_lowres"),
    ("3d_cascade_fullres", "pretraining", None, "previous stage's segmentation"),
    ("3d_cascade_fullres", "batch of training", 2, "are 10 patches"),
    ("3d_mine", "planned", False, "made by hand, inherits from 3d_fullres"),
]
HIPPOCAMPUS_DECISIONS = [
    ("data set", "memory budget, GiB", 4.0, "free on GPU 0, on each of 2 GPUs"),
    ("data set", "pretraining pool", [], "alone"),
    ("data set", "normalisation", ["ZScoreNormalization"], "within the non-zero region: cropping to it leaves 50%"),
    ("3d_fullres", "target spacing, mm", [1.0, 1.0, 1.0], "median of the 260 cases"),
    # 63000 × 260 × 0.05 / 89600 = 9.1
    ("3d_fullres", "batch of training", 9, "are 9 patches: a batch has no more, whatever fits"),
    ("3d_fullres", "patch of pretraining, voxels", [40, 56, 40], "that of the training: both stages have one topology"),
    ("3d_fullres", "stages", 3, "as its sibling"),
    (
        *("3d_fullres", "memory of training, GiB"),
        {"peak": 3.0, "weights": 0.25, "gradients": 0.25, "activations": 2.5},
        "75% of the budget",
    ),
    (
        *("3d_fullres", "memory of inference, GiB"),
        {"peak": 0.5, "median case": 0.4, "largest case": 0.5},
        "12% of the budget",
    ),
    ("3d_fullres", "two stages", None, "one topology for both"),
    ("3d_lowres", "planned", False, "covers 142% of the median image's voxels, not less than 25%"),
    ("3d_fullres", "Dice loss over the batch", False, "no 3d_lowres"),
]


@pytest.mark.parametrize(("scope", "what", "value", "why"), ABDOMEN_DECISIONS)
def test_a_plan_of_the_abdomen(scope: str, what: str, value: Any, why: str) -> None:
    decision = found(explain(abdomen_plans(), ABDOMEN), scope, what)
    assert decision.value == value
    assert why in decision.why


@pytest.mark.parametrize(("scope", "what", "value", "why"), HIPPOCAMPUS_DECISIONS)
def test_a_plan_of_the_hippocampus(scope: str, what: str, value: Any, why: str) -> None:
    decision = found(explain(hippocampus_plans(), HIPPOCAMPUS), scope, what)
    assert decision.value == value
    assert why in decision.why


def test_the_planners_own_reasons_come_first() -> None:
    plans = abdomen_plans()
    own = {"patch": "shrunk to fit", "pretraining_batch": "filled up", "batch": "by the rule", "lowres": "too large"}
    plans["diffseg"]["configurations"]["3d_fullres"]["reasons"] = own
    decisions = explain(plans, ABDOMEN)
    assert found(decisions, "3d_fullres", "patch of training, voxels").why == "shrunk to fit"
    assert found(decisions, "3d_fullres", "batch of training").why == "by the rule"
    assert found(decisions, "3d_fullres", "batch of pretraining").why == "filled up"
    assert found(decisions, "3d_lowres", "planned").why == "too large"


@pytest.mark.parametrize("reason", [None, "that of the checkpoint"])
def test_a_spacing_that_no_rule_gives(reason: str | None) -> None:
    plans = hippocampus_plans()
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]
    if reason:
        plans["diffseg"]["configurations"]["3d_fullres"]["reasons"]["spacing"] = reason
    why = found(explain(plans, HIPPOCAMPUS), "3d_fullres", "target spacing, mm").why
    assert why == (reason or "asked for (--spacing); nnU-Net's rule would give 1, 1, 1")


def test_a_plan_made_to_start_from_a_checkpoint() -> None:
    """What is the checkpoint's is not said to be nnU-Net's rule."""
    plans, topology = abdomen_plans(), "3 of the checkpoint's 5 stages, with its features and blocks"
    plans["configurations"]["3d_fullres"] |= {"spacing": [2.0, 1.0, 1.0], "use_mask_for_norm": [True]}
    rows = [
        {"kind": "loaded", "how": "as it is", "tensors": 9, "parameters": 90, "share": 0.9},
        {"kind": "adapted", "how": "4 input channel(s) averaged for 1", "tensors": 1, "parameters": 10, "share": 0.1},
    ]
    plans["diffseg"]["source"] = {
        "checkpoint": "checkpoint_final.pth",
        "adopted": [
            "normalisation: of all channels",
            "3d_fullres, spacing: 2 × 1 × 1 mm",
            f"3d_fullres, topology: {topology}",
        ],
        "shares": {"3d_fullres": {"loaded": 0.9, "adapted": 0.1, "skipped": 0.0}},
        "transfer": {"3d_fullres": rows},
    }
    intensities = {"0": {**CT, "mean": 95.0}}
    decisions = explain(plans, {**ABDOMEN, "foreground_intensity_properties_per_channel": intensities})
    assert found(decisions, "data set", "starts from").value == "checkpoint_final.pth"
    for what in ("backbone", "base features"):
        assert "--from-checkpoint" in found(decisions, "data set", what).why
    normalisation = found(decisions, "data set", "normalisation").why
    assert "clipped to the foreground's, in the checkpoint's data, 0.5 and 99.5 percentiles" in normalisation
    assert normalisation.endswith("within the non-zero region, as in the checkpoint's data")
    spacing = found(decisions, "3d_fullres", "target spacing, mm").why
    expected = "from the checkpoint (--from-checkpoint): 2 × 1 × 1 mm; nnU-Net's rule would give 1.9, 0.74, 0.74"
    assert spacing == expected
    for what in ("features", "strides", "kernels", "blocks"):
        assert found(decisions, "3d_fullres", what).why == topology
        if what in ("features", "strides"):
            assert found(decisions, "3d_lowres", what).why != topology
    transfer = found(decisions, "3d_fullres", "starts from the checkpoint, shares of parameters")
    assert transfer.value == {"loaded": 0.9, "adapted": 0.1, "skipped": 0.0}
    assert transfer.why == "loaded: as it is (90.0%); adapted: 4 input channel(s) averaged for 1 (10.0%)"


def test_a_batch_that_was_stepped_down() -> None:
    plans = hippocampus_plans()
    stages = plans["diffseg"]["configurations"]["3d_fullres"]
    stages["reasons"]["batch"] = "as many as fit 4 GiB"
    measured = {"allocated_gib": 2.5, "reserved_gib": 2.75, "planned_batch_size": 11}
    stages["training"]["measured"] = measured
    why = found(explain(plans, HIPPOCAMPUS), "3d_fullres", "batch of training").why
    assert why.startswith("stepped down from 11 (--measure)")
    del measured["planned_batch_size"]
    assert found(explain(plans, HIPPOCAMPUS), "3d_fullres", "batch of training").why == "as many as fit 4 GiB"


@pytest.mark.parametrize(
    ("order", "spacing", "value", "why"),
    [
        # the coarse axis was the files' last
        ([2, 0, 1], [1.9, 0.74, 0.74], [2, 0, 1], "axis 2 of the files has the largest target spacing, 1.9 mm"),
        ([0, 1, 2], [0.74, 0.74, 1.9], [0, 1, 2], "kept, though the first axis, 0.74 mm, is not"),
    ],
)
def test_transposed_data(order: list[int], spacing: list[float], value: list[int], why: str) -> None:
    plans = abdomen_plans() | {"transpose_forward": order}
    plans["configurations"]["3d_fullres"]["spacing"] = spacing
    fingerprint = ABDOMEN | {
        "spacings": [[0.74, 0.74, z] for z in THICKNESSES],
        "shapes_after_crop": [[512, 512, 97]] * 10,
    }
    decisions = explain(plans, fingerprint)
    decision = found(decisions, "data set", "order of axes")
    assert decision.value == value
    assert why in decision.why
    along = f"along axis {spacing.index(1.9)} the 10th percentile"
    assert along in found(decisions, "3d_fullres", "target spacing, mm").why


def test_images_of_one_slice() -> None:
    plans = abdomen_plans()
    plans["configurations"] = {"2d": plans["configurations"]["2d"]}
    fingerprint = {"spacings": [[999.0, 0.74, 0.74]] * 4, "shapes_after_crop": [[1, 512, 512]] * 4}
    decisions = explain(plans, fingerprint)
    assert "2D" in found(decisions, "3d_fullres", "planned").why
    assert found(decisions, "2d", "target spacing, mm").why == "median of the 4 cases"
    # 4 × 512 × 512 × 0.05 / 512 / 512 = 0.2
    assert found(decisions, "2d", "batch of training").why.startswith("as planned; 5%")


def test_a_lowres_that_was_dropped() -> None:
    plans = abdomen_plans()
    for name in ("3d_lowres", "3d_cascade_fullres"):
        del plans["configurations"][name]
    assert "more than half of the voxels" in found(explain(plans, ABDOMEN), "3d_lowres", "planned").why


@pytest.mark.parametrize("fingerprint", [None, {}, {"spacings": []}])
def test_a_lost_fingerprint(fingerprint: dict | None) -> None:
    decisions = explain(abdomen_plans(), fingerprint)
    assert "fingerprint is missing" in found(decisions, "3d_fullres", "target spacing, mm").why
    assert "5%" in found(decisions, "3d_fullres", "batch of training").why
    everything = {(each.scope, each.what) for each in explain(abdomen_plans(), ABDOMEN)}
    assert {(each.scope, each.what) for each in decisions} == everything


def test_the_number_of_labelled_cases_counts() -> None:
    why = found(explain(abdomen_plans(), ABDOMEN, training_cases=0), "3d_lowres", "batch of training").why
    assert why == "the least; 5% of the voxels of the 0 labelled cases are 0 patches"


@pytest.mark.parametrize("removed", list(abdomen_plans()["diffseg"]))
def test_a_section_without_a_key(removed: str) -> None:
    plans = copy.deepcopy(abdomen_plans())
    del plans["diffseg"][removed]
    assert explain(plans, ABDOMEN)


def test_foreign_plans_are_refused() -> None:
    plans = abdomen_plans()
    del plans["diffseg"]
    with pytest.raises(BadInputError, match="diffseg plan"):
        explain(plans, ABDOMEN)


@pytest.mark.parametrize("case", [(abdomen_plans(), ABDOMEN), (hippocampus_plans(), HIPPOCAMPUS)])
def test_table_and_json_say_the_same(case: tuple) -> None:
    decisions = explain(*case)
    stored = json.loads(json.dumps([decision.to_json() for decision in decisions], allow_nan=False))
    columns = [[str(cell) for cell in column.cells] for column in explanation_table("D", decisions).columns]
    assert list(zip(*columns, strict=True)) == [(d["scope"], d["what"], shown(d["value"]), d["why"]) for d in stored]
    assert len({(d["scope"], d["what"]) for d in stored}) == len(stored)
    assert all(d["why"] for d in stored)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (12, "12"),
        (0.7421875, "0.7422"),
        ([], "none"),
        ([0, 1], "0, 1"),
        ([[1, 2, 2], [2, 2, 2]], "1×2×2, 2×2×2"),
        ({"peak": 3.14159, "weights": 1}, "peak 3.142, weights 1"),
    ],
)
def test_values_for_people(value: Any, text: str) -> None:
    assert shown(value) == text
