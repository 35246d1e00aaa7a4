"""Predicted against measured peak memory of both stages, for plans from 4 to 80 GiB, beside nnU-Net's own estimate.

Usage: python benchmarks/planned_memory.py WORKSPACE [--plan-only] [--only NAME ...] [--compile] [--within-budget]

Needs a GPU; a plan larger than it is left out and said so, so one with 80 GiB or more shows most. No data: fingerprints
are synthetic, and steps are taken on noise, by the trainers, as `diffseg plan ID --measure` does. On a GPU machine:

    pip install -e . && python benchmarks/planned_memory.py WORKSPACE

Planning needs no GPU. Where GPU time is scarce, make the plans elsewhere with --plan-only (WORKSPACE is a few MB of
JSON then), and copy WORKSPACE. What was planned or measured is kept there, each plan and stage on its own, so that an
interrupted run goes on; to measure again, remove WORKSPACE/measured, and after a change of the planner all of it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from fingerprints import FLARE22, Fingerprint, write
from results import cached, table, write_section

from diffseg_nnunet import registry
from diffseg_nnunet.errors import StageFailedError
from diffseg_nnunet.pipeline.measured_steps import STEPS, WARM_UP, Order
from diffseg_nnunet.pipeline.measuring import run_order
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.planning.gpus import Gpu, MemoryBudget, no_gpu_reason, only_gpu, visible_gpus
from diffseg_nnunet.planning.hardware import usable_cores
from diffseg_nnunet.planning.section import STAGES, stage_plan
from diffseg_nnunet.workspace import Workspace, dataset_folder_name

TRAINING_CASES = 200  # nnU-Net's batches stay below 5 % of them
TOLERANCE, TOO_LOW, FILLED = 0.05, 0.02, 0.85  # what the plans promise
OUT_OF_MEMORY, TOO_LARGE, FAILED = "out of memory", "larger than this GPU", "failed"


ABDOMEN = FLARE22
BRAIN = Fingerprint("brain", (1.0, 1.0, 1.0), (155, 190, 160), TRAINING_CASES, 1, modality="MRI")


@dataclass(frozen=True)
class Plan:
    """One plan to be measured.

    Attributes:
        budget_gib: planned for.
        backbone: "plain" or "resenc".
        classes: besides the background.
        channels: of the image.
        body: its images.
        configuration: that is measured.
    """

    budget_gib: int
    backbone: str
    classes: int
    channels: int
    body: Fingerprint
    configuration: str = "3d_fullres"

    @property
    def name(self) -> str:
        return f"{self.budget_gib}GiB-{self.backbone}-{self.classes}cl-{self.channels}ch-{self.configuration}"


PLANS = (
    Plan(4, "plain", 1, 1, ABDOMEN),
    Plan(6, "resenc", 14, 1, ABDOMEN),
    Plan(8, "plain", 14, 1, ABDOMEN),
    Plan(8, "resenc", 14, 1, ABDOMEN, "2d"),
    Plan(11, "resenc", 1, 4, BRAIN),
    Plan(16, "plain", 118, 1, ABDOMEN),
    Plan(24, "resenc", 14, 1, ABDOMEN),
    Plan(24, "plain", 14, 4, BRAIN),
    Plan(40, "resenc", 118, 1, ABDOMEN),
    Plan(70, "resenc", 1, 4, BRAIN),
    Plan(80, "plain", 14, 1, ABDOMEN),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--plan-only", action="store_true", help="make the plans, which needs no GPU")
    parser.add_argument("--only", nargs="+", choices=[plan.name for plan in PLANS], help="these plans; no section")
    parser.add_argument("--compile", action="store_true", help="torch.compile, nnU-Net's default: minutes more")
    parser.add_argument("--within-budget", action="store_true", help="torch may reserve the budget and no more")
    options = parser.parse_args()
    reason = no_gpu_reason()
    if reason is not None and not options.plan_only:
        sys.exit(f"The memory of training steps is measured on a GPU, and {reason}. Here, --plan-only can be used.")
    plans = [plan for plan in PLANS if options.only is None or plan.name in options.only]
    for variable in [name for name in os.environ if name.startswith("nnUNet_")]:
        del os.environ[variable]
    os.environ["nnUNet_compile"] = "true" if options.compile else "false"
    workspace = Workspace.locate(options.workspace.absolute()).activate()
    make_plans(workspace, plans)
    if options.plan_only:
        return
    gpus = visible_gpus()
    gpu = max(gpus, key=lambda each: each.free_gib)
    os.environ.update(only_gpu(gpu, gpus))
    rows = list(_measured(workspace, plans, gpu, options))
    if options.only is None:
        write_section("planned-memory" + ("-compiled" if options.compile else ""), report(rows, options))


# -- plans ------------------------------------------------------------------------------------------------------------


def make_plans(workspace: Workspace, plans: Iterable[Plan]) -> None:
    """Those that are not made yet, two cores each, in processes of their own."""
    missing = [plan for plan in plans if not _project(workspace, plan).plans_path.is_file()]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, usable_cores() // 2), mp_context=spawn) as pool:
        for plan, seconds in zip(missing, pool.map(make_plan, [workspace] * len(missing), missing), strict=True):
            print(f"{plan.name}: planned in {seconds:.0f} s", flush=True)


def make_plan(workspace: Workspace, plan: Plan) -> float:
    """Write the data set and its plan; returns the seconds that planning took."""
    project = _project(workspace, plan)
    workspace.activate()
    body = replace(plan.body, cases=TRAINING_CASES, classes=plan.classes, channels=plan.channels)
    write(workspace, project.name, body)
    planner = registry.load("planners", plan.backbone)(project.id)
    planner.configure(budget=MemoryBudget(float(plan.budget_gib), "requested"))
    begin = perf_counter()
    with project.log("plan"):
        planner.plan_experiment()
    return perf_counter() - begin


def _project(workspace: Workspace, plan: Plan) -> Project:
    number = 1 + PLANS.index(plan)
    return Project(workspace, dataset_folder_name(number, re.sub(r"\W|_", "", plan.name)))


def nnunet_estimate_gib(project: Project, plan: Plan, patch: tuple[int, ...], batch: int) -> float:
    """nnU-Net's rule for this network, patch and batch: its count of feature maps over the reference it calls 8 GiB."""
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
        ResEncUNetPlanner,
    )

    planner = {"plain": ExperimentPlanner, "resenc": ResEncUNetPlanner}[plan.backbone](project.id)
    network = project.configuration(plan.configuration)
    features = planner.static_estimate_VRAM_usage(
        patch,
        plan.channels,
        plan.classes + 1,
        network.network_arch_class_name,
        network.network_arch_init_kwargs,
        network.network_arch_init_kwargs_req_import,
    )
    dimensions = "2d" if len(patch) == 2 else "3d"
    reference = getattr(planner, f"UNet_reference_val_{dimensions}")
    reference_batch = getattr(planner, f"UNet_reference_val_corresp_bs_{dimensions}")
    return features / reference * batch / reference_batch * planner.UNet_reference_val_corresp_GB


