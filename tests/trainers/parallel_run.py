"""A program for torchrun: trains what a JSON file lists, as each of its processes; see test_two_processes.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffseg_nnunet import trainers
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.planning.section import diffseg_section
from diffseg_nnunet.training import processes
from diffseg_nnunet.training.settings import PretrainingSettings
from diffseg_nnunet.workspace import Workspace

CONFIGURATION = "3d_fullres"


def build(workspace: Workspace, dataset: int, trainer_name: str, settings: dict[str, Any]) -> Any:
    """A trainer of fold 0 on the CPU, with batches of four in both stages."""
    project = Project.open(workspace, dataset)
    plans = {**project.plans(), "continue_training": False}
    plans["configurations"][CONFIGURATION]["batch_size"] = 4
    diffseg_section(plans)["configurations"][CONFIGURATION]["pretraining"]["batch_size"] = 4
    trainer_class = getattr(trainers, trainer_name)
    trainer = trainer_class(plans, CONFIGURATION, 0, project.dataset_json(), device=torch.device("cpu"))
    if trainer_class is trainers.DiffSegPretrainer:
        trainer.apply(PretrainingSettings.from_plan(diffseg_section(plans), **settings))
    else:
        trainer.apply(trainer_class.settings_type(**settings))
    return trainer


def losses_of(trainer: Any) -> list[float]:
    """Of each epoch, in training and in validation."""
    if hasattr(trainer, "history"):
        rows = trainer.history.rows
        return [row[f"{part}_loss"] for part in ("training", "validation") for row in rows]
    return [float(loss) for key in ("train_losses", "val_losses") for loss in trainer.logger.get_value(key, step=None)]


def weights_of(trainer: Any) -> np.ndarray:
    """All that a trainer trains, flat."""
    modules = [trainer.network, *([trainer.refiner] if hasattr(trainer, "refiner") else [])]
    regulariser = getattr(trainer, "regulariser", None)
    modules += [] if regulariser is None else [regulariser.head]
    return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()]).numpy()


def main(task_file: str) -> None:
    task = json.loads(Path(task_file).read_text())
    torch.set_num_threads(1)
    preprocessed, raw = Path(task["preprocessed"]), Path(task["raw"])
    with processes.process_group(torch.device("cpu")):
        for name, run in task["runs"].items():
            # a folder for each rank: what others than the first write is seen
            results = Path(task["results"]) / name / f"rank_{processes.rank()}"
            workspace = Workspace(raw=raw, preprocessed=preprocessed, results=results).activate()
            trainer = build(workspace, task["dataset"], run["trainer"], run["settings"])
            trainer.initialize()
            if isinstance(trainer, trainers.DiffSegRefinerTrainer):
                trainer.take_segmentor(trainer.network.state_dict(), "its own", {"strategy": "scratch"})
            if run["resume"]:
                trainer.load_checkpoint(run["resume"])
            start = trainer.current_epoch
            trainer.run_training()
            report = {"start": start, "losses": losses_of(trainer), "batch_size": trainer.batch_size}
            weights = weights_of(trainer)
            prefix = Path(task["results"]) / f"{name}_{processes.rank()}"
            np.save(prefix.with_suffix(".npy"), weights)
            prefix.with_suffix(".json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
