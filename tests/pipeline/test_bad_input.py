"""Wrong input to the later stages, on a trained project: refused before anything that is there is touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from filelock import FileLock

if TYPE_CHECKING:
    from tests.pipeline.conftest import TinyProject

pytestmark = pytest.mark.pipeline


class Trap:
    """Pickled, it runs a command when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def contents(project: TinyProject) -> dict[Path, int]:
    """Every file of the results but the logs, which any command may write."""
    files = [path for path in project.results.rglob("*") if path.is_file() and path.parent.name != "logs"]
    return {path: path.stat().st_mtime_ns for path in files}


REFUSED = {
    "train 1 -f 9": ("has folds 0 to 4, not 9", "splits_final.json"),
    "train 1 -f first": ("'first' is no fold", "'all'"),
    "train 1 -c 3d_lowres": ("have no configuration '3d_lowres'", "There are: 2d, 3d_fullres"),
    "train 1 --strategy prayer": ("--strategy prayer is not known", "finetune, scratch"),
    "train 1 --optimizer lion": ("--optimizer lion is not known", "sgd, adamw"),
    "train 1 --device cuda": ("Device 'cuda' cannot be used", "--device cpu"),
    "train 1 -c 2d": ("is not preprocessed for 2d", "diffseg preprocess 1 -c 2d"),
    "train 1 -f 1": ("no pretrained network for fold 1", "there: fold_0", "diffseg pretrain 1"),
    "train 1 --pretrained gone.pth": ("There is no checkpoint gone.pth", "Correct the path"),
    "pretrain 1 --device tpu": ("Unknown device 'tpu'", "auto, cpu, cuda"),
    "pretrain 1 --precision int8": ("--precision int8 is not known", "float32"),
    "plan 1 --gpu-memory little": ("'little' is not a memory budget", "GiB"),
    "plan 1 --backbone transformer": ("Unknown planner 'transformer'", "plain, resenc"),
    "plan 1 --unlabeled 77": ("no data set with id 77", "Dataset001_Phantom"),
    "plan 1 --spacing 1 0 1": ("not a positive length", "mm"),
    "plan 1 --from-checkpoint gone.pth": ("There is no checkpoint", "gone.pth", "Correct the path"),
    "plan 1 --from-checkpoint {text}": ("dataset.json cannot be read", "without running any code"),
    "preprocess 1 -c nonsense": ("have no configuration 'nonsense'", "There are: 2d, 3d_fullres"),
    "run 1 --device cuda": ("Device 'cuda' cannot be used", "--device cpu"),
    "export 1 --stock model.tar": ("model.tar does not end in .zip", "OUT.zip"),
    "export 1 --stock model.zip -c 2d": ("has no trained fold", "diffseg train 1 -c 2d"),
    "export 1 --stock model.zip -f 3": ("has no trained fold_3", "diffseg train 1"),
    "predict -d 1 -i gone -o out": ("There is no folder gone", "-i"),
    "predict -d 1 -i diffseg_workspace -o out": ("holds no image CASE_0000.nii.gz", "file ending"),
    "predict -d 1 -i {images} -o {images}": ("holds the images", "-o"),
    "predict -d 1 -i {images} -o out -f 0 1": ("There is no trained model", "fold_1", "trained there: fold_0"),
    "predict -d 1 -i {images} -o out -c 2d": ("There is no trained model", "trained there: none", "-c"),
    "predict -d 1 -i {images} -o out --postprocessing no.pkl": (
        "no.pkl lies outside",
        "pickles, which run code",
        "diffseg run",
    ),
    "sample -d 1 -o out --sampler euler": ("--sampler euler is not known", "ddim, ddpm"),
    "sample -d 1 -o out --steps 2000": ("2000 steps are more than the 1000", "--steps 1000"),
    "sample -d 1 -o out --size 7 8 9": ("--size 7 8 9 does not fit the network", "nearest size that fits is --size"),
    "sample -d 1 -o out --size 8 8": ("has 2 axes, 3d_fullres has 3", "Give 3 numbers"),
    "sample -d 1 -o out -f 3": ("no pretrained network", "pretrained there: fold_0", "diffseg pretrain 1"),
    "sample -d 1 -o out --checkpoint gone.pth": ("There is no checkpoint gone.pth", "correct the path"),
    "sample -d 1 -o {images}": ("holds something other than samples", "-o"),
    "predict -d 2 -i {images} -o out": ("There is no trained model", "Dataset002_Pool"),
}


