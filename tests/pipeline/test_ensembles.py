"""Several folds and several configurations predict together."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import SimpleITK as sitk

from diffseg_nnunet.nnunet_shim import SHIM_FOLDER

if TYPE_CHECKING:
    from tests.pipeline.conftest import TinyProject

pytestmark = pytest.mark.pipeline

SHORT = ("--iterations", 4)


def segmentations(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted(folder.glob("*.nii.gz"))}


def test_two_folds(project: TinyProject) -> None:
    """Fold 1 starts from fold 0's pretraining, which has seen the images of its validation cases, and says so."""
    weights = project.pretrained() / "checkpoint_final.pth"
    own, stock = project.folder / "own", project.folder / "stock"
    training = project.diffseg("train", 1, "-f", 1, "--pretrained", weights, "--optimizer", "adamw", *SHORT).ok()
    split = project.splits()
    seen = set(split[0]["train"]) & set(split[1]["val"])
    assert seen
    assert f"pretrained on the images of {len(seen)} of this fold's validation cases" in training.out

    io = ("-d", 1, "-i", project.test_images, "-o")
    ours = project.diffseg.start("predict", *io, own, "-f", 0, 1)
    project.diffseg.start_other(
        *(Path(sysconfig.get_path("scripts")) / "nnUNetv2_predict", *io, stock, "-c", "3d_fullres", "-f", 0, 1),
        *("-tr", "DiffSegTrainer", "-p", "DiffSegPlans", "-device", "cpu", "-npp", 0, "-nps", 0),
        **project.nnunet_variables(),
        nnUNet_extTrainer=SHIM_FOLDER,
    ).wait().ok()
    ours.wait().ok()
    first, second = segmentations(own), segmentations(stock)
    assert list(first) == list(second)
    assert first
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_two_configurations(project: TinyProject) -> None:
    """A 2D and a 3D network, averaged; a case that cannot be read is left out of both."""
    project.diffseg("preprocess", 1, "-c", "2d").ok()
    project.diffseg("pretrain", 1, "-c", "2d", *SHORT).ok()
    project.diffseg("train", 1, "-c", "2d", "--optimizer", "adamw", *SHORT).ok()
    (project.test_images / "broken_0000.nii.gz").write_bytes(b"no volume")

    output = project.folder / "out"
    options = ("predict", "-d", 1, "-i", project.test_images, "-o", output, "-c", "2d", "3d_fullres")
    run = project.diffseg(*options)
    assert run.code == 2
    assert "broken was set aside" in run.out
    assert run.out.count("set aside") == 1
    predicted = segmentations(output)
    assert list(predicted) == ["phantom_010.nii.gz", "phantom_011.nii.gz"]
    assert any(len(np.unique(array)) > 1 for array in predicted.values())
    assert not [path for path in output.iterdir() if path.is_dir()]

    (project.test_images / "broken_0000.nii.gz").unlink()
    written = {path: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")}
    project.diffseg(*options).ok()
    assert {path: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")} == written
