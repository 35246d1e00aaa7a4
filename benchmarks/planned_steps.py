"""On real data: plan for a budget, then take three steps of each stage with the patch and the batch that were planned.

Usage: python benchmarks/planned_steps.py WORKSPACE DATA [--budgets 1 2]

DATA holds Task04_Hippocampus and BTCV_3mm. Converts and plans anew for each budget; preprocesses once a spacing.
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import diffseg, table, write_section

from diffseg_nnunet import registry
from diffseg_nnunet.pipeline.measured_steps import TRAINERS
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.planning.section import STAGES, stage_plan
from diffseg_nnunet.workspace import Workspace

CONFIGURATION, STEPS = "3d_fullres", 3
HIPPOCAMPUS, ABDOMEN = 4, 5
PLAN = ("--backbone", "plain", "--base-features", 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[1, 2])
    options = parser.parse_args()
    os.environ["DIFFSEG_WORKSPACE"] = str(options.workspace.resolve())
    os.environ["nnUNet_n_proc_DA"] = "0"
    _convert(options.workspace, options.data)
    rows, exact = [], True
    for number, name in ((HIPPOCAMPUS, "hippocampus"), (ABDOMEN, "BTCV_3mm")):
        for gib in options.budgets:
            diffseg("plan", number, "--gpu-memory", gib, *PLAN)
            diffseg("preprocess", number, "-c", CONFIGURATION)
            for stage in STAGES:
                planned, taken, losses = steps(number, stage)
                exact = exact and taken == {(planned["batch_size"], *planned["patch_size"])}
                patch = "×".join(str(side) for side in planned["patch_size"])
                shapes = "; ".join(f"{shape[0]} of {'×'.join(map(str, shape[1:]))}" for shape in sorted(taken))
                gibs = f"{planned['predicted_peak_gib']:.2f}"
                row = [name, f"{gib:g}", stage, f"{planned['batch_size']} of {patch}", gibs, shapes]
                rows.append([*row, " ".join(f"{loss:.3f}" for loss in losses)])
                print(*rows[-1], flush=True)
    header = ("data", "budget GiB", "stage", "planned", "predicted GiB", "stepped with", "losses")
    write_section(
        "planned-steps",
        "## Steps are taken as planned\n\nScript: `benchmarks/planned_steps.py`. Real data, planned for a budget "
        f"(plain network, 16 features); then {STEPS} steps of each stage by its trainer, on the batches its own loader "
        f"gives. All batches exactly as planned: **{'yes' if exact else 'no'}**.\n\n" + table(header, rows),
    )


def steps(number: int, stage: str) -> tuple[dict[str, Any], set[tuple[int, ...]], list[float]]:
    """What was planned for a stage, the shapes (batch, *patch) of the batches, and their losses."""
    project = Project.open(Workspace.locate().activate(), number)
    plans = {**copy.deepcopy(project.plans()), "continue_training": False}
    of_class = registry.load("trainers", TRAINERS[stage])
    trainer = of_class(plans, CONFIGURATION, 0, project.dataset_json(), device=torch.device("cpu"))
    trainer.initialize()
    loader = trainer.build_loaders()[0].start_at(0, 0, 0, 1)
    if stage == "pretraining":
        trainer.on_train_epoch_start()
    trainer.network.train()
    shapes, losses = set(), []
    for _ in range(STEPS):
        batch = next(loader)
        shapes.add((len(batch["data"]), *(int(side) for side in batch["data"].shape[2:])))
        losses.append(float(np.mean(trainer.train_step(batch)["loss"])))
    return stage_plan(plans, CONFIGURATION, stage), shapes, losses


def _convert(workspace: Path, data: Path) -> None:
    raw = workspace / "nnUNet_raw"
    if not list(raw.glob(f"Dataset{HIPPOCAMPUS:03d}_*")):
        diffseg("convert", "msd", data / "Task04_Hippocampus", "--id", HIPPOCAMPUS)
    if not list(raw.glob(f"Dataset{ABDOMEN:03d}_*")):
        from abdomen import LABELS

        from diffseg_nnunet.atomic import write_json

        names = workspace / "labels.json"
        write_json(names, LABELS)
        images, labels = workspace / "images", workspace / "labels"
        # files of a case are paired by name; these have prefixes of their own
        for kind, target in (("img", images), ("label", labels)):
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted((data / "BTCV_3mm" / "RawData" / "Training" / kind).glob("*.nii.gz")):
                (target / path.name.replace(kind, "btcv")).write_bytes(path.read_bytes())
        source = ("--images", images, "--labels", labels, "--label-names", names)
        diffseg("convert", "folder", *source, "--modality", "CT", "--id", ABDOMEN, "--name", "BTCV")


if __name__ == "__main__":
    main()
