"""The strategies by their commands: trained, predicted with, exported where the result is a stock network."""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.special import entr

from tests.pipeline.segmentations import assert_same_segmentations, segmentations

if TYPE_CHECKING:
    from tests.pipeline.conftest import TinyProject

pytestmark = pytest.mark.pipeline

SHORT = ("--iterations", 4, "--optimizer", "adamw")


def train(strategy: str, *options: object) -> tuple[object, ...]:
    return ("train", 1, "--strategy", strategy, *SHORT, *options)


def predict(project: TinyProject, strategy: str) -> tuple[object, ...]:
    output = project.folder / f"out_{strategy}"
    return ("predict", "-d", 1, "-i", project.test_images, "-o", output, "--strategy", strategy, "--no-mirroring")


def test_a_decoder_is_a_stock_network(project: TinyProject) -> None:
    """Also where the coordinate head has been kept on."""
    archive, empty, stock = (project.folder / name for name in ("model.zip", "empty", "stock"))
    keeping = train("decoder", "--keep-coordinates", 0.5)
    lines = [keeping, predict(project, "decoder")]
    lines.append(("export", 1, "-c", "3d_fullres", "--strategy", "decoder", "--stock", archive))
    for finished in project.diffseg.in_one_process(lines):
        finished.ok()
    assert project.stage("train/decoder/3d_fullres/fold_0")["settings"]["keep_coordinates"] == 0.5
    empty.mkdir()
    variables = project.nnunet_variables() | {"nnUNet_results": empty}
    scripts, run = Path(sysconfig.get_path("scripts")), project.diffseg.start_other
    run(scripts / "nnUNetv2_install_pretrained_model_from_zip", archive, **variables).wait().ok()
    run(
        *(sys.executable, scripts / "nnUNetv2_predict", "-d", 1, "-i", project.test_images, "-o", stock),
        *("-c", "3d_fullres", "-f", 0, "-tr", "nnUNetTrainer", "-p", "DiffSegPlans"),
        *("-device", "cpu", "-npp", 0, "-nps", 0, "--disable_tta"),
        **variables,
    ).wait().ok()
    assert_same_segmentations(project.folder / "out_decoder", stock)


def test_probes_are_trained_and_predict(project: TinyProject) -> None:
    lines = [
        train("linear"),
        train("nonlinear", "--probe-time-steps", "50,400", "--probe-noisy"),
        predict(project, "linear"),
        predict(project, "nonlinear"),
        train("nonlinear", "--probe-time-steps", "50,400", "--probe-noisy"),
        ("export", 1, "--strategy", "linear", "--stock", project.folder / "model.zip"),
    ]
    *done, again, refused = project.diffseg.in_one_process(lines)
    for finished in done:
        finished.ok()
    assert "finished before, unchanged" in again.ok().out
    refused.refused("--strategy linear has a head that stock nnU-Net does not know", "decoder")
    images = sorted(path.name.replace("_0000", "") for path in project.test_images.iterdir())
    for strategy in ("linear", "nonlinear"):
        assert list(segmentations(project.folder / f"out_{strategy}")) == images
    stage = project.stage("train/nonlinear/3d_fullres/fold_0")
    assert (stage["settings"]["time_steps"], stage["settings"]["noisy"]) == ([50, 400], True)
    assert stage["outputs"]["pretrained"] == str(project.pretrained() / "checkpoint_final.pth")
    assert "the probe reads the clean image through the network at time steps 50, 150, 250" in done[0].out
    assert project.stage("train/linear/3d_fullres/fold_0")["settings"]["time_steps"] is None


def test_a_network_without_time_steps_is_read_as_it_is(project: TinyProject) -> None:
    """Such as a stock one, or ours without the record of its diffusion; time steps asked for are refused."""
    content = torch.load(project.pretrained() / "checkpoint_final.pth", weights_only=False)
    stock = project.folder / "stock.pth"
    torch.save({"network_weights": content["network_weights"]}, stock)
    asked = train("linear", "--pretrained", stock)
    lines = [asked, asked, (*asked, "--probe-time-steps", "50"), (*asked, "--probe-noisy")]
    found, again, refused, noisy = project.diffseg.in_one_process(lines)
    assert "the probe reads the network as it is, at no time step of a diffusion: " in found.ok().out
    assert "the probe reads the clean image through the network as it is" in found.out
    assert "finished before, unchanged" in again.ok().out
    refused.refused("stock.pth is no checkpoint of this version's `diffseg pretrain`")
    noisy.refused("say how time steps are read, and none is", "stock.pth is no checkpoint of `diffseg pretrain`")
    outputs = project.stage("train/linear/3d_fullres/fold_0")["outputs"]
    assert outputs["reads"] == "the clean image through the network as it is"


