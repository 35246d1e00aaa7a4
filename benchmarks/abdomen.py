"""The workspace of the pretraining benchmarks: abdominal CTs with labels, head-and-neck CTs without, cases held out.

Usage: python benchmarks/abdomen.py WORKSPACE DATA [--base-features 16] [--gpu-memory 1] [--spacing 6 6 6]
           [--patch 32 32 32] [--pretraining-batch 8]

DATA holds BTCV_3mm (RawData/Training/img, label) and OpenKBP (images). BTCV 0025-0034 and twenty drawn OpenKBP scans
never enter a data set of the workspace: no training, pretraining, planning or tuning can see them.
The other scripts prepare the workspace with the defaults where it is not prepared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from results import diffseg

from diffseg_nnunet.atomic import write_json
from diffseg_nnunet.dataset_conversion.btcv import BTCVConverter
from diffseg_nnunet.pipeline.manifest import FILE_NAME
from diffseg_nnunet.workspace import NNUNET_VARIABLES

LABELLED, POOL = 21, 22
NAME, POOL_NAME = "Dataset021_BTCVTrain", "Dataset022_OpenKBPUnlabelled"
CONFIGURATION = "3d_fullres"
LABELS = {"background": 0} | BTCVConverter.labels
ORGANS = tuple(BTCVConverter.labels)
TRAINING = tuple(f"{number:04d}" for number in (*range(1, 11), *range(21, 25)))
HELD_OUT = tuple(f"{number:04d}" for number in range(25, 35))
COMPLETE = tuple(number for number in TRAINING if number != "0023")  # that one has no gallbladder
HELD_OUT_OPENKBP, SEED = 20, 20260
PLAN = {"--backbone": ("plain",), "--base-features": (16,), "--gpu-memory": (1,), "--spacing": (6, 6, 6)}
PATCH, PRETRAINING_BATCH = (32, 32, 32), 8
"""Written into the plan: the planner's own patch nearly holds a scan, which would ask little of coordinates."""
FEW_FOLDS, FEW_CASES = 10, 2
"""Folds 1 to FEW_FOLDS train on FEW_CASES drawn cases each and validate on one other; fold 0 trains on twelve."""
RATE = 4e-3  # of short pretrainings
BALANCE = 1.0  # 14 abdominal scans beside 180 of the neck: in a short pretraining both are to be seen
DATASETS = ("BTCV", "OpenKBP")
SHARED_STAGES = ("verify", "plan", "preprocess")
_RECORD = "abdomen.json"


@dataclass(frozen=True)
class HeldOut:
    """A scan no training has seen; `label` where it has one."""

    case: str
    image: Path
    label: Path | None


