"""``diffseg plan --measure``: the peak memory of real steps of the planned trainings, on the GPU they were planned for.

A few steps of the real trainers on noise, with the planned patch and batch; no preprocessed data are needed. Each stage
runs in a process of its own (:mod:`~diffseg_nnunet.pipeline.measured_steps`), so that memory that runs out there
troubles nobody here, and all of it is given back. What is measured is written into the plan, and a batch that does not
fit is stepped down.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from diffseg_nnunet import registry
from diffseg_nnunet.atomic import write_json
from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.pipeline import measured_steps
from diffseg_nnunet.pipeline.measured_steps import TRAINERS, Order, Reading
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.planning.gpus import Gpu, no_gpu_reason, only_gpu, smallest_gpu, visible_gpus
from diffseg_nnunet.planning.nnunet_rules import LEAST_BATCH
from diffseg_nnunet.planning.section import STAGES, diffseg_section, set_batch_size, stage_plan
from diffseg_nnunet.planning.stepping import fits, smaller_budget, step_down


def require_gpu() -> None:
    """Raises BadInputError without a GPU; the message says why there is none."""
    reason = no_gpu_reason()
    if reason is not None:
        raise BadInputError(
            f"--measure takes real steps on a GPU, and there is none: {reason}.",
            "Leave --measure out (the predicted memory needs no GPU), or plan with it on the machine that will train.",
        )


def measure(project: Project, configurations: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure both stages of planned configurations, and step down those whose memory exceeds the plan's budget.

    The plans file gets, for each stage, ``measured`` beside ``predicted_peak_gib``: ``allocated_gib`` and
    ``reserved_gib``, the GPU's name, torch's version, the date, whether the network was compiled, and, where the batch
    was stepped down, ``planned_batch_size``. It is written after each stage.

    Args:
        configurations: None: those that have both stages.

    Returns:
        The plans.

    Raises:
        BadInputError: there is no GPU, or a configuration is not planned; or, after all else has been measured and
            written, the smallest batch of some stage does not fit.
        StageFailedError: a step failed for another reason than memory.
    """
    require_gpu()
    gpus = visible_gpus()
    gpu = smallest_gpu(gpus)
    plans, misfits = project.plans(), []
    project.reporter.info(f"measuring on GPU {gpu.index} ({gpu.name}, {gpu.free_gib:.1f} GiB free)")
    for configuration, stage in stages_to_measure(plans, configurations):
        misfit = measure_stage(project, configuration, stage, gpu, only_gpu(gpu, gpus))
        if misfit is not None:
            misfits.append(misfit)
    if misfits:
        raise refusal(misfits)
    return project.plans()


def stages_to_measure(plans: Mapping[str, Any], configurations: Sequence[str] | None) -> list[tuple[str, str]]:
    """(configuration, stage) of all that is to be measured.

    Args:
        configurations: their planned stages; None: both stages of those that have both.

    Raises:
        BadInputError: one is not planned.
    """
    planned = diffseg_section(plans)["configurations"]
    if configurations is None:
        configurations = [name for name, stages in planned.items() if all(stage in stages for stage in STAGES)]
    for name in configurations:
        stage_plan(plans, name, "training")
    return [(name, stage) for name in dict.fromkeys(configurations) for stage in STAGES if stage in planned[name]]


@dataclass(frozen=True)
class Misfit:
    """A stage whose smallest batch exceeds the budget.

    Attributes:
        message: says so.
        budget_gib: the budget to plan with; None: the GPU has too little for any.
    """

    message: str
    budget_gib: float | None


def refusal(misfits: Sequence[Misfit]) -> BadInputError:
    """One error for all of them, with a budget that suits all."""
    message = " ".join(misfit.message for misfit in misfits)
    budgets = [misfit.budget_gib for misfit in misfits]
    if None in budgets:
        return BadInputError(message, "End what else uses the GPU, or choose another with CUDA_VISIBLE_DEVICES.")
    return BadInputError(message, f"Plan again with --gpu-memory {min(budgets):g}, and the other options it had.")


