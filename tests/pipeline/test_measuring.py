"""Measuring a plan: the same steps on the CPU, where only the figures of memory are missing."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.pipeline import measured_steps, measuring
from diffseg_nnunet.pipeline.measured_steps import Order, Reading
from diffseg_nnunet.pipeline.measuring import Misfit
from diffseg_nnunet.pipeline.planning import several_gpus_note
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.planning.gpus import Gpu
from diffseg_nnunet.planning.section import set_batch_size, stage_plan
from diffseg_nnunet.trainers.base import unwrapped
from diffseg_nnunet.workspace import Workspace
from tests.process_state import environment_restored

if TYPE_CHECKING:
    from tests.pipeline.conftest import TinyProject

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
READING = Reading(3.2, 3.6, 0.9, "Some GPU", "2.9.0", False, 5)


@pytest.fixture(scope="module")
def planned_json(planned: TinyProject) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plans and dataset.json."""
    plans, dataset = ((planned.preprocessed / name).read_text() for name in ("DiffSegPlans.json", "dataset.json"))
    return json.loads(plans), json.loads(dataset)


@pytest.fixture
def order(planned_json: tuple[dict[str, Any], dict[str, Any]]) -> Order:
    """Of a pretraining on the CPU; its plans may be changed."""
    plans, dataset = copy.deepcopy(planned_json)
    return Order(plans, dataset, "3d_fullres", "pretraining", "cpu")


@pytest.fixture
def project(planned_project: TinyProject) -> Iterator[Project]:
    with environment_restored():
        yield Project.open(Workspace.locate(planned_project.workspace).activate(), 1)


def shapes_seen(order: Order) -> tuple[set[tuple[int, ...]], Reading]:
    """Shapes of what enters the network's first convolution in each step, and what was read."""
    seen: set[tuple[int, ...]] = set()
    with measured_steps.scratch_folders(order):
        trainer = measured_steps.build_trainer(order, torch.device("cpu"))
        first = next(
            m for m in unwrapped(trainer.network).modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d))
        )
        first.register_forward_pre_hook(lambda _, inputs: seen.add(tuple(inputs[0].shape)))
        return seen, measured_steps.take_steps(trainer)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stage", ["pretraining", "training"])
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_steps_have_the_planned_patch_and_batch(order: Order, configuration: str, stage: str) -> None:
    set_batch_size(order.plans, configuration, stage, 4)  # of a 2d plan it is large
    planned = stage_plan(order.plans, configuration, stage)
    environment = dict(os.environ)
    seen, reading = shapes_seen(Order(order.plans, order.dataset_json, configuration, stage, "cpu"))
    assert seen == {(4, 1, *planned["patch_size"])}
    assert reading.steps == measured_steps.WARM_UP + measured_steps.STEPS
    assert dict(os.environ) == environment


@pytest.mark.usefixtures("one_thread")
def test_stages_may_differ_in_patch_and_batch(order: Order) -> None:
    planned = stage_plan(order.plans, "3d_fullres", "pretraining")
    *sizes, last = planned["patch_size"]
    planned |= {"patch_size": [*sizes, 2 * last], "batch_size": 2}
    seen, _ = shapes_seen(order)
    assert seen == {(2, 1, *sizes, 2 * last)}


@pytest.mark.usefixtures("one_thread")
def test_guidance_is_measured_with_its_regressor(order: Order) -> None:
    order.plans["diffseg"]["coordinates"]["mode"] = "guidance"
    set_batch_size(order.plans, "3d_fullres", "pretraining", 2)
    seen, _ = shapes_seen(order)
    # three maps of coordinates besides the image
    assert {shape[:2] for shape in seen} == {(2, 4)}


@pytest.mark.usefixtures("one_thread")
def test_regions_and_an_ignore_label(order: Order) -> None:
    labels = {"background": 0, "body": [1, 2], "kidney": 2, "ignore": 3}
    dataset = {**order.dataset_json, "labels": labels, "regions_class_order": [1, 2]}
    set_batch_size(order.plans, "3d_fullres", "training", 2)
    seen, _ = shapes_seen(Order(order.plans, dataset, "3d_fullres", "training", "cpu"))
    assert {shape[0] for shape in seen} == {2}


