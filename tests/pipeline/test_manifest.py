"""The run manifest: what it says, and that settings are kept, changed ones redo a stage, and nothing is lost."""

from __future__ import annotations

import json
from datetime import datetime
from importlib.metadata import version
from threading import Timer
from typing import TYPE_CHECKING

import pytest
import SimpleITK as sitk
import torch
from filelock import FileLock

if TYPE_CHECKING:
    from tests.pipeline.conftest import TinyProject

pytestmark = pytest.mark.pipeline

PRETRAIN, TRAIN = "pretrain/3d_fullres/fold_0", "train/finetune/3d_fullres/fold_0"
EVALUATE = "evaluate/finetune/3d_fullres/fold_0"
STAGES = ("plan", "preprocess/3d_fullres", PRETRAIN, TRAIN, EVALUATE)


def test_every_stage_is_recorded(trained: TinyProject) -> None:
    stages = trained.manifest()["stages"]
    assert tuple(stages) == STAGES
    for record in stages.values():
        assert record["status"] == "finished"
        for package in ("diffseg_nnunet", "nnunetv2", "torch", "numpy", "SimpleITK"):
            assert record["versions"][package] == version(package)
        start, end = (datetime.fromisoformat(record[key]) for key in ("start", "end"))
        assert start.tzinfo is not None
        assert abs((end - start).total_seconds() - record["seconds"]) < 2
        assert 0 < record["peak_rss_gib"] < 50
    settings = stages["plan"]["settings"]
    assert settings["spacing"] == [14, 14, 14]
    assert (settings["backbone"], settings["base_features"], settings["unlabelled"]) == ("plain", 8, [2])
    assert stages[PRETRAIN]["settings"]["seed"] == stages[TRAIN]["settings"]["seed"] == 7
    assert stages[PRETRAIN]["settings"]["iterations"] == 20
    assert stages[TRAIN]["settings"]["optimizer"] == "adamw"


def test_pretraining_says_what_it_has_seen(trained: TinyProject) -> None:
    split = trained.splits()[0]
    seen = trained.stage(PRETRAIN)["outputs"]["cases_seen"]
    assert sorted(seen[trained.name]) == sorted(split["train"])
    assert not set(seen[trained.name]) & set(split["val"])
    assert len(seen[trained.pool_name]) == 4
    checkpoint = torch.load(trained.pretrained() / "checkpoint_final.pth", weights_only=True)
    assert {source: sorted(cases) for source, cases in checkpoint["pool"].items()} == seen


def test_a_run_without_options_keeps_what_was_used(project: TinyProject) -> None:
    before = {path: path.stat().st_mtime_ns for path in project.workspace.rglob("checkpoint_*.pth")}
    plans = project.preprocessed / "DiffSegPlans.json"
    planned = plans.stat().st_mtime_ns
    run = project.diffseg("run", 1).ok()
    assert {path: path.stat().st_mtime_ns for path in project.workspace.rglob("checkpoint_*.pth")} == before
    assert plans.stat().st_mtime_ns == planned
    assert run.out.count("finished before, unchanged") == 2
    assert json.loads((project.trained() / "validation_report" / "scores.json").read_text())["overall"]
    selected = project.stage("select/finetune/folds_0")["outputs"]
    assert selected["configurations"] == ["3d_fullres"]
    assert (project.results.parent / selected["postprocessing"]).is_file()
    assert len(list((project.results / "predictions_imagesTs" / "finetune__folds_0").glob("*.nii.gz"))) == 2


def test_other_settings_redo_a_stage_and_keep_the_earlier_result(project: TinyProject) -> None:
    folder = project.trained()
    earlier = (folder / "checkpoint_final.pth").read_bytes()
    chosen = ("--iterations", 5, "--optimizer", "adamw", "--seed", 7, "--transfer", "all")
    run = project.diffseg("train", 1, *chosen).ok()
    changed = "iterations 20, now 5; transfer encoder, now all"
    assert f"the earlier fold_0, of other settings ({changed}), is kept as" in " ".join(run.out.split())
    (kept,) = folder.parent.glob("superseded_fold_0_*")
    assert (kept / "checkpoint_final.pth").read_bytes() == earlier
    assert (folder / "checkpoint_final.pth").read_bytes() != earlier
    assert project.stage(TRAIN)["settings"]["iterations"] == 5
    assert tuple(project.manifest()["stages"]) == STAGES
    assert project.diffseg("run", 1).ok().out.count("finished before, unchanged") == 2, "a run keeps them"
    assert project.stage(TRAIN)["settings"]["transfer"] == "all"


def test_new_images_redo_what_depends_on_them(project: TinyProject) -> None:
    path = project.raw / "imagesTr" / "phantom_000_0000.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(path)) + 1, str(path))
    project.diffseg("train", 1, "--iterations", 20, "--optimizer", "adamw").refused(
        "have changed since it was planned", "diffseg plan 1", "diffseg run 1"
    )
    assert not list(project.results.rglob("superseded_*"))


def test_a_run_that_cannot_be_leaves_no_trace(project: TinyProject) -> None:
    refused = {
        ("run", 1, "-c", "3d_ful"): ("no configuration '3d_ful'", "3d_lowres"),
        ("run", 1, "-f", 9): ("has folds 0 to 4, not 9",),
        ("run", 1, "--pretrained", "gone.pth"): ("There is no checkpoint", "gone.pth"),
    }
    before = project.manifest()
    for finished, words in zip(project.diffseg.in_one_process(list(refused)), refused.values(), strict=True):
        finished.refused(*words)
    assert project.manifest() == before


def test_a_job_waits_for_another_that_does_the_same(planned_project: TinyProject) -> None:
    project = planned_project
    project.diffseg("preprocess", 1, "-c", "3d_fullres").ok()
    before = project.manifest()
    with FileLock(project.results / "logs" / "preprocess_3d_fullres.lock"):
        second = project.diffseg.start("preprocess", 1, "-c", "3d_fullres")
        patience = Timer(300, second.kill)
        patience.start()
        told = next(line for line in second.process.stdout if "waiting" in line)
        patience.cancel()
    assert "another process, which is working on preprocess/3d_fullres of Dataset001_Phantom" in told
    second.wait().ok()
    assert project.manifest() == before
