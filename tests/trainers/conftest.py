"""A small preprocessed phantom, made once, and trainers that work on it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from diffseg_nnunet import registry
from diffseg_nnunet.phantom import write_phantom
from diffseg_nnunet.pipeline.planning import PlanRequest, plan
from diffseg_nnunet.pipeline.preprocessing import preprocess
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.planning.section import diffseg_section
from diffseg_nnunet.trainers import DiffSegPretrainer
from diffseg_nnunet.training.settings import PretrainingSettings
from diffseg_nnunet.workspace import Workspace
from tests.process_state import environment_restored

from .learning import NewTrainer, trained

if TYPE_CHECKING:
    from tests.conftest import MadeOnce

LABELLED, UNLABELLED = 901, 902
REQUEST = PlanRequest(gpu_memory="1", backbone="plain", base_features=8, spacing=(14.0, 14.0, 14.0))


@pytest.fixture(scope="session")
def phantom_workspace(made_once: MadeOnce) -> Workspace:
    """Six labelled and four unlabelled phantoms, both planned and preprocessed."""
    with environment_restored():
        return Workspace.locate(made_once("phantom", make_phantom_workspace))


def make_phantom_workspace(folder: Path) -> None:
    workspace = Workspace.locate(folder).activate()
    source = folder / "source"
    write_phantom(source, labelled=6, unlabelled=4, test=0, seed=3)
    converter = registry.load("converters", "folder")()
    labelled = converter.plan(source / "images", source / "labels", source / "labels.json", "CT", "Phantom")
    unlabelled = converter.plan(source / "unlabelled_images", None, None, "CT", "Unlabelled")
    for number, conversion in ((LABELLED, labelled), (UNLABELLED, unlabelled)):
        conversion.execute(dataset_id=number, workspace=workspace, workers=1)
    for number, pool, configurations in (
        (LABELLED, (UNLABELLED,), ["2d", "3d_fullres"]),
        (UNLABELLED, (), ["3d_fullres"]),
    ):
        project = Project.open(workspace, number)
        plan(project, replace(REQUEST, unlabelled=pool))
        preprocess(project, configurations)


def train_in_two_processes(
    phantom_workspace: Workspace, runs: dict[str, dict[str, Any]], folder: Path
) -> dict[str, list[tuple[dict[str, Any], np.ndarray]]]:
    """Have torchrun train fold 0 of the phantom in two processes, on the CPU; see parallel_run.py.

    Args:
        phantom_workspace: its results are not used.
        runs: name -> 'trainer', 'settings' and, where a checkpoint is gone on from, 'resume'.
        folder: gets the results of each run and process, in ``name/rank_N``.

    Returns:
        name -> report and weights of each process.
    """
    task = {
        "raw": str(phantom_workspace.raw),
        "preprocessed": str(phantom_workspace.preprocessed),
        "results": str(folder),
        "dataset": LABELLED,
        "runs": {name: {"resume": None, **run} for name, run in runs.items()},
    }
    path, program = folder / "task.json", Path(__file__).with_name("parallel_run.py")
    path.write_text(json.dumps(task))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program, path]
    with environment_restored():
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        name: [
            (json.loads((folder / f"{name}_{rank}.json").read_text()), np.load(folder / f"{name}_{rank}.npy"))
            for rank in (0, 1)
        ]
        for name in runs
    }


@pytest.fixture
def workspace(phantom_workspace: Workspace, tmp_path: Path, one_thread: None) -> Iterator[Workspace]:
    """Active, with results of its own."""
    with environment_restored():
        yield replace(phantom_workspace, results=tmp_path / "results").activate()


@pytest.fixture
def project(workspace: Workspace) -> Project:
    return Project.open(workspace, LABELLED)


@pytest.fixture
def new_trainer(workspace: Workspace) -> Callable[..., Any]:
    """Builds a trainer on the CPU, as ``diffseg train`` does: (class, configuration, fold, **settings) -> trainer."""

    def build(
        trainer_class: type,
        configuration: str = "3d_fullres",
        fold: int | str = 0,
        dataset: int = LABELLED,
        further_labels: dict[str, int] | None = None,
        **settings: Any,
    ) -> Any:
        project = Project.open(workspace, dataset)
        plans = {**project.plans(), "continue_training": False}
        content = project.dataset_json()
        content["labels"] |= further_labels or {}
        trainer = trainer_class(plans, configuration, fold, content, device=torch.device("cpu"))
        settings = {"workers": 0, "iterations": 2, **settings}
        if issubclass(trainer_class, DiffSegPretrainer):
            settings = {"pictures": 0, **settings}  # they take longer than an epoch here
            trainer.apply(PretrainingSettings.from_plan(diffseg_section(plans), **settings))
        else:
            trainer.apply(trainer_class.settings_type(**settings))
        return trainer

    return build


@pytest.fixture
def pretrained(new_trainer: NewTrainer) -> DiffSegPretrainer:
    """Pretrained for some iterations; its final checkpoint is on the disk."""
    trainer = new_trainer(DiffSegPretrainer, iterations=3)
    trained(trainer)
    return trainer