@pytest.mark.usefixtures("one_thread")
def test_a_cascade_reads_masks_besides_the_image(order: Order) -> None:
    plans = order.plans
    name = "3d_cascade_fullres"
    plans["configurations"]["3d_lowres"] = plans["configurations"]["3d_fullres"] | {"next_stage": name}
    plans["configurations"][name] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    planned = stage_plan(plans, "3d_fullres", "training")
    plans["diffseg"]["configurations"][name] = {"training": dict(planned)}
    set_batch_size(plans, "3d_fullres", "training", 2)
    assert stage_plan(plans, name, "training")["batch_size"] == 2  # it inherits
    seen, _ = shapes_seen(Order(plans, order.dataset_json, name, "training", "cpu"))
    foreground = len(order.dataset_json["labels"]) - 1
    assert seen == {(2, 1 + foreground, *planned["patch_size"])}


def test_a_process_takes_the_steps(project: Project) -> None:
    before = stage_plan(project.plans(), "3d_fullres", "pretraining")
    variables = {"OMP_NUM_THREADS": "1"}
    gpu = Gpu(0, "None", 7.0, 8.0)
    assert measuring.measure_stage(project, "3d_fullres", "pretraining", gpu, variables, "cpu") is None
    after = stage_plan(project.plans(), "3d_fullres", "pretraining")
    measured = after.pop("measured")
    assert after == before
    assert (measured["gpu"], measured["reserved_gib"], measured["torch"]) == ("cpu", 0, torch.__version__)
    assert "cite" in (project.results / "logs" / "measure.log").read_text()  # nnU-Net's words are no answer
    assert not list(project.results.glob("DiffSeg*"))  # no model's folder is begun


def test_a_process_that_fails_leaves_its_last_words(project: Project, order: Order) -> None:
    with pytest.raises(StageFailedError, match=r"Measuring 2d training failed: .*Unknown device 'tpu'.*measure\.log"):
        measuring.run_order(project, Order(order.plans, order.dataset_json, "2d", "training", "tpu"))


def test_both_stages_or_those_that_are_named(order: Order) -> None:
    plans = order.plans
    stages = ("pretraining", "training")
    plans["diffseg"]["configurations"]["3d_cascade_fullres"] = {"training": {}, "reasons": {}}
    assert measuring.stages_to_measure(plans, None) == [(name, s) for name in ("2d", "3d_fullres") for s in stages]
    named = measuring.stages_to_measure(plans, ["3d_cascade_fullres", "2d", "2d"])
    assert named == [("3d_cascade_fullres", "training"), ("2d", "pretraining"), ("2d", "training")]
    with pytest.raises(BadInputError, match=r"no configuration '3d'.*3d_fullres"):
        measuring.stages_to_measure(plans, ["3d"])


def test_a_measurement_is_kept_in_the_plan(project: Project) -> None:
    measuring.record(
        project, "2d", "pretraining", stage_plan(project.plans(), "2d", "pretraining")["batch_size"], READING
    )
    measured = stage_plan(project.plans(), "2d", "pretraining")["measured"]
    assert (measured["allocated_gib"], measured["reserved_gib"], measured["gpu"]) == (3.2, 3.6, "Some GPU")
    assert set(measured) == {"allocated_gib", "reserved_gib", "gpu", "torch", "date", "compiled"}
    assert "measured" not in stage_plan(project.plans(), "2d", "training")


def test_a_batch_that_was_stepped_down_is_what_both_train_with(project: Project) -> None:
    before = stage_plan(project.plans(), "2d", "training")
    for batch in (before["batch_size"] - 1, before["batch_size"] - 2):
        measuring.record(project, "2d", "training", batch, READING)
    plans = project.plans()
    after = stage_plan(plans, "2d", "training")
    assert after["batch_size"] == plans["configurations"]["2d"]["batch_size"] == batch
    assert after["measured"]["planned_batch_size"] == before["batch_size"]


