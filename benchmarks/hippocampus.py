"""The whole pipeline on the Decathlon's hippocampus, fold 0, on a CPU: from the download to scores.

Usage: python benchmarks/hippocampus.py TASK_FOLDER WORKSPACE [--seed 0]

Pretraining sees the images of fold 0's training cases only. The from-scratch twin has the same plan, length, seed,
optimizer and rate.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from results import diffseg, table, write_section

DATASET, NAME = 4, "Dataset004_Hippocampus"
PRETRAINING = ("--iterations", 200, "--initial-lr", 4e-3)
TRAINING = ("--iterations", 600, "--optimizer", "adamw")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Task04_Hippocampus")
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-twin", action="store_true", help="leave the from-scratch twin for a later run")
    options = parser.parse_args()
    ws = ("--workspace", options.workspace)
    seed = ("--seed", options.seed)
    if not (options.workspace / "nnUNet_raw" / NAME).exists():
        diffseg("convert", "msd", options.source, "--id", DATASET, *ws)
    diffseg("verify", DATASET, *ws)
    diffseg("plan", DATASET, "--backbone", "plain", "--base-features", 16, *ws)
    diffseg("preprocess", DATASET, "-c", "3d_fullres", *ws)
    diffseg("pretrain", DATASET, "-c", "3d_fullres", "-f", 0, *PRETRAINING, *seed, *ws)
    diffseg("train", DATASET, "-c", "3d_fullres", "-f", 0, *TRAINING, *seed, *ws)
    if not options.no_twin:
        diffseg("train", DATASET, "-c", "3d_fullres", "-f", 0, "--strategy", "scratch", *TRAINING, *seed, *ws)
    write_section("hippocampus", _report(options))


def _seconds(options: argparse.Namespace) -> dict[str, float]:
    """Durations of the stages, from the run manifest: the script can be interrupted and run again."""
    manifest = options.workspace / "nnUNet_results" / NAME / "diffseg_run.json"
    stages = json.loads(manifest.read_text())["stages"]
    wanted = (
        "verify",
        "plan",
        "preprocess/3d_fullres",
        "pretrain/3d_fullres/fold_0",
        "train/finetune/3d_fullres/fold_0",
    )
    return {name: stages[name]["seconds"] for name in wanted}


def _report(options: argparse.Namespace) -> str:
    seconds = _seconds(options)
    results = options.workspace / "nnUNet_results" / NAME
    rows = []
    networks = {"DiffSegTrainer": "pretrained + fine-tuned"}
    if not options.no_twin:
        networks["DiffSegTrainerScratch"] = "from-scratch twin"
    for trainer, label in networks.items():
        path = results / f"{trainer}__DiffSegPlans__3d_fullres" / "fold_0" / "validation_report" / "scores.json"
        scores = json.loads(path.read_text())
        overall = scores["overall"]
        per_label = [f"{s['structure']} {s['dsc']['mean']:.4f}" for s in scores["structures"]]
        interval = f"{overall['dsc']['mean']:.4f} [{overall['dsc']['ci_low']:.4f}, {overall['dsc']['ci_high']:.4f}]"
        rows.append((label, interval, ", ".join(per_label), f"{overall['nsd']['mean']:.4f}", len(scores["case_means"])))
    times = table(("stage", "seconds"), [(name, f"{each:.0f}") for name, each in seconds.items()])
    scores = table(("network", "mean DSC [95 % CI over cases]", "DSC by label", "NSD at 1 mm", "cases"), rows)
    return (
        "## Hippocampus (MSD Task04, 200 cases), fold 0, end to end on a CPU\n\n"
        f"Script: `benchmarks/hippocampus.py`, seed {options.seed}. Plain U-Net, 16 base features; pretraining "
        f"{PRETRAINING[1]} iterations on the images of the 160 training cases, training {TRAINING[1]} iterations "
        "(AdamW); 40 validation cases, predicted with test-time mirroring. "
        f"{'The from-scratch twin was not trained in this run' if options.no_twin else 'One seed'}: nothing here "
        "is evidence for or against pretraining.\n\n"
        f"{scores}\n\nThe stages of the first row, from the run manifest, together "
        f"**{sum(seconds.values()) / 60:.1f} minutes** (conversion takes seconds):"
        f"\n\n{times}"
    )


if __name__ == "__main__":
    main()
