"""``diffseg run`` is killed in every long stage, as by a power cut; the next one goes on, and nothing is done twice."""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Finished
    from tests.pipeline.conftest import TinyProject

pytestmark = pytest.mark.pipeline

PRETRAIN_EPOCHS, EPOCHS = 8, 20  # of one iteration each
OPTIONS = ("--pretrain-iterations", PRETRAIN_EPOCHS, "--iterations", EPOCHS, "--optimizer", "adamw")


def killed_when(project: TinyProject, triggered: Callable[[], bool]) -> None:
    """Start the run, and kill all its processes as soon as `triggered`."""
    run = project.diffseg.start("run", 1, *OPTIONS)
    deadline = time.monotonic() + 120
    try:
        while not triggered():
            assert run.process.poll() is None, run.wait()
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        run.kill()


def finished_cases(project: TinyProject) -> dict[Path, int]:
    folders = project.preprocessed.glob("DiffSegPlans_3d_fullres*")
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*.pkl")}


def checkpoints(project: TinyProject) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in project.results.rglob("*.pth")}


def epoch_gone_on_from(run: Finished) -> int:
    (epoch,) = re.findall(rf"going on from checkpoint_latest.pth at epoch (\d+)/{EPOCHS}", run.out)
    return int(epoch)


def logged_epochs(folder: Path) -> list[list[int]]:
    """The epochs of each training log of nnU-Net's, which every process begins anew."""
    logs = sorted(folder.glob("training_log_*.txt"))
    return [[int(number) for number in re.findall(r": Epoch (\d+) *$", log.read_text(), re.MULTILINE)] for log in logs]


def test_killed_in_every_stage(planned_project: TinyProject) -> None:
    project = planned_project
    pretrained, trained = project.pretrained(), project.trained()

    killed_when(project, lambda: bool(finished_cases(project)))
    first_cases = finished_cases(project)
    assert 0 < len(first_cases) < 10
    assert project.stage("preprocess/3d_fullres")["status"] == "running"

    killed_when(project, (pretrained / "checkpoint_latest.pth").exists)
    cases = finished_cases(project)
    assert len(cases) == 10
    assert {path: cases[path] for path in first_cases} == first_cases
    assert not (pretrained / "checkpoint_final.pth").exists()

    killed_when(project, (trained / "checkpoint_latest.pth").exists)
    pretraining_final = (pretrained / "checkpoint_final.pth").stat().st_mtime_ns
    with open(pretrained / "history.csv") as stream:
        assert [float(row["epoch"]) for row in csv.DictReader(stream)] == list(range(PRETRAIN_EPOCHS))
    before, after = logged_epochs(pretrained)
    assert before[0] == 0
    assert 0 < after[0] <= before[-1] + 1
    assert after == list(range(after[0], PRETRAIN_EPOCHS))
    assert not (trained / "checkpoint_final.pth").exists()

    last = project.diffseg("run", 1, *OPTIONS).ok()
    before, after = logged_epochs(trained)
    assert epoch_gone_on_from(last) > 0
    assert after == list(range(epoch_gone_on_from(last), EPOCHS))
    assert (pretrained / "checkpoint_final.pth").stat().st_mtime_ns == pretraining_final
    assert finished_cases(project) == cases
    assert {stage["status"] for stage in project.manifest()["stages"].values()} == {"finished"}
    assert len(list((trained / "validation").glob("*.nii.gz"))) == len(project.splits()[0]["val"])
    predicted = project.results / "predictions_imagesTs" / "finetune__folds_0"
    assert len(list(predicted.glob("*.nii.gz"))) == len(list(project.test_images.iterdir()))
    assert not list(project.workspace.rglob(".partial-*"))
    assert not list(project.results.rglob("superseded_*"))

    def files() -> dict[Path, int]:
        return checkpoints(project) | {path: path.stat().st_mtime_ns for path in predicted.glob("[!.]*")}

    written = files()
    manifest = project.manifest()
    project.diffseg("run", 1, *OPTIONS).ok()
    assert files() == written
    assert finished_cases(project) == cases
    assert project.manifest() == manifest


def test_killed_while_predicting(project: TinyProject) -> None:
    output = project.folder / "out"
    options = ("predict", "-d", 1, "-i", project.test_images, "-o", output)

    def segmentations() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")}

    project.diffseg(*options).ok()
    earlier = segmentations()
    assert len(earlier) == 2

    running = project.diffseg.start(*options, "--no-mirroring")
    while segmentations() == earlier or not segmentations():
        assert running.process.poll() is None, running.wait()
        time.sleep(0.002)
    running.kill()
    done = segmentations()
    assert len(done) == 1, "an earlier prediction with other settings must not be taken for this one's"

    project.diffseg(*options, "--no-mirroring").ok()
    finished = segmentations()
    assert len(finished) == 2
    assert not finished.items() & earlier.items()
    assert finished.items() > done.items()
    assert not list(output.glob(".partial-*"))
