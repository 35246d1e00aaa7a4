"""Few labels on the Decathlon's hippocampus: fine-tuning against the from-scratch twin, tested on fold 0.

Usage: python benchmarks/few_labels_hippocampus.py TASK_FOLDER WORKSPACE [--budgets 2cases 16cases 160cases]
           [--seeds 0 1 2] [--strategies finetune] [--iterations 600] [--pretrain-iterations 1000] [--no-report]
           [--measured]

Pretraining sees the images of fold 0's 160 training cases only. What is done is not done twice; with `--measured` what
is done is reported, and nothing else is run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from abdomen import CONFIGURATION, set_patch
from few_labels import add_benchmark_arguments, benchmark_report
from results import diffseg, write_section

ID, NAME = 5, "Dataset005_HippocampusFewLabels"
PLAN = ("--backbone", "plain", "--base-features", 8, "--gpu-memory", 1)
PATCH, PRETRAINING_BATCH, BATCH = (40, 56, 40), 4, 2
"""Patches of the planner's size, but nnU-Net's smallest batch: what a CPU trains in minutes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Task04_Hippocampus")
    parser.add_argument("workspace", type=Path, help="made and filled here; may exist")
    add_benchmark_arguments(
        parser, budgets=["2cases", "16cases", "160cases"], seeds=[0, 1, 2], iterations=600, pretrain_iterations=1000
    )
    parser.add_argument("--measured", action="store_true", help="report on what is done, and run nothing")
    options = parser.parse_args()
    prepare(options.source, options.workspace)
    output = options.workspace / "few_labels"
    diffseg(
        *("benchmark", "few-label", ID, "--workspace", options.workspace, "-o", output, "--optimizer", "adamw"),
        *("--budgets", *options.budgets, "--seeds", *options.seeds, "--strategies", *options.strategies),
        *("--iterations", options.iterations, "--pretrain-iterations", options.pretrain_iterations),
        *(("--report-only",) if options.measured else ()),
    )
    if not options.no_report:
        write_section("few-labels-hippocampus", _report(options, output))


def prepare(source: Path, workspace: Path) -> None:
    """Convert, verify, plan and preprocess; nothing where that is done."""
    done, ws = workspace / "prepared", ("--workspace", workspace)
    if done.is_file():
        return
    if not (workspace / "nnUNet_raw" / NAME).is_dir():
        diffseg("convert", "msd", source, "--id", ID, "--name", NAME.split("_", 1)[1], *ws)
    diffseg("verify", ID, *ws)
    diffseg("plan", ID, *PLAN, *ws)
    set_patch(workspace, NAME, PATCH, PRETRAINING_BATCH, BATCH)
    diffseg("preprocess", ID, "-c", CONFIGURATION, *ws)
    done.touch()


def _report(options: argparse.Namespace, output: Path) -> str:
    plan = " ".join(str(part) for part in PLAN)
    single = " Where a row is of one seed, p is of these two networks."
    return (
        "## Few labels: hippocampus\n\nScript: `benchmarks/few_labels_hippocampus.py`. MSD Task04, 200 cases, fold 0: "
        f"40 cases are tested on. Plan `{plan}`, patches of {'×'.join(map(str, PATCH))}, {BATCH} a batch. "
        f"The pretraining: {options.pretrain_iterations} iterations on the images of the 160 other cases, batches of "
        f"{PRETRAINING_BATCH}, coordinates `auxiliary`.{single} What follows is the report of `diffseg benchmark "
        f"few-label`.\n\n{benchmark_report(output, 'few_labels_hippocampus')}"
    )


if __name__ == "__main__":
    main()