@dataclass(frozen=True)
class Pretraining:
    """A finished pretraining and the seconds it took, by the run manifest."""

    checkpoint: Path
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--base-features", type=int, default=PLAN["--base-features"][0])
    parser.add_argument("--gpu-memory", default=PLAN["--gpu-memory"][0])
    parser.add_argument("--spacing", type=float, nargs=3, default=PLAN["--spacing"])
    parser.add_argument("--patch", type=int, nargs=3, default=PATCH)
    parser.add_argument("--pretraining-batch", type=int, default=PRETRAINING_BATCH)
    options = parser.parse_args()
    changes = {
        "--base-features": (options.base_features,),
        "--gpu-memory": (options.gpu_memory,),
        "--spacing": options.spacing,
    }
    prepare(options.workspace, options.data, PLAN | changes, options.patch, options.pretraining_batch)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two folders every script of this family is given."""
    parser.add_argument("workspace", type=Path, help="made and filled here; may exist")
    parser.add_argument("data", type=Path, help="folder of BTCV_3mm and OpenKBP")


def openkbp_held_out(cases: Sequence[str]) -> list[str]:
    """Those of the OpenKBP cases that are held out: the same for the same cases, in whatever order."""
    drawn = np.random.default_rng(SEED).choice(sorted(cases), HELD_OUT_OPENKBP, replace=False)
    return sorted(str(case) for case in drawn)


def splits() -> list[dict[str, list[str]]]:
    """Fold 0: all but two training cases; folds 1 to FEW_FOLDS: a few drawn complete cases, one other validates."""
    names = [f"btcv{number}" for number in TRAINING]
    folds = [{"train": names[:-2], "val": names[-2:]}]
    complete = [f"btcv{number}" for number in COMPLETE]
    for fold in range(1, FEW_FOLDS + 1):
        drawn = np.random.default_rng([SEED, fold]).choice(complete, FEW_CASES + 1, replace=False)
        *training, validation = (str(case) for case in drawn)
        folds.append({"train": sorted(training), "val": [validation]})
    return folds


def prepare(
    workspace: Path,
    data: Path,
    plan: Mapping[str, Sequence[object]] = PLAN,
    patch: Sequence[int] = PATCH,
    pretraining_batch: int = PRETRAINING_BATCH,
) -> None:
    """Convert, verify, plan and preprocess; nothing where that is done, by whatever plan."""
    if (workspace / _RECORD).is_file():
        return
    _stage(workspace / "sources", data)
    environment = run_environment(workspace)
    _convert(workspace, environment)
    diffseg("verify", LABELLED, environment=environment)
    chosen = [part for option, values in plan.items() for part in (option, *values)]
    diffseg("plan", LABELLED, *chosen, "--unlabeled", POOL, environment=environment)
    set_patch(workspace, NAME, patch, pretraining_batch)
    diffseg("preprocess", LABELLED, "-c", CONFIGURATION, environment=environment)
    write_json(workspace / "nnUNet_preprocessed" / NAME / "splits_final.json", splits())
    write_json(
        workspace / _RECORD,
        {
            "plan": {option: [str(value) for value in values] for option, values in plan.items()},
            "held_out": {name: [scan.case for scan in held_out(workspace, name)] for name in DATASETS},
        },
    )


def set_patch(
    workspace: Path, dataset: str, patch: Sequence[int], pretraining_batch: int, batch: int | None = None
) -> None:
    """As users of nnU-Net edit a plan by hand; the training's batch stays as planned where none is given."""
    path = workspace / "nnUNet_preprocessed" / dataset / "DiffSegPlans.json"
    plans = json.loads(path.read_text())
    stages = plans["diffseg"]["configurations"][CONFIGURATION]
    for part in (plans["configurations"][CONFIGURATION], stages["training"], stages["pretraining"]):
        part["patch_size"] = list(patch)
    stages["pretraining"]["batch_size"] = pretraining_batch
    if batch is not None:
        plans["configurations"][CONFIGURATION]["batch_size"] = stages["training"]["batch_size"] = batch
    write_json(path, plans)


def describe(workspace: Path) -> str:
    """The plan and the held-out cases, for a report."""
    record = json.loads((workspace / _RECORD).read_text())
    stages = json.loads((workspace / "nnUNet_preprocessed" / NAME / "DiffSegPlans.json").read_text())["diffseg"]
    stage = stages["configurations"][CONFIGURATION]["pretraining"]
    plan = " ".join(f"{option} {' '.join(values)}" for option, values in record["plan"].items())
    patch = "×".join(str(size) for size in stage["patch_size"])
    openkbp = ", ".join(case.removeprefix("okbp_") for case in record["held_out"]["OpenKBP"])
    return (
        f"Plan `{plan}`: pretraining patches of {patch}, {stage['batch_size']} a batch, from 14 BTCV and 180 OpenKBP "
        f"scans. Held out from everything: BTCV {HELD_OUT[0]}-{HELD_OUT[-1]} and OpenKBP {openkbp} (drawn by seed "
        f"{SEED})."
    )


def held_out(workspace: Path, dataset: str) -> list[HeldOut]:
    """The held-out scans of "BTCV" or "OpenKBP", sorted."""
    return _scans(workspace / "sources" / f"held_out_{dataset}")


def training_scans(workspace: Path, dataset: str) -> list[HeldOut]:
    """The scans that may be trained and tuned on, sorted."""
    return _scans(workspace / "sources" / f"training_{dataset}")


def run_folder(workspace: Path, run: str) -> Path:
    """The nnU-Net results folder of a run of its own."""
    return workspace / "runs" / run


