"""Samples of networks that were pretrained for an iteration or two: files, geometry, intensities, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from matplotlib import image as mpl_image

from diffseg_nnunet.diffusion.sampling import SamplerSettings
from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.sampling import RECORD, SHEET, SamplingRequest, sample
from diffseg_nnunet.trainers import DiffSegPretrainer

NewTrainer = Callable[..., Any]
REQUEST = SamplingRequest(count=2, sampler=SamplerSettings("ddim", 3), seed=1)


@pytest.fixture
def pretrain(new_trainer: NewTrainer) -> Callable[..., Any]:
    """Pretrains for an iteration: (configuration, fold, **settings) -> trainer."""

    def run(configuration: str = "3d_fullres", fold: int | str = 0, **settings: Any) -> Any:
        trainer = new_trainer(DiffSegPretrainer, configuration, fold, **{"iterations": 1, **settings})
        trainer.initialize()
        trainer.run_training()
        return trainer

    return run


def voxels(folder: Path, index: int = 0) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"sample_{index:03d}.nii.gz")))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_patches_of_the_plan_in_hounsfield_units(
    pretrain: Callable[..., Any], project: Project, tmp_path: Path, sampler: str
) -> None:
    trainer, output = pretrain(), tmp_path / "new" / "samples"
    request = replace(REQUEST, sampler=SamplerSettings(sampler, 3))
    record = sample(project, request, output, "cpu")
    assert names(output) == {"sample_000.nii.gz", "sample_001.nii.gz", SHEET, RECORD}
    assert json.loads((output / RECORD).read_text()) == {**record, "finished": True}
    assert (record["seed"], record["configuration"], record["size"]) == (1, "3d_fullres", list(trainer.patch_size))
    assert record["sampler"] == {"sampler": sampler, "steps": 3, "eta": 0.0}
    assert record["files"] == ["sample_000.nii.gz", "sample_001.nii.gz"]
    assert mpl_image.imread(output / SHEET).shape[0] > 100

    figures = project.plans()["foreground_intensity_properties_per_channel"]["0"]
    image = sitk.ReadImage(str(output / "sample_000.nii.gz"))
    backward = project.plans()["transpose_backward"]
    assert image.GetSize() == tuple(trainer.patch_size[axis] for axis in backward)[::-1]
    assert image.GetSpacing() == pytest.approx((14.0, 14.0, 14.0))
    for index in range(2):
        values = voxels(output, index)
        assert values.dtype == np.float32
        assert values.std() > 1
        assert values.min() >= figures["percentile_00_5"] - 0.1
        assert values.max() <= figures["percentile_99_5"] + 0.1
    assert record["channels"][0]["unit"] == "HU"


def test_the_seed_decides_every_sample_alone(pretrain: Callable[..., Any], project: Project, tmp_path: Path) -> None:
    pretrain()
    folders = {name: tmp_path / name for name in ("first", "more", "other")}
    sample(project, REQUEST, folders["first"], "cpu")
    sample(project, replace(REQUEST, count=3), folders["more"], "cpu")
    sample(project, replace(REQUEST, seed=2), folders["other"], "cpu")
    for index in range(2):
        np.testing.assert_array_equal(voxels(folders["more"], index), voxels(folders["first"], index))
        assert (voxels(folders["other"], index) != voxels(folders["first"], index)).any()
    assert (voxels(folders["first"], 0) != voxels(folders["first"], 1)).any()


@pytest.mark.parametrize("mode", ["none", "guidance"])
def test_slices_of_a_2d_network(pretrain: Callable[..., Any], project: Project, tmp_path: Path, mode: str) -> None:
    trainer = pretrain("2d", "all", iterations=2, coordinates={"mode": mode})
    strides = np.prod(trainer.configuration_manager.pool_op_kernel_sizes, axis=0)
    size = tuple(int(n) for n in (strides * (2, 3)))
    request = replace(REQUEST, configuration="2d", fold="all", size=size)
    record = sample(project, request, tmp_path / "out", "cpu")
    assert (record["size"], record["coordinates"]) == (list(size), mode)
    values, plans = voxels(tmp_path / "out"), project.plans()
    assert values.shape == tuple((1, *size)[axis] for axis in plans["transpose_backward"])
    assert np.isfinite(values).all()


def test_earlier_samples_are_replaced_and_nothing_else_is(
    pretrain: Callable[..., Any], project: Project, tmp_path: Path
) -> None:
    checkpoint, output = pretrain().final_checkpoint, tmp_path / "out"
    sample(project, replace(REQUEST, count=3), output, "cpu")
    (output / "notes.txt").write_text("mine")
    sample(project, replace(REQUEST, configuration="2d", checkpoint=Path(checkpoint), count=1), output, "cpu")
    assert names(output) == {"sample_000.nii.gz", SHEET, RECORD, "notes.txt"}

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path in (foreign, tmp_path / "file"):
        with pytest.raises(BadInputError, match="holds something other than samples"):
            sample(project, REQUEST, path, "cpu")
    assert names(foreign) == {"notes.txt"}


def test_a_missing_network_is_named_with_those_there_are(
    pretrain: Callable[..., Any], project: Project, tmp_path: Path
) -> None:
    pretrain(fold=1)
    with pytest.raises(BadInputError, match="no pretrained network") as caught:
        sample(project, REQUEST, tmp_path / "out", "cpu")
    assert "fold_0" in caught.value.message
    assert "pretrained there: fold_1" in caught.value.message
    assert f"diffseg pretrain {project.id} -c 3d_fullres -f 0" in caught.value.mend
    with pytest.raises(BadInputError, match=r"no checkpoint .*gone\.pth"):
        sample(project, replace(REQUEST, checkpoint=tmp_path / "gone.pth"), tmp_path / "out", "cpu")
    assert not (tmp_path / "out").exists()


def test_sizes_and_steps_that_do_not_fit(pretrain: Callable[..., Any], project: Project, tmp_path: Path) -> None:
    trainer, output = pretrain(), tmp_path / "out"
    strides = [int(n) for n in np.prod(trainer.configuration_manager.pool_op_kernel_sizes, axis=0)]
    least = [*strides[:-1], 2 * strides[-1]]
    for size, nearest in (
        ([2 * n + 1 for n in strides], [2 * n for n in strides]),
        ([3 * n - 1 for n in strides], [3 * n for n in strides]),
        ([1, 1, 1], least),
        (strides, least),
    ):
        with pytest.raises(BadInputError, match="does not fit the network") as caught:
            sample(project, replace(REQUEST, size=tuple(size)), output, "cpu")
        assert caught.value.mend.endswith(f"--size {' '.join(map(str, nearest))}.")
    with pytest.raises(BadInputError, match="has 2 axes, 3d_fullres has 3"):
        sample(project, replace(REQUEST, size=(16, 16)), output, "cpu")
    with pytest.raises(BadInputError, match="1001 steps are more than the 1000"):
        sample(project, replace(REQUEST, sampler=SamplerSettings(steps=1001)), output, "cpu")
    assert not output.exists()
    sample(project, replace(REQUEST, size=tuple(least), count=1), output, "cpu")
    assert voxels(output).size == np.prod(least)


def test_a_network_without_sense_is_said_to_have_none(
    pretrain: Callable[..., Any], project: Project, tmp_path: Path
) -> None:
    """Not a number in its weights ends in a message, not in a file."""
    path = Path(pretrain().final_checkpoint)
    content = torch.load(path, weights_only=True)
    for tensors in content["phases"]["denoiser"]["denoiser_ema_state"].values():
        _spoil(tensors)
    torch.save(content, path)
    with pytest.raises(StageFailedError, match="is not finite"):
        sample(project, REQUEST, tmp_path / "out", "cpu")
    assert names(tmp_path / "out") == {RECORD}
    assert json.loads((tmp_path / "out" / RECORD).read_text())["finished"] is False


def _spoil(content: Any) -> None:
    if isinstance(content, dict):
        for value in content.values():
            _spoil(value)
    elif isinstance(content, torch.Tensor) and content.is_floating_point():
        content.fill_(torch.nan)