def test_voters_predict_and_say_where_they_disagree(project: TinyProject) -> None:
    output = project.folder / "out_pixel-ensemble"
    lines = [
        train("pixel-ensemble", "--probe-clean"),
        (*predict(project, "pixel-ensemble"), "--uncertainty"),
        (*predict(project, "pixel-ensemble"), "--uncertainty", "--npz"),
    ]
    trained, *predicted = project.diffseg.in_one_process(lines)
    trained.ok()
    for each in predicted:
        assert "finished before" not in each.ok().out
    assert "the clean image through the network at time steps 50, 150, 250" in trained.out
    names = [path.name for path in sorted(output.glob("*.nii.gz"))]
    assert names == [path.name for path in sorted((output / "uncertainty").iterdir())]
    for name in names:
        segmentation, entropy = (sitk.ReadImage(str(folder / name)) for folder in (output, output / "uncertainty"))
        for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(segmentation, geometry)() == getattr(entropy, geometry)()
        values = sitk.GetArrayFromImage(entropy)
        assert values.dtype == np.float32
        assert values.min() >= 0
        assert 0.01 < values.mean() < values.max() <= 1
        with np.load(output / name.replace(".nii.gz", ".npz")) as content:
            shares = content["probabilities"]
        np.testing.assert_allclose(shares.sum(0), 1, atol=1e-5)
        assert shares.max() == 1  # a softmax of shares would be at most e / (e + 1)
        np.testing.assert_array_equal(shares.argmax(0), sitk.GetArrayFromImage(segmentation))
        # half precision rounds what is resampled in whole and in slabs, here and there to other last digits
        difference = np.abs(values - entr(shares).sum(0) / np.log(len(shares)))
        assert difference.max() < 0.02
        assert difference.mean() < 1e-4


def test_what_does_not_go_together(project: TinyProject) -> None:
    (project.pretrained() / "checkpoint_final.pth").rename(project.folder / "kept.pth")
    before = json.dumps(project.manifest())
    kept = ("--pretrained", project.folder / "kept.pth")
    refusals = {
        train("decoder"): ("There is no pretrained network for fold 0", "diffseg pretrain 1 -c 3d_fullres -f 0"),
        train("linear"): ("There is no pretrained network for fold 0", "diffseg pretrain 1 -c 3d_fullres -f 0"),
        train("finetune", "--probe-time-steps", "50"): ("--probe-time-steps does not go with --strategy finetune",),
        train("finetune", "--probe-clean"): ("--probe-clean or --probe-noisy does not go",),
        train("linear", "--probe-clean", "--probe-time-steps", "folded", *kept): ("how time steps are read", "folded"),
        train("linear", "--keep-coordinates", 1): ("--keep-coordinates does not go with --strategy linear",),
        train("linear", "--probe-time-steps", "50;60"): ("50;60 is no list of different time steps",),
        train("scratch", "--transfer", "encoder"): ("--transfer does not go with --strategy scratch",),
        train("linear", "--fold-timestep", "50", *kept): ("--fold-timestep does not go with --strategy linear",),
        train("finetune", "--transfer", "decoder", *kept): ("--transfer decoder is not known", "encoder"),
        train("finetune", "--fold-timestep", "1000", *kept): ("kept.pth was pretrained with 1000 time steps",),
        train("linear", "--probe-time-steps", "1000", *kept): ("kept.pth was pretrained with 1000 time steps",),
    }
    for finished, words in zip(project.diffseg.in_one_process(list(refusals)), refusals.values(), strict=True):
        finished.refused(*words)
    assert json.dumps(project.manifest()) == before
    assert not project.model("DiffSegTrainerLinear").exists()