def run_environment(workspace: Path, run: str | None = None, dataset: str = NAME) -> dict[str, str]:
    """The environment of commands that share raw and preprocessed data and have results of their own.

    Args:
        run: name of the run; None: the workspace's own results, of the stages all runs share.
        dataset: the one that is run.
    """
    workspace = workspace.resolve()
    shared = workspace / "nnUNet_results"
    results = shared if run is None else run_folder(workspace, run)
    paths = (workspace / "nnUNet_raw", workspace / "nnUNet_preprocessed", results)
    if run is not None:  # what the workspace has done, the run need not do again
        mine, common = (folder / dataset / FILE_NAME for folder in (results, shared))
        content = json.loads(common.read_text())
        shared_stages = {name: stage for name, stage in content["stages"].items() if name.startswith(SHARED_STAGES)}
        own_stages = json.loads(mine.read_text())["stages"] if mine.is_file() else {}
        content["stages"] = own_stages | shared_stages
        mine.parent.mkdir(parents=True, exist_ok=True)
        write_json(mine, content)
    return {**os.environ, **dict(zip(NNUNET_VARIABLES, map(str, paths), strict=True))}


def stage_seconds(workspace: Path, run: str, stage: str) -> float:
    """How long a stage of a run took, by its manifest."""
    manifest = json.loads((run_folder(workspace, run) / NAME / FILE_NAME).read_text())
    return manifest["stages"][stage]["seconds"]


def pretrain(workspace: Path, mode: str, seed: int, iterations: int, changes: Sequence[object] = ()) -> Pretraining:
    """Pretrain on all cases of the workspace, once.

    Args:
        mode: of the coordinates: none, auxiliary or guidance.
        changes: further options of the command.
    """
    run = "_".join(["pretrain", mode, f"seed{seed}", str(iterations), *(str(part).strip("-") for part in changes)])
    options = ("--coordinates", mode, "--pool", "all", "--iterations", iterations, "--initial-lr", RATE, "--seed", seed)
    options = (*options, "--balance", BALANCE, *changes)
    diffseg(
        "pretrain", LABELLED, "-c", CONFIGURATION, "-f", "all", *options, environment=run_environment(workspace, run)
    )
    model = run_folder(workspace, run) / NAME / f"DiffSegPretrainer__DiffSegPlans__{CONFIGURATION}" / "fold_all"
    seconds = stage_seconds(workspace, run, f"pretrain/{CONFIGURATION}/fold_all")
    return Pretraining((model / "checkpoint_final.pth").resolve(), seconds)


def _scans(folder: Path) -> list[HeldOut]:
    images = sorted((folder / "images").glob("*.nii.gz"))
    labels = [folder / "labels" / image.name for image in images]
    return [
        HeldOut(image.name.removesuffix(".nii.gz"), image, label if label.is_file() else None)
        for image, label in zip(images, labels, strict=True)
    ]


def _stage(sources: Path, data: Path) -> None:
    """Copy the scans into folders by their part, under names that pair and are no channel numbers."""
    btcv = data / "BTCV_3mm" / "RawData" / "Training"
    for part, numbers in (("training", TRAINING), ("held_out", HELD_OUT)):
        for number in numbers:
            for kind, source in (("images", f"img/img{number}"), ("labels", f"label/label{number}")):
                _copy(btcv / f"{source}.nii.gz", sources / f"{part}_BTCV" / kind / f"btcv{number}.nii.gz")
    images = {
        path.name.removesuffix(".nii.gz"): path for path in sorted((data / "OpenKBP" / "images").glob("*.nii.gz"))
    }
    apart = openkbp_held_out(list(images))
    for case, path in images.items():
        part = "held_out" if case in apart else "training"
        _copy(path, sources / f"{part}_OpenKBP" / "images" / path.name)
    write_json(sources / "labels.json", LABELS)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_file():
        shutil.copy2(source, target)


def _convert(workspace: Path, environment: Mapping[str, str]) -> None:
    sources = workspace / "sources"
    common = ("convert", "folder", "--modality", "CT")
    own = ("--labels", sources / "training_BTCV" / "labels", "--label-names", sources / "labels.json")
    for number, name, folder, more in (
        (LABELLED, NAME, sources / "training_BTCV", own),
        (POOL, POOL_NAME, sources / "training_OpenKBP", ()),
    ):
        if not (workspace / "nnUNet_raw" / name).exists():
            named = ("--id", number, "--name", name.split("_", 1)[1])
            diffseg(*common, "--images", folder / "images", *more, *named, environment=environment)


if __name__ == "__main__":
    main()