def measure_stage(
    project: Project, configuration: str, stage: str, gpu: Gpu, variables: Mapping[str, str], device: str = "cuda"
) -> Misfit | None:
    """Measure one stage, step it down where it must be, and write the result into the plan.

    Args:
        gpu: that is measured on.
        variables: by which a process sees it.
        device: "cpu" takes the same steps without any figures.
    """
    plans = project.plans()
    planned = stage_plan(plans, configuration, stage)
    budget, first = diffseg_section(plans)["memory"]["budget_gib"], planned["batch_size"]
    context = planned.get("memory_gib", {}).get("context", 0.0)
    readings: dict[int, Reading] = {}

    def peak(batch_size: int) -> float | None:
        set_batch_size(plans, configuration, stage, batch_size)
        reading = run_order(project, Order(plans, project.dataset_json(), configuration, stage, device), variables)
        project.reporter.info(_line(configuration, stage, plans, reading))
        if reading is None:
            return None
        readings[batch_size] = reading
        # torch's figures are without the CUDA context, for which the plan's budget has room
        return reading.reserved_gib + context

    group = registry.load("trainers", TRAINERS[stage]).samples_per_group
    trial = step_down(first, group, min(first, LEAST_BATCH), budget, peak)[-1]
    if trial.peak_gib is not None:
        reading = readings[trial.batch_size]
        record(project, configuration, stage, trial.batch_size, reading)
    if fits(trial, budget):
        if trial.batch_size < first:
            project.reporter.warn(f"{configuration} {stage}: the batch was stepped down to {trial.batch_size}")
        return None
    took = "the memory ran out" if trial.peak_gib is None else f"{trial.peak_gib:.2f} GiB were taken"
    return Misfit(
        f"{configuration} {stage} does not fit its budget of {budget:g} GiB even with a batch of {trial.batch_size}: "
        f"{took}.",
        smaller_budget(budget, gpu.free_gib, trial.peak_gib),
    )


def _line(configuration: str, stage: str, plans: Mapping[str, Any], reading: Reading | None) -> str:
    planned = stage_plan(plans, configuration, stage)
    result = (
        "the memory ran out"
        if reading is None
        else f"measured {reading.allocated_gib:.2f} GiB allocated, {reading.reserved_gib:.2f} GiB reserved"
    )
    predicted = planned["predicted_peak_gib"]
    return f"{configuration} {stage}, batch {planned['batch_size']}: predicted {predicted:.2f} GiB, {result}"


def record(project: Project, configuration: str, stage: str, batch_size: int, reading: Reading) -> None:
    """Write a measurement, and the batch it holds for, into the plans file."""
    plans = project.plans()
    planned = stage_plan(plans, configuration, stage)
    before = planned.get("measured", {}).get("planned_batch_size", planned["batch_size"])
    if batch_size != planned["batch_size"]:
        set_batch_size(plans, configuration, stage, batch_size)
    planned["measured"] = {
        "allocated_gib": round(reading.allocated_gib, 3),
        "reserved_gib": round(reading.reserved_gib, 3),
        "gpu": reading.gpu,
        "torch": reading.torch,
        "date": date.today().isoformat(),
        "compiled": reading.compiled,
    }
    if batch_size != before:
        planned["measured"]["planned_batch_size"] = before
    write_json(project.plans_path, plans)


def run_order(project: Project, order: Order, variables: Mapping[str, str] | None = None) -> Reading | None:
    """Have an order measured in a process of its own.

    Args:
        variables: further environment variables of that process.

    Returns:
        The reading; None where the memory ran out.

    Raises:
        StageFailedError: the process failed for another reason; the message holds its last words and its log.
    """
    folder = project.results / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "measure.log"
    environment = {**os.environ, **(variables or {}), "nnUNet_wandb_enabled": "0"}
    # -P: the installed package, not a folder of that name where the user happens to be
    command = [sys.executable, "-P", "-m", measured_steps.__name__]
    with open(log, "a", encoding="utf-8") as errors:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        answer = ""
        try:
            # a pipe is broken where the child failed before it read: its log says why.
            # stdin stays open meanwhile: its end tells the child that nobody waits any more
            with suppress(BrokenPipeError), child.stdin, child.stdout:
                child.stdin.write(json.dumps(asdict(order)) + "\n")
                child.stdin.flush()
                answer = child.stdout.readline()
        except BaseException:
            child.kill()
            raise
        finally:
            child.wait()
    if not answer:
        raise StageFailedError(
            f"Measuring {order.configuration} {order.stage} failed: {_last_words(log, child.returncode)}.",
            f"The whole message is in {log}.",
        )
    content = json.loads(answer)
    return None if content is None else Reading(**content)


def _last_words(log: Path, code: int) -> str:
    if code < 0:
        return f"its process was ended by signal {-code} (9: most often the machine's memory, not the GPU's, ran out)"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].rstrip(".") if lines else f"exit code {code}"