def test_refused_on_a_trained_project(trained: TinyProject) -> None:
    before, beside = contents(trained), set(trained.folder.iterdir())
    text = trained.raw / "dataset.json"
    lines = [command.format(images=trained.test_images, text=text).split() for command in REFUSED]
    for finished, words in zip(trained.diffseg.in_one_process(lines), REFUSED.values(), strict=True):
        finished.refused(*words)
    assert contents(trained) == before
    assert set(trained.folder.iterdir()) == beside


def test_checkpoints_that_are_not_started_from(project: TinyProject) -> None:
    """One of other shapes, with a list of what differs; one that would run a command, which it must not."""
    checkpoint = torch.load(project.pretrained() / "checkpoint_final.pth", weights_only=True)
    weights = checkpoint["network_weights"]
    shrunk, lost, *_ = weights
    weights[shrunk] = weights[shrunk][:4].clone()
    del weights[lost]
    weights["encoder.surplus"] = torch.zeros(3)
    torch.save(checkpoint, project.folder / "other.pth")
    trace, trap = project.folder / "executed", project.folder / "trap.pth"
    torch.save({"network_weights": {}, "trap": Trap(trace)}, trap)

    before = contents(project)
    lines = [("train", 1, "--pretrained", name, "--iterations", 5) for name in ("other.pth", "trap.pth")]
    misfit, trapped = project.diffseg.in_one_process(lines)
    misfit.refused(
        "other.pth does not fit the plan, 3 tensors differ",
        f"{shrunk}: (4, ",
        f"{lost}: missing in the checkpoint",
        "encoder.surplus: not in the plan's network",
        "diffseg pretrain",
    )
    trapped.refused("trap.pth cannot be read", "without running any code")
    assert contents(project) == before
    assert not trace.exists()
    torch.load(trap, weights_only=False)
    assert trace.exists(), "the trap does not work, so nothing was tested"


def test_plans_of_another_planner(project: TinyProject) -> None:
    """Refused by every stage that reads them, and replaced by the command that the message names."""
    path = project.preprocessed / "DiffSegPlans.json"
    own = json.loads(path.read_text())
    stock = {key: value for key, value in own.items() if key != "diffseg"} | {
        "experiment_planner_used": "ExperimentPlanner",
        "plans_name": "nnUNetPlans",
    }
    path.write_text(json.dumps(stock))
    words = ("were made by ExperimentPlanner", "no 'diffseg' section", "diffseg plan")
    plan = ("plan", 1, *project.light_plan, "--unlabeled", 2)
    *stages, planned = project.diffseg.in_one_process([("preprocess", 1), ("pretrain", 1), ("train", 1), plan])
    for stage in stages:
        stage.refused(*words)
    planned.ok()
    assert "is kept as" in planned.out
    assert json.loads(path.read_text()) == own
    (kept,) = project.preprocessed.glob("superseded_*_DiffSegPlans.json")
    assert json.loads(kept.read_text()) == stock


def test_plans_that_are_damaged_or_missing(project: TinyProject) -> None:
    path = project.preprocessed / "DiffSegPlans.json"
    for content, words in (('{"configurations": ', "is not readable"), ("{}", "holds no plans")):
        path.write_text(content)
        damaged, missing = project.diffseg.in_one_process([("train", 1), ("train", 2)])
        damaged.refused(f"DiffSegPlans.json {words}", "diffseg plan 1")
    missing.refused("Dataset002_Pool has no plans", "diffseg plan 2")


def test_bad_cases_are_set_aside_and_good_ones_predicted(project: TinyProject) -> None:
    images, output = project.test_images, project.folder / "out"
    good = sorted(path.name.replace("_0000.nii.gz", "") for path in images.iterdir())
    example = images / f"{good[0]}_0000.nii.gz"
    volume = sitk.ReadImage(str(example), sitk.sitkFloat32)
    array = sitk.GetArrayFromImage(volume)

    def write(name: str, content: np.ndarray) -> None:
        image = sitk.GetImageFromArray(content, isVector=False)
        if content.shape == array.shape:
            image.CopyInformation(volume)
        sitk.WriteImage(image, str(images / f"{name}_0000.nii.gz"))

    (images / "cut_0000.nii.gz").write_bytes(example.read_bytes()[:5000])
    (images / "text_0000.nii.gz").write_text("no volume")
    (images / "link_0000.nii.gz").symlink_to(images / "nowhere.nii.gz")
    write("nan", np.where(array == array.max(), np.nan, array))
    write("flat", array[0])
    write("series", np.stack([array, array]))
    shutil.copy(example, images / "second_0001.nii.gz")
    shutil.copy(example, images / "both_0000.nii.gz")
    shutil.copy(example, images / "both_0001.nii.gz")

    finished = project.diffseg("predict", "-d", 1, "-i", images, "-o", output)
    assert finished.code == 2
    assert "Traceback" not in finished.out + finished.err
    for case, reason in {
        "cut": "truncated",
        "text": "has no NIfTI header",
        "link": "leads nowhere",
        "nan": "NaN or infinite",
        "flat": "is 2D",
        "series": "is 4D",
        "second": "the channel numbers 0001, the model reads 0000",
        "both": "the channel numbers 0000, 0001, the model reads 0000",
    }.items():
        (line,) = [line for line in finished.out.splitlines() if line.startswith(f"Warning: {case} was set aside: ")]
        assert reason in line
    assert sorted(path.name for path in output.glob("*.nii.gz")) == [f"{case}.nii.gz" for case in good]
    assert not list(output.glob(".partial-*"))