# -- measurements -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One stage of one plan, GiB.

    Attributes:
        predicted: all of it; `predicted_allocated` is to be compared with `allocated`, `predicted_reserved` with
            `reserved`: torch counts no CUDA context, and tensors have no fragmentation.
        nnunet: its own estimate.
        reading: of the GPU; a text says why there is none.
    """

    plan: Plan
    stage: str
    patch: tuple[int, ...]
    batch: int
    predicted: float
    predicted_allocated: float
    predicted_reserved: float
    nnunet: float
    reading: Mapping[str, Any] | str


def _measured(workspace: Workspace, plans: Iterable[Plan], gpu: Gpu, options: argparse.Namespace) -> Iterator[Row]:
    kind = re.sub(r"\W+", "-", gpu.name) + ("-compiled" * options.compile) + ("-within-budget" * options.within_budget)
    folder = options.workspace / "measured" / kind
    for plan in plans:
        project = _project(workspace, plan)
        for stage in STAGES:
            row = _predicted(project, plan, stage)
            shape = "x".join(map(str, (*row.patch, row.batch)))

            def compute(project: Project = project, row: Row = row) -> dict[str, Any]:
                return {"reading": _reading(project, row, options.within_budget)}

            if row.predicted_reserved > gpu.free_gib:
                reading: Any = TOO_LARGE
            else:
                try:
                    reading = cached(folder / f"{plan.name}-{stage}-{shape}.json", compute)["reading"]
                except StageFailedError as error:  # the others are measured, and this one by the next run
                    print(error, flush=True)
                    reading = FAILED
            row = replace(row, reading=reading)
            print(" | ".join(cells(row)), flush=True)
            yield row


def _predicted(project: Project, plan: Plan, stage: str) -> Row:
    planned = stage_plan(project.plans(), plan.configuration, stage)
    patch, batch, total = tuple(planned["patch_size"]), planned["batch_size"], planned["predicted_peak_gib"]
    parts = planned.get("memory_gib", {})
    reserved = total - parts.get("context", 0.0)
    allocated = reserved - parts.get("fragmentation", 0.0)
    estimate = nnunet_estimate_gib(project, plan, patch, batch)
    return Row(plan, stage, patch, batch, total, allocated, reserved, estimate, "")


def _reading(project: Project, row: Row, within_budget: bool) -> dict[str, Any] | str:
    limit = row.plan.budget_gib - (row.predicted - row.predicted_reserved) if within_budget else None
    plan = row.plan
    order = Order(project.plans(), project.dataset_json(), plan.configuration, row.stage, limit_gib=limit)
    reading = run_order(project, order)
    return OUT_OF_MEMORY if reading is None else asdict(reading)


# -- report -----------------------------------------------------------------------------------------------------------

HEADER = (
    *("backbone", "classes", "channels", "stage", "patch", "batch", "budget", "predicted", "share of budget"),
    *(
        "allocated",
        "predicted over it",
        "reserved",
        "predicted over it",
        "outside torch",
        "nnU-Net's rule over reserved",
    ),
)


def cells(row: Row) -> list[str]:
    """Of the table's line."""
    plan = row.plan
    line = [plan.backbone, str(plan.classes), str(plan.channels), row.stage, " × ".join(map(str, row.patch))]
    line += [str(row.batch), str(plan.budget_gib), f"{row.predicted:.2f}", f"{row.predicted / plan.budget_gib:.2f}"]
    if isinstance(row.reading, str):
        return [*line, row.reading, *[""] * (len(HEADER) - len(line) - 1)]
    allocated, reserved = row.reading["allocated_gib"], row.reading["reserved_gib"]
    line += [f"{allocated:.2f}", f"**{row.predicted_allocated / allocated:.3f}**"]
    line += [f"{reserved:.2f}", f"**{row.predicted_reserved / reserved:.3f}**", f"{row.reading['outside_gib']:.2f}"]
    return [*line, f"{row.nnunet / reserved:.2f}"]


