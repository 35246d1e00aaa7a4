"""Scans of validation patients, and copies of their images, are no part of a fold's pretraining."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.pipeline.conftest import TinyProject

pytestmark = pytest.mark.pipeline

PRETRAIN = ("pretrain", 1, "-c", "3d_fullres", "-f", 0, "--iterations", 1)


def seen_in(project: TinyProject) -> dict[str, list[str]]:
    return torch.load(project.pretrained() / "checkpoint_final.pth", weights_only=True)["pool"]


def pool_scan(project: TinyProject, number: int) -> Path:
    return sorted((project.raw.with_name(project.pool_name) / "imagesUn").iterdir())[number]


def test_scans_of_validation_patients_and_copies_of_their_images(planned_project: TinyProject) -> None:
    project = planned_project
    plan = ("plan", 1, *project.light_plan, "--unlabeled", 2)
    prepare = (("verify", 1), ("verify", 2), plan, ("preprocess", 1, "-c", "3d_fullres"))
    project.do(*prepare, PRETRAIN)
    whole, (fold, *_) = seen_in(project), project.splits()
    validation, training = fold["val"][0], fold["train"][0]
    assert len(whole[project.pool_name]) == 4

    # a validation patient's further scan, of which the pool has a copy, too, a training patient's, and a pool scan that
    # is a validation image
    images, further = project.raw / "imagesTr", project.raw / "imagesUn"
    further.mkdir()
    shutil.copy(pool_scan(project, 0), further / "again_0000.nii.gz")
    shutil.copy(pool_scan(project, 1), further / "more_0000.nii.gz")
    copied = pool_scan(project, 2).name.removesuffix("_0000.nii.gz")
    shutil.copy(images / f"{validation}_0000.nii.gz", pool_scan(project, 2))
    path = project.raw / "dataset.json"
    groups = {"same_patient": [[validation, "again"], [training, "more"]]}
    path.write_text(json.dumps(json.loads(path.read_text()) | groups))
    # and another pool scan of the patient whom the copy shows
    other = pool_scan(project, 3).name.removesuffix("_0000.nii.gz")
    path = project.raw.with_name(project.pool_name) / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"same_patient": [[other, copied]]}))
    *prepared, pretrained, of_all = project.diffseg.in_one_process([*prepare, PRETRAIN, (*PRETRAIN, "--pool", "all")])
    for each in (*prepared, of_all):
        each.ok()
    assert "4 unlabelled scan(s) are not pretrained on" in pretrained.ok().out
    assert f"{project.name}/again" in pretrained.out
    assert f"{project.pool_name}/{copied}" in pretrained.out
    assert "not pretrained on" not in of_all.out
    kept = project.pretrained().parent.glob("superseded_fold_0_*/checkpoint_final.pth")
    earlier = [torch.load(path, weights_only=True)["pool"] for path in kept]
    held_back = {
        project.name: sorted([*fold["train"], "more"]),
        project.pool_name: [pool_scan(project, 1).name.removesuffix("_0000.nii.gz")],
    }
    assert len(earlier) == 2
    assert whole in earlier
    assert held_back in earlier
    everything = sorted([*fold["train"], *fold["val"], "again", "more"])
    assert seen_in(project) == {project.name: everything, project.pool_name: whole[project.pool_name]}
