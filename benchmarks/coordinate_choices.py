"""How the auxiliary head should read its patches, and by which objective: measured on training data.

Usage: python benchmarks/coordinate_choices.py WORKSPACE DATA [--iterations 400] [--seed 0]

Pretrains with each choice on the training cases of fold 0 (see abdomen.py) and measures displacements in clean patches
of the fold's validation cases, which are training cases of the benchmark: no held-out scan is touched.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from abdomen import BALANCE, CONFIGURATION, LABELLED, RATE, add_arguments, describe, prepare, run_environment, splits
from abdomen import training_scans as all_training_scans
from coordinates import AXES, displacement_record
from results import table, write_section
from scans import BODY_FROM_HU, body_points, coordinates_mm, inside, read_scan, window

from diffseg_nnunet.inference.pretrained import load_pretrained
from diffseg_nnunet.pipeline.device import prepare_device
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.stages import pretrain
from diffseg_nnunet.workspace import Workspace

CHOICES = {
    "a quarter of the scans clean, the others weighted by the signal left": {},
    "no scan clean": {"clean_share": 0.0},
    "half of the scans clean": {"clean_share": 0.5},
    "a quarter clean, without the patch's statistics": {"patch_statistics": False},
    "a quarter clean, APE's distances": {"objective": "distance"},
}
WINDOWS, POINTS = 12, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prepare(options.workspace, options.data)
    rows = []
    for number, (name, changes) in enumerate(CHOICES.items()):
        checkpoint = _pretrained(options, f"choice_{number}_seed{options.seed}_{options.iterations}", changes)
        denoising = json.loads(checkpoint.with_name("history.json").read_text())
        within, across = _errors(options, checkpoint)
        rows.append((name, _axes(within), _axes(across), f"{denoising:.4f}"))
    write_section(
        "coordinate-choices",
        f"## How the coordinate head reads its patches\n\nScript: `benchmarks/coordinate_choices.py`, seed "
        f"{options.seed}, {options.iterations} iterations each. {describe(options.workspace)} Pretrained on the "
        "training cases of fold 0 and OpenKBP, measured on clean patches of the fold's two validation cases (training "
        "cases of the other benchmarks). Median error of displacements, mm, along "
        + ", ".join(AXES)
        + "; and the denoising loss of the validation patches.\n\n"
        + table(("head reads", "within a patch", "across patches", "denoising"), rows),
    )


def _pretrained(options: argparse.Namespace, run: str, changes: dict) -> Path:
    os.environ.update(run_environment(options.workspace, run))
    project = Project.open(Workspace.locate(options.workspace).activate(), LABELLED)
    checkpoint = pretrain(
        project,
        CONFIGURATION,
        0,
        "cpu",
        coordinates={"mode": "auxiliary", **changes},
        iterations=options.iterations,
        initial_lr=RATE,
        balance=BALANCE,
        seed=options.seed,
    )
    history = torch.load(checkpoint, weights_only=True)["history"]
    checkpoint.with_name("history.json").write_text(json.dumps(history[-1]["validation_denoising"]))
    return checkpoint


def _errors(options: argparse.Namespace, checkpoint: Path) -> tuple[list[float], list[float]]:
    model = load_pretrained(checkpoint, prepare_device("cpu"))
    wanted, records = splits()[0]["val"], []
    for source in all_training_scans(options.workspace, "BTCV"):
        if source.case not in wanted:
            continue
        scan, generator = read_scan(model, source), np.random.default_rng([options.seed, len(records)])
        index = scan.to_index(body_points(source, BODY_FROM_HU["BTCV"]))
        index = index[inside(index, tuple(slice(0, side) for side in scan.shape))]
        predicted, true = [], []
        for centre in index[generator.integers(len(index), size=WINDOWS)]:
            box = window(centre, model.patch_size, scan.shape)
            places = index[inside(index, box)]
            places = places[generator.integers(len(places), size=POINTS)]
            predicted.append(coordinates_mm(model, scan, box, model.patch_size, places))
            true.append(scan.to_mm(places))
        records.append(displacement_record(np.stack(predicted), np.stack(true)))
    return tuple(np.mean([record[kind]["error"] for record in records], axis=0) for kind in ("within", "across"))


def _axes(errors: np.ndarray) -> str:
    return " / ".join(f"{error:.1f}" for error in errors)


if __name__ == "__main__":
    main()
