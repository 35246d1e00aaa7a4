"""Several folds and several configurations predict together."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.special import entr

from diffseg_nnunet.nnunet_shim import SHIM_FOLDER
from tests.pipeline.segmentations import segmentations

if TYPE_CHECKING:
    from tests.pipeline.conftest import TinyProject

pytestmark = pytest.mark.pipeline

SHORT = ("--iterations", 4)


@pytest.fixture(scope="module")
def several(trained: TinyProject, tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """The trained project with a second fold, and with a 2D network, trained at the same time.

    The second fold starts from the first one's pretraining.
    """
    project = trained.copy(tmp_path_factory.mktemp("several"))
    weights = project.pretrained() / "checkpoint_final.pth"
    fold_1 = project.diffseg.start("train", 1, "-f", 1, "--pretrained", weights, "--optimizer", "adamw", *SHORT)
    flat = ("preprocess", 1), ("pretrain", 1, *SHORT), ("train", 1, "--optimizer", "adamw", *SHORT)
    for stage in project.diffseg.in_one_process([(*line, "-c", "2d") for line in flat]):
        stage.ok()
    printed = fold_1.wait().ok().out
    (project.folder / "fold_1.txt").write_text(printed)
    return project


def test_stages_at_the_same_time_are_all_recorded(several: TinyProject) -> None:
    stages = several.manifest()["stages"]
    assert {"train/finetune/3d_fullres/fold_1", "pretrain/2d/fold_0", "train/finetune/2d/fold_0"} <= stages.keys()
    assert {stage["status"] for stage in stages.values()} == {"finished"}


def test_a_fold_whose_validation_cases_were_pretrained_on(several: TinyProject) -> None:
    first, second = several.splits()[:2]
    seen = set(first["train"]) & set(second["val"])
    assert seen
    printed = (several.folder / "fold_1.txt").read_text()
    assert f"pretrained on the images of {len(seen)} of this fold's validation cases" in printed


def test_a_fold_whose_validation_labels_were_learnt(several: TinyProject) -> None:
    first, second = several.splits()[:2]
    weights = several.trained() / "checkpoint_final.pth"
    started = several.diffseg("train", 1, "-f", 1, "--strategy", "decoder", "--pretrained", weights, "--iterations", 1)
    learnt = len(set(first["train"]) & set(second["val"]))
    assert f"was trained on the labels of {learnt} of this fold's validation cases" in started.ok().out


def test_two_folds(several: TinyProject) -> None:
    own, stock = several.folder / "own", several.folder / "stock"
    io = ("-d", 1, "-i", several.test_images, "-o")
    ours = several.diffseg.start("predict", *io, own, "-f", 0, 1, "--save_probabilities")
    several.diffseg.start_other(
        *(Path(sysconfig.get_path("scripts")) / "nnUNetv2_predict", *io, stock, "-c", "3d_fullres", "-f", 0, 1),
        *("-tr", "DiffSegTrainer", "-p", "DiffSegPlans", "-device", "cpu", "-npp", 0, "-nps", 0),
        "--save_probabilities",
        **several.nnunet_variables(),
        nnUNet_extTrainer=SHIM_FOLDER,
    ).wait().ok()
    ours.wait().ok()
    first, second = segmentations(own), segmentations(stock)
    assert list(first) == list(second)
    assert first
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
        stem = name.removesuffix(".nii.gz")
        assert (own / f"{stem}.pkl").is_file()
        with np.load(own / f"{stem}.npz") as content, np.load(stock / f"{stem}.npz") as expected:
            np.testing.assert_allclose(content["probabilities"], expected["probabilities"], atol=1e-5)


def test_two_configurations(several: TinyProject) -> None:
    """A 2D and a 3D network, averaged; a case that cannot be read is left out of both."""
    images, output = several.folder / "images", several.folder / "out"
    shutil.copytree(several.test_images, images)
    (images / "broken_0000.nii.gz").write_bytes(b"no volume")
    options = ("predict", "-d", 1, "-i", images, "-o", output, "-c", "2d", "3d_fullres")
    run = several.diffseg(*options)
    assert run.code == 2
    assert "broken was set aside" in run.out
    assert run.out.count("set aside") == 1
    predicted = segmentations(output)
    assert list(predicted) == ["phantom_010.nii.gz", "phantom_011.nii.gz"]
    assert any(len(np.unique(array)) > 1 for array in predicted.values())
    assert not [path for path in output.iterdir() if path.is_dir()]

    (images / "broken_0000.nii.gz").unlink()
    written = {path: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")}
    several.diffseg(*options).ok()
    assert {path: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")} == written

    several.diffseg(*options, "--npz", "--uncertainty").ok()
    assert all((segmentations(output)[name] == array).all() for name, array in predicted.items())
    for name in predicted:
        with np.load(output / name.replace(".nii.gz", ".npz")) as content:
            bits = entr(content["probabilities"]).sum(0) / np.log(2)
        written_bits = sitk.GetArrayFromImage(sitk.ReadImage(str(output / "uncertainty" / name)))
        np.testing.assert_allclose(written_bits, bits, atol=1e-4)
