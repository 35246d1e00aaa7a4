"""Two processes that share each batch train as one that has it whole: same losses, same weights, one writer."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffseg_nnunet.workspace import Workspace

from .conftest import LABELLED, environment_restored
from .parallel_run import build, losses_of, weights_of

PROGRAM = Path(__file__).with_name("parallel_run.py")
EPOCHS = 20  # of one iteration each
FLOAT32 = {"iterations": EPOCHS, "workers": 0, "precision": "float32", "seed": 2}
# AdamW makes steps of equal size of gradients that are rounding alone: at the usual rate the course is chaotic, and one
# process differs from itself by 1e-4 when its weights are changed by 1e-7
RUNS = {
    "pretraining": ("DiffSegPretrainer", {**FLOAT32, "pictures": 1, "initial_lr": 1e-4}),
    "training": ("DiffSegTrainer", {**FLOAT32, "optimizer": "sgd"}),
    # with few scans and a batch of four, patches of a scan lie in both processes
    "keeping": ("DiffSegTrainer", {**FLOAT32, "optimizer": "sgd", "keep_coordinates": 3.0}),
}
STOPPED_AT = 16


@dataclass(frozen=True)
class Course:
    """What a training came to."""

    losses: list[float]
    weights: np.ndarray
    files: set[str]


def files_in(folder: Path) -> set[str]:
    """Paths of the files below, without times and process ids: of logs and event files."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {re.sub(r"(events\.out|training_log).*", r"\1", str(path)) for path in paths}


@pytest.fixture(scope="module")
def one_thread_each() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(
    phantom_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory, one_thread_each: None
) -> tuple[dict[str, Course], Path]:
    """Both trainings in this process, and the pretraining's checkpoint after some epochs."""
    courses, folder = {}, tmp_path_factory.mktemp("alone")
    checkpoint = folder / "stopped.pth"
    with environment_restored():
        for name, (trainer_name, settings) in RUNS.items():
            workspace = Workspace(phantom_workspace.raw, phantom_workspace.preprocessed, folder / name).activate()
            trainer = build(workspace, LABELLED, trainer_name, settings)
            if name == "pretraining":
                trainer.progress = keep_when_stopped(trainer, checkpoint)
            trainer.initialize()
            trainer.run_training()
            weights = weights_of(trainer)
            courses[name] = Course(losses_of(trainer), weights, files_in(folder / name))
    return courses, checkpoint


def keep_when_stopped(trainer: Any, checkpoint: Path) -> Callable[[int, int, str], None]:
    def progress(_done: int, _total: int, news: str) -> None:
        if news.startswith(f"epoch {STOPPED_AT}/"):
            shutil.copy(trainer.latest_checkpoint, checkpoint)

    return progress


@pytest.fixture(scope="module")
def together(
    phantom_workspace: Workspace, alone: tuple[dict[str, Course], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same in two processes, and the stopped pretraining gone on with in two."""
    folder = tmp_path_factory.mktemp("together")
    runs = {name: {"trainer": kind, "settings": chosen, "resume": None} for name, (kind, chosen) in RUNS.items()}
    runs["resumed"] = {**runs["pretraining"], "resume": str(alone[1])}
    task = {
        "raw": str(phantom_workspace.raw),
        "preprocessed": str(phantom_workspace.preprocessed),
        "results": str(folder),
        "dataset": LABELLED,
        "runs": runs,
    }
    (folder / "task.json").write_text(json.dumps(task))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(PROGRAM)]
    with environment_restored():
        finished = subprocess.run(
            [*command, str(folder / "task.json")], capture_output=True, text=True, timeout=500, check=False
        )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder


def assert_nearly(weights: np.ndarray, expected: np.ndarray) -> None:
    """As a whole: a bias before a norm has a gradient of rounding errors alone, whose sign AdamW takes for one."""
    assert np.sqrt(np.mean((weights - expected) ** 2)) < 1e-4
    assert np.mean(np.abs(weights - expected) > 1e-3) < 1e-3


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_weights_are_those_of_one_process(
    alone: tuple[dict[str, Course], Path], together: Path, name: str
) -> None:
    expected = alone[0][name]
    assert len(expected.losses) == 2 * EPOCHS
    weights = []
    for rank in (0, 1):
        report = json.loads((together / f"{name}_{rank}.json").read_text())
        assert report["batch_size"] == 2
        if rank == 0 or name == "pretraining":
            np.testing.assert_allclose(report["losses"], expected.losses, atol=1e-4)
        weights.append(np.load(together / f"{name}_{rank}.npy"))
    np.testing.assert_array_equal(*weights)
    assert_nearly(weights[0], expected.weights)
    # it is one course and no other: without learning, or with half of each batch, losses would differ by far more
    assert np.ptp(expected.losses[:EPOCHS]) > 0.05


@pytest.mark.parametrize("name", RUNS)
def test_only_the_first_process_writes(alone: tuple[dict[str, Course], Path], together: Path, name: str) -> None:
    assert files_in(together / name / "rank_0") == alone[0][name].files
    assert files_in(together / name / "rank_1") == set()
    assert any(file.endswith("checkpoint_final.pth") for file in alone[0][name].files)


def test_two_processes_go_on_where_one_stopped(alone: tuple[dict[str, Course], Path], together: Path) -> None:
    expected = alone[0]["pretraining"]
    for rank in (0, 1):
        report = json.loads((together / f"resumed_{rank}.json").read_text())
        assert report["start"] == STOPPED_AT
        np.testing.assert_allclose(report["losses"], expected.losses, atol=1e-4)
    assert_nearly(np.load(together / "resumed_0.npy"), expected.weights)
