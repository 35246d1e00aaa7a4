"""Two processes that share each batch train as one that has it whole: same losses, same weights, one writer."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffseg_nnunet.training.threads import single_threaded
from diffseg_nnunet.workspace import Workspace
from tests.process_state import environment_restored

from .conftest import LABELLED, train_in_two_processes
from .parallel_run import build, losses_of, weights_of

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


@dataclass(frozen=True)
class Together:
    """What two processes came to: their folder, and by run the report and the weights of each."""

    folder: Path
    runs: dict[str, list[tuple[dict[str, Any], np.ndarray]]]


def files_in(folder: Path) -> set[str]:
    """Paths of the files below, without times and process ids: of logs and event files."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {re.sub(r"(events\.out|training_log).*", r"\1", str(path)) for path in paths}


@pytest.fixture(scope="module")
def alone(phantom_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Course], Path]:
    """Both trainings in this process, and the pretraining's checkpoint after some epochs."""
    courses, folder = {}, tmp_path_factory.mktemp("alone")
    checkpoint = folder / "stopped.pth"
    with environment_restored(), single_threaded():
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
) -> Together:
    """The same in two processes, and the stopped pretraining gone on with in two."""
    folder = tmp_path_factory.mktemp("together")
    runs = {name: {"trainer": kind, "settings": chosen} for name, (kind, chosen) in RUNS.items()}
    runs["resumed"] = {**runs["pretraining"], "resume": str(alone[1])}
    return Together(folder, train_in_two_processes(phantom_workspace, runs, folder))


def assert_nearly(weights: np.ndarray, expected: np.ndarray) -> None:
    """As a whole: a bias before a norm has a gradient of rounding errors alone, whose sign AdamW takes for one."""
    assert np.sqrt(np.mean((weights - expected) ** 2)) < 1e-4
    assert np.mean(np.abs(weights - expected) > 1e-3) < 1e-3


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_weights_are_those_of_one_process(
    alone: tuple[dict[str, Course], Path], together: Together, name: str
) -> None:
    expected = alone[0][name]
    assert len(expected.losses) == 2 * EPOCHS
    weights = []
    for rank, (report, learnt) in enumerate(together.runs[name]):
        assert report["batch_size"] == 2
        if rank == 0 or name == "pretraining":
            np.testing.assert_allclose(report["losses"], expected.losses, atol=1e-4)
        weights.append(learnt)
    np.testing.assert_array_equal(*weights)
    assert_nearly(weights[0], expected.weights)
    # it is one course and no other: without learning, or with half of each batch, losses would differ by far more
    assert np.ptp(expected.losses[:EPOCHS]) > 0.05


@pytest.mark.parametrize("name", RUNS)
def test_only_the_first_process_writes(alone: tuple[dict[str, Course], Path], together: Together, name: str) -> None:
    assert files_in(together.folder / name / "rank_0") == alone[0][name].files
    assert files_in(together.folder / name / "rank_1") == set()
    assert any(file.endswith("checkpoint_final.pth") for file in alone[0][name].files)


def test_two_processes_go_on_where_one_stopped(alone: tuple[dict[str, Course], Path], together: Together) -> None:
    expected = alone[0]["pretraining"]
    for report, _ in together.runs["resumed"]:
        assert report["start"] == STOPPED_AT
        np.testing.assert_allclose(report["losses"], expected.losses, atol=1e-4)
    assert_nearly(together.runs["resumed"][0][1], expected.weights)