def test_the_prediction_follows_the_batch(order: Order) -> None:
    planned = stage_plan(order.plans, "3d_fullres", "training")
    parts = {"weights": 0.1, "batch": 0.2, "activations": 4.0, "context": 0.5}
    planned |= {"batch_size": 4, "predicted_peak_gib": 4.8, "memory_gib": parts}
    set_batch_size(order.plans, "3d_fullres", "training", 3)
    assert planned["memory_gib"] == {"weights": 0.1, "batch": 0.15, "activations": 3.0, "context": 0.5}
    assert planned["predicted_peak_gib"] == pytest.approx(3.75)


def test_memory_is_no_reason_to_train_again(project: Project) -> None:
    """What a training depends on is patch and batch, not what is known of their memory."""
    from diffseg_nnunet.pipeline.stages import stage_inputs
    from diffseg_nnunet.training.settings import TrainingSettings

    def inputs() -> dict[str, Any]:
        return stage_inputs(project, "2d", {"train": [], "val": []}, TrainingSettings())

    before, batch = inputs(), stage_plan(project.plans(), "2d", "training")["batch_size"]
    measuring.record(project, "2d", "training", batch, READING)
    assert inputs() == before
    measuring.record(project, "2d", "training", batch - 1, READING)
    assert inputs() != before


def test_what_does_not_fit_is_refused_with_a_budget_that_suits_all() -> None:
    error = measuring.refusal([Misfit("One does not fit.", 7.3), Misfit("Two does not fit.", 6.0)])
    assert str(error).startswith("One does not fit. Two does not fit. Plan again with --gpu-memory 6, ")
    error = measuring.refusal([Misfit("One does not fit.", 7.3), Misfit("Two does not fit.", None)])
    assert "--gpu-memory" not in str(error)
    assert "CUDA_VISIBLE_DEVICES" in str(error)


def test_several_gpus_are_told_what_they_can_share(order: Order) -> None:
    plans = order.plans
    memory = plans["diffseg"]["memory"]
    assert memory["gpus"] == 0
    for gpus in (0, 1):
        memory["gpus"] = gpus
        assert several_gpus_note(plans) is None
    memory["gpus"] = 4
    for stage, batch in (("pretraining", 2), ("training", 12)):
        set_batch_size(plans, "3d_fullres", stage, batch)
    note = several_gpus_note(plans)
    assert note is not None
    assert note.startswith("4 GPUs are visible, and each batch is what one of them holds")
    assert "3d_fullres pretraining 1 only, 3d_fullres training 2 or 3 or 4" in note


def test_refused_before_anything_is_planned(planned_project: TinyProject) -> None:
    path = planned_project.preprocessed / "DiffSegPlans.json"
    stamp = path.stat().st_mtime_ns
    no_gpu, nothing_to_name = planned_project.diffseg.in_one_process(
        [("plan", 1, "--measure", "-c", "2d", "3d_fullres"), ("plan", 1, "-c", "2d")]
    )
    no_gpu.refused("--measure takes real steps on a GPU, and there is none", "Leave --measure out")
    nothing_to_name.refused("-c names what --measure measures", "Leave it out")
    assert path.stat().st_mtime_ns == stamp


@needs_gpu
def test_a_plan_is_measured(project: Project) -> None:
    plans = measuring.measure(project, ["3d_fullres"])
    for stage in ("pretraining", "training"):
        measured = stage_plan(plans, "3d_fullres", stage)["measured"]
        assert 0 < measured["allocated_gib"] <= measured["reserved_gib"]
        assert measured["gpu"] == torch.cuda.get_device_name()


@needs_gpu
def test_a_batch_that_runs_out_of_memory(project: Project, order: Order) -> None:
    set_batch_size(order.plans, "2d", "training", 4096)
    assert measuring.run_order(project, Order(order.plans, order.dataset_json, "2d", "training", limit_gib=0.5)) is None
