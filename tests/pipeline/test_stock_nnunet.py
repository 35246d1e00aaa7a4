"""What we write is stock nnU-Net's: its own commands train from it, predict with it, and get the same voxels."""

from __future__ import annotations

import json
import re
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING

import blosc2
import numpy as np
import pytest

from diffseg_nnunet.nnunet_shim import SHIM_FOLDER
from tests.pipeline.segmentations import assert_same_segmentations, segmentations

if TYPE_CHECKING:
    from tests.conftest import Started
    from tests.pipeline.conftest import TinyProject

pytestmark = pytest.mark.pipeline

WITHOUT_US = """
import sys
from importlib.abc import MetaPathFinder
from importlib.metadata import distribution

class Refusal(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffseg_nnunet":
            raise ImportError("diffseg_nnunet is not installed here")

sys.meta_path.insert(0, Refusal())
command = sys.argv.pop(1)
sys.exit(next(e for e in distribution("nnunetv2").entry_points if e.name == command).load()())
"""
"""Runs a stock command where our package cannot be imported."""


def script(name: str) -> Path:
    return Path(sysconfig.get_path("scripts")) / name


def stock_predict(project: TinyProject, output: Path, *options: object) -> Started:
    return project.diffseg.start_other(
        *(script("nnUNetv2_predict"), "-d", 1, "-i", project.test_images, "-o", output, "-c", "3d_fullres"),
        *("-tr", "DiffSegTrainer", "-p", "DiffSegPlans", "-device", "cpu", "-npp", 0, "-nps", 0, *options),
        **project.nnunet_variables(),
        nnUNet_extTrainer=SHIM_FOLDER,
    )


def test_stock_training_starts_from_our_weights(project: TinyProject) -> None:
    weights = project.pretrained() / "checkpoint_final.pth"
    training = project.diffseg.start_other(
        *(script("nnUNetv2_train"), 1, "3d_fullres", 0, "-p", "DiffSegPlans", "-tr", "nnUNetTrainer_1epoch"),
        *("-pretrained_weights", weights, "-device", "cpu"),
        **project.nnunet_variables(),
    )
    lines = []
    try:
        for line in training.process.stdout:
            lines.append(line)
            if re.search(r"Epoch 0\s*$", line):
                break
        # an epoch is 250 iterations: that it goes on with the first of them is enough
        time.sleep(2)
        assert training.process.poll() is None
    finally:
        training.kill()
    printed = "".join(lines)
    assert f"Loading pretrained weights from file  {weights}" in printed
    assert re.search(r"Epoch 0\s*$", lines[-1]), printed + training.process.stderr.read()


def test_stock_prediction_gives_the_same_segmentations(project: TinyProject) -> None:
    predict = ("predict", "-d", 1, "-i", project.test_images, "-o")
    faster = ("--no-mirroring", "--step-size", 0.75)
    project.do((*predict, project.folder / "mirrored"), (*predict, project.folder / "plain", *faster))
    for name, options in {"mirrored": (), "plain": ("--disable_tta", "-step_size", 0.75)}.items():
        stock_predict(project, project.folder / f"stock_{name}", "-f", 0, *options).wait().ok()
        assert_same_segmentations(project.folder / name, project.folder / f"stock_{name}")
    mirrored, plain = segmentations(project.folder / "mirrored"), segmentations(project.folder / "plain")
    assert any((mirrored[name] != plain[name]).any() for name in mirrored)


def test_an_exported_model_needs_nothing_of_ours(project: TinyProject) -> None:
    own, stock, archive = project.folder / "own", project.folder / "stock", project.folder / "model.zip"
    project.do(
        ("predict", "-d", 1, "-i", project.test_images, "-o", own),
        ("export", 1, "-c", "3d_fullres", "--stock", archive),
    )

    variables = project.nnunet_variables() | {"nnUNet_results": project.folder / "empty"}
    (project.folder / "empty").mkdir()
    run = project.diffseg.start_other
    install = script("nnUNetv2_install_pretrained_model_from_zip")
    run(install, archive, **variables).wait().ok()
    run(
        *(sys.executable, "-c", WITHOUT_US, "nnUNetv2_predict", "-d", 1, "-i", project.test_images, "-o", stock),
        *("-c", "3d_fullres", "-f", 0, "-tr", "nnUNetTrainer", "-p", "DiffSegPlans"),
        *("-device", "cpu", "-npp", 0, "-nps", 0),
        **variables,
    ).wait().ok()
    assert_same_segmentations(own, stock)


def test_stock_preprocessing_by_our_plans_gives_the_same_data(project: TinyProject) -> None:
    folder = project.preprocessed / "DiffSegPlans_3d_fullres"
    ours = {path.name: blosc2.open(str(path))[:] for path in sorted(folder.glob("*.b2nd"))}
    fresh = project.folder / "fresh" / project.name
    fresh.mkdir(parents=True)
    for name in ("DiffSegPlans.json", "dataset.json", "dataset_fingerprint.json"):
        (fresh / name).write_bytes((project.preprocessed / name).read_bytes())
    variables = project.nnunet_variables() | {"nnUNet_preprocessed": fresh.parent}
    command = (script("nnUNetv2_preprocess"), "-d", 1, "-plans_name", "DiffSegPlans", "-c", "3d_fullres", "-np", 1)
    project.diffseg.start_other(*command, **variables).wait().ok()

    theirs = {path.name: blosc2.open(str(path))[:] for path in sorted((fresh / folder.name).glob("*.b2nd"))}
    assert list(ours) == list(theirs)
    assert len(ours) == 2 * len(json.loads((project.preprocessed / "dataset_fingerprint.json").read_text())["spacings"])
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