def test_a_constant_scan_of_the_pool_is_refused_unverified(planned_project: TinyProject) -> None:
    project = planned_project
    pool = project.raw.with_name(project.pool_name) / "imagesUn"
    bad, *good = sorted(pool.iterdir())
    volume = sitk.ReadImage(str(bad))
    sitk.WriteImage(volume * 0 + 40, str(bad))
    lines = [("plan", 1, *project.light_plan, "--unlabeled", 2), ("preprocess", 1, "-c", "3d_fullres")]
    planned, preprocessed = project.diffseg.in_one_process(lines)
    planned.ok()
    reason = f"{bad} is constant, 40 in every voxel: nothing can be learnt from it"
    preprocessed.refused("1 case(s) of", "others are done", reason, "`diffseg verify 2`")
    done = {path.stem for path in project.preprocessed.glob(f"*_unlabelled/{project.pool_name}/*.pkl")}
    assert done == {path.name.removesuffix("_0000.nii.gz") for path in good}


def test_predictions_replace_predictions_alone(project: TinyProject) -> None:
    """Neither what somebody else has made, nor what another process is making."""
    output, busy = project.folder / "annotated", project.folder / "busy"
    case = min(project.test_images.iterdir()).name.replace("_0000.nii.gz", ".nii.gz")
    for path in (
        output / case.replace(".nii.gz", ".npz"),
        output / "uncertainty" / "notes.txt",
        output / "member_notes" / "a",
        busy / "a",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of somebody else")
    predict = ("predict", "-d", 1, "-i", project.test_images, "-o")
    with FileLock(busy / ".diffseg_prediction.lock"):
        foreign, second, leaping = project.diffseg.in_one_process(
            [(*predict, output), (*predict, busy), (*predict, project.folder / "new", "--step-size", 1.5)]
        )
    leaping.refused("--step-size 1.5 is not above 0 and at most 1", "leave gaps", "Give 0.5")
    foreign.refused("annotated holds", ".npz, which `diffseg predict` has not written", "-o")
    second.refused("Another process is predicting into", "busy", "-o")
    theirs = [path for folder in (output, busy) for path in folder.rglob("[!.]*") if path.is_file()]
    assert [path.read_text() for path in theirs] == ["of somebody else"] * 4


def test_images_without_channel_numbers(project: TinyProject) -> None:
    """Understood where the model has one channel, refused where some have a number and some have none. Predicting
    needs no preprocessed data."""
    shutil.rmtree(project.preprocessed)
    images, mixed, output = project.folder / "phantom" / "test_images", project.folder / "mixed", project.folder / "out"
    shutil.copytree(images, mixed)
    first = min(mixed.iterdir())
    first.rename(first.with_name("renamed_0000.nii.gz"))
    lines = [("predict", "-d", 1, "-i", folder, "-o", output) for folder in (images, mixed)]
    understood, refused = project.diffseg.in_one_process(lines)
    understood.ok()
    assert sorted(path.name for path in output.glob("*.nii.gz")) == sorted(path.name for path in images.iterdir())
    refused.refused("1 file(s)", "no channel number", "CASE_0000.nii.gz")


def test_validation_cases_that_cannot_be_scored(project: TinyProject) -> None:
    case = project.splits()[0]["val"][0]
    path = project.trained() / "validation" / f"{case}.nii.gz"
    path.write_bytes(path.read_bytes()[:100])
    shutil.rmtree(project.trained() / "validation_report")
    finished = project.diffseg("train", 1, "--iterations", 20, "--optimizer", "adamw", "--seed", 7)
    assert finished.code == 2
    assert f"{case} was not scored: {case}.nii.gz cannot be read: it is truncated" in finished.out
