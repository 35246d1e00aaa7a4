"""Plans for GPUs of many sizes, beside stock nnU-Net's for the same budget: patch, batch, memory and planning time.

Usage: python benchmarks/plans.py [--budgets 4 8 11 16 24 40 80] [--filled-budgets 4 8 24 40 80] [--cache FOLDER]

Needs no images and no GPU: data sets are fingerprints. The memory of all plans, stock's too, is counted by
planning/memory.py, allowances included.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from fingerprints import BTCV_3MM, FLARE22, HIPPOCAMPUS, Fingerprint, workspace_of
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
)
from results import cached, table, write_section

from diffseg_nnunet.planners import DiffSegPlainPlanner, DiffSegPlanner
from diffseg_nnunet.planning.gpus import MemoryBudget
from diffseg_nnunet.planning.search import Choice

CONFIGURATION = "3d_fullres"
PLANNERS = {"plain": (DiffSegPlainPlanner, ExperimentPlanner), "resenc": (DiffSegPlanner, ResEncUNetPlanner)}
SCENARIOS = {
    "1 class": replace(FLARE22, classes=1),
    "14 classes": replace(FLARE22, classes=14),
    "118 classes": replace(FLARE22, classes=118),
    "4 channels, 4 classes": Fingerprint("brain", (1.0, 1.0, 1.0), (155, 190, 160), 400, 4, channels=4, modality="MRI"),
}
FULL, LEAST_FILLED = 1.0, 0.85


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=[4, 8, 11, 16, 24, 40, 80])
    parser.add_argument("--filled-budgets", type=float, nargs="+", default=[4, 8, 24, 40, 80])
    parser.add_argument("--cache", type=Path, help="folder of plans made before, to go on from")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.cache or Path(temporary)
        write_section("plans", _plans_report(options.budgets, folder))
        write_section("budget-filled", _filled_report(options.filled_budgets, folder))


def plan(fingerprint: Fingerprint, backbone: str, gib: float, folder: Path) -> dict[str, Any]:
    """Our plan and stock's of 3d_fullres for a budget: patches, batches, GiB, seconds of planning everything."""
    classes = f"{fingerprint.classes}classes_{fingerprint.channels}channels"
    name = f"{fingerprint.name}_{classes}_{backbone}_{gib:g}.json".replace(" ", "_")
    record = cached(folder / name, lambda: _plan(fingerprint, backbone, gib))
    print(fingerprint.name, classes, backbone, gib, record, flush=True)
    return record


def _plan(fingerprint: Fingerprint, backbone: str, gib: float) -> dict[str, Any]:
    ours, stock = PLANNERS[backbone]
    with workspace_of(fingerprint) as (_, dataset), contextlib.redirect_stdout(io.StringIO()):
        planner = ours(dataset)
        planner.configure(budget=MemoryBudget(gib, "asked for"))
        began = perf_counter()
        plans = planner.plan_experiment()
        seconds = perf_counter() - began
        stages = plans["diffseg"]["configurations"][CONFIGURATION]
        began = perf_counter()
        other = stock(dataset, gpu_memory_target_in_gb=gib, plans_name="nnUNetPlans").plan_experiment()
        stock_seconds = perf_counter() - began
        theirs = other["configurations"][CONFIGURATION]
        choice = Choice(tuple(int(side) for side in theirs["patch_size"]), int(theirs["batch_size"]))
        theirs_gib = planner.fitting.training_memory(planner.fitting.shape(theirs["architecture"], choice)).total_gib
    record: dict[str, Any] = {"seconds": seconds, "configurations": list(plans["configurations"])}
    for stage in ("training", "pretraining"):
        record[stage] = {key: stages[stage][key] for key in ("patch_size", "batch_size", "predicted_peak_gib")}
    record["why"] = stages["reasons"]
    record["stock"] = {"patch_size": list(choice.patch), "batch_size": choice.batch, "predicted_peak_gib": theirs_gib}
    record["stock"]["seconds"] = stock_seconds
    return record


def _cells(stage: dict[str, Any]) -> list[str]:
    patch = "×".join(str(side) for side in stage["patch_size"])
    return [f"{patch}, {stage['batch_size']}", f"{stage['predicted_peak_gib']:.2f}"]


def _plans_report(budgets: list[float], folder: Path) -> str:
    rows, slowest = [], dict.fromkeys(budgets, 0.0)
    for fingerprint in (HIPPOCAMPUS, BTCV_3MM, FLARE22):
        for gib in budgets:
            record = plan(fingerprint, "resenc", gib, folder)
            slowest[gib] = max(slowest[gib], record["seconds"])
            stages = [*_cells(record["training"]), *_cells(record["pretraining"]), *_cells(record["stock"])]
            seconds = [f"{record['seconds']:.0f}", f"{record['stock']['seconds']:.0f}"]
            rows.append([fingerprint.name, f"{gib:g}", *stages, *seconds])
    longest = max(slowest, key=slowest.__getitem__)
    header = (
        "data",
        "budget GiB",
        "training",
        "GiB",
        "pretraining",
        "GiB",
        "stock nnU-Net",
        "GiB",
        "seconds",
        "stock's",
    )
    return (
        "## Plans for many GPUs\n\nScript: `benchmarks/plans.py`. 3d_fullres of the residual encoder U-Net (stock: "
        "nnU-Net's planner of the same network): patch and batch of both stages, and the predicted peak with all "
        "allowances. Seconds: planning all configurations (2d, 3d_fullres, and 3d_lowres with its cascade where "
        f"nnU-Net wants them), ours and stock's; our slowest took {slowest[longest]:.0f} s, for {longest:g} GiB. "
        "Where a plan is far below its budget, the patch covers the median case, and a batch holds 5 % of the data's "
        "voxels (nnU-Net's rule) or one more patch would not fit.\n\n" + table(header, rows)
    )


def _filled_report(budgets: list[float], folder: Path) -> str:
    rows, outside, stock_over = [], 0, 0
    for name, fingerprint in SCENARIOS.items():
        for backbone in PLANNERS:
            for gib in budgets:
                record = plan(fingerprint, backbone, gib, folder)
                shares = [record[stage]["predicted_peak_gib"] / gib for stage in ("training", "pretraining", "stock")]
                covered = record["why"]["patch"].startswith("the largest nnU-Net")
                outside += not (LEAST_FILLED <= shares[0] <= FULL or (covered and shares[0] <= FULL))
                stock_over += shares[2] > FULL
                rows.append([name, backbone, f"{gib:g}"])
                for stage, share in zip(("training", "pretraining", "stock"), shares, strict=True):
                    rows[-1] += [_cells(record[stage])[0], f"{share:.2f}"]
                rows[-1].append(("patch covers the case, " + record["why"]["batch"].split(":")[0]) if covered else "")
    header = ("of", "backbone", "budget GiB", "training", "of budget", "pretraining", "of budget")
    header = (*header, "stock nnU-Net", "of budget", "")
    return (
        "## How full the budget is\n\nScript: `benchmarks/plans.py`. Predicted peak of a step over the budget, "
        "3d_fullres of data like FLARE22's and of brain MR with four channels. Our training steps outside "
        f"[{LEAST_FILLED}, {FULL:.2f}] where patch or batch could still grow: **{outside} of {len(rows)}**; stock's "
        f"plan needs more than the budget in {stock_over}.\n\n" + table(header, rows)
    )


if __name__ == "__main__":
    main()