def summary(rows: Iterable[Row]) -> str:
    """How many predictions keep what is promised."""
    read = [row for row in rows if not isinstance(row.reading, str)]
    if not read:
        return "Nothing could be measured."
    sentences = [f"{len(read)} stages of {len({row.plan for row in read})} plans were measured."]
    for kind in ("allocated", "reserved"):
        ratios = [getattr(row, f"predicted_{kind}") / row.reading[f"{kind}_gib"] for row in read]
        near = sum(abs(ratio - 1) <= TOLERANCE for ratio in ratios)
        low = sum(ratio < 1 - TOO_LOW for ratio in ratios)
        sentences.append(
            f"Predicted over {kind}: {min(ratios):.3f} to {max(ratios):.3f}, {near} of {len(ratios)} within "
            f"±{TOLERANCE:.0%}, {low} more than {TOO_LOW:.0%} below."
        )
    filled = sum(row.predicted >= FILLED * row.plan.budget_gib for row in read)
    sentences.append(f"By prediction {filled} of {len(read)} fill {FILLED:.0%} of their budget or more.")
    rule = [row.nnunet / row.reading["reserved_gib"] for row in read]
    sentences.append(f"nnU-Net's rule over reserved: {min(rule):.2f} to {max(rule):.2f}.")
    failed = sum(row.reading == OUT_OF_MEMORY for row in rows)
    return " ".join([*sentences, f"{failed} ran out of memory."])


def report(rows: list[Row], options: argparse.Namespace) -> str:
    compiled = "compiled" if options.compile else "not compiled"
    limit = " torch was limited to each plan's budget." if options.within_budget else ""
    return (
        "## Planned memory on a GPU\n\nScript: `benchmarks/planned_memory.py`. Steps of the trainers on noise, "
        f"{STEPS} after at least {WARM_UP} of warm-up, each stage in a process of its own; networks {compiled}.{limit} "
        "GiB. *Predicted* is the plan's peak with its allowances; over *allocated* (`max_memory_allocated`) without "
        "those for fragmentation and the CUDA context, over *reserved* (`max_memory_reserved`) without the context's. "
        "*Outside torch* is all else that was taken on the GPU: context, libraries, driver. nnU-Net's rule is its "
        "planner's estimate for the same network, patch and batch; it knows no pretraining.\n\n"
        f"{summary(rows)}\n\n{table(HEADER, [cells(row) for row in rows])}"
    )


if __name__ == "__main__":
    main()
