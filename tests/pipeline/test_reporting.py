"""`diffseg report`: one page of what was done with a data set, at every point of its way."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import CommandLine

    from .conftest import TinyProject

pytestmark = pytest.mark.pipeline


def test_a_trained_project(project: TinyProject) -> None:
    page = project.results / "report.html"
    finished = project.diffseg("report", 1, "--pictures", 1).ok()
    assert str(page) in finished.out.replace("\n", "")
    text = page.read_text(encoding="utf-8")
    for words in ("finetune, 3d_fullres, fold 0", "pretrain/3d_fullres/fold_0", "left_kidney", "mean over structures"):
        assert words in text
    assert "of Dataset002_Pool: phantom_" in text  # what pretraining has seen
    assert text.count("data:image/png") == 3  # two curves and the worst case
    assert (project.model("DiffSegTrainer") / "fold_0" / "validation_report" / "scores.json").is_file()
    manifest = project.results / "diffseg_run.json"
    content = json.loads(manifest.read_text())
    content["stages"]["train/scratch/3d_fullres/fold_0"] = {
        **content["stages"]["train/finetune/3d_fullres/fold_0"],
        "status": "running",
    }
    manifest.write_text(json.dumps(content))
    case = next((project.raw / "imagesTr").iterdir())
    for path in (project.raw / "imagesTr").iterdir():  # an image that was moved away is no reason to have no page
        path.rename(path.with_name(f"{path.name}.away"))
    project.diffseg("report", 1, "-o", "other.html", "--pictures", 1).ok()
    text = (project.folder / "other.html").read_text(encoding="utf-8")
    assert "not finished" in text
    assert "cannot be shown" in text
    assert not case.exists()
    (project.model("DiffSegTrainer") / "fold_0" / "checkpoint_final.pth").unlink()
    project.diffseg("report", 1, "-o", "other.html").ok()
    assert "checkpoint_final.pth is no longer there" in (project.folder / "other.html").read_text(encoding="utf-8")


def test_a_planned_project(planned_project: TinyProject) -> None:
    planned_project.diffseg("report", 1).ok()
    text = (planned_project.results / "report.html").read_text(encoding="utf-8")
    assert "6 labelled, 0 unlabelled, 2 test" in text
    assert "memory budget, GiB" in text


def test_bad_input(planned_project: TinyProject, diffseg: CommandLine) -> None:
    planned_project.diffseg("report", 1, "-o", "page.pdf").refused("page.pdf does not end in .html", "FILE.html")
    (planned_project.results / "diffseg_run.json").unlink()
    planned_project.diffseg("report", 1).refused("Nothing was done with Dataset001_Phantom yet", "diffseg run 1")
    diffseg("report", 1).refused("1")
