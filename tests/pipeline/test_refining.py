"""``diffseg refine`` and ``predict --refine`` by real commands: sized, finished once, refused with a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from diffseg_nnunet.inference.merging import merged_labels
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.refined_crossval import refined_crossval
from diffseg_nnunet.training.checkpoint import file_digest, load_safely
from diffseg_nnunet.workspace import Workspace
from tests.process_state import environment_restored

if TYPE_CHECKING:
    from tests.pipeline.conftest import TinyProject

pytestmark = pytest.mark.pipeline

LABELS = ("lungs", "left_kidney", "right_kidney")
LOSS = ("--dice-weight", 0.5, "--start-share", 0.25, "--degrade", 0.5)
QUICK = ("--iterations", 6, "--steps", 2, "--width", 8, "--samples", 2, "--seed", 7, *LOSS)
ALTERNATE = ("--segmentor", "alternate")
REFINER = "DiffSegRefinerTrainer"


@pytest.fixture(scope="module")
def refined(trained: TinyProject, tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """Fold 0, with a refiner of its segmentor as it is. Not changed but by predictions elsewhere."""
    project = trained.copy(tmp_path_factory.mktemp("refined"))
    project.diffseg("refine", 1, *QUICK).ok()
    return project


def labels_in(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted(folder.glob("*.nii.gz"))}


def test_a_fold_is_refined_once(refined: TinyProject) -> None:
    folder = refined.model(REFINER) / "fold_0"
    checkpoint = load_safely(folder / "checkpoint_final.pth")
    segmentor = refined.trained() / "checkpoint_final.pth"
    assert checkpoint["segmentor"] == {
        "strategy": "finetune",
        "sha256": file_digest(segmentor),
        "checkpoint": "checkpoint_final.pth",
    }
    assert not (folder / "checkpoint_latest.pth").exists()
    weights = load_safely(segmentor)["network_weights"]
    assert all((checkpoint["network_weights"][key] == tensor).all() for key, tensor in weights.items())
    stage = refined.stage("refine/3d_fullres/fold_0")
    assert stage["status"] == "finished"
    assert stage["settings"]["width"] == 8
    assert len(list((folder / "validation").glob("*.nii.gz"))) == len(refined.splits()[0]["val"])
    before = (folder / "checkpoint_final.pth").stat().st_mtime_ns
    again = refined.diffseg("refine", 1, *QUICK).ok()
    assert "refine/3d_fullres/fold_0: finished before, unchanged" in again.out
    assert "mean DSC of the segmentor" in again.out
    assert (folder / "checkpoint_final.pth").stat().st_mtime_ns == before


def test_other_samples_are_drawn_without_training_anew(refined: TinyProject, tmp_path: Path) -> None:
    project = refined.copy(tmp_path)
    folder = project.model(REFINER) / "fold_0"
    before, history = load_safely(folder / "checkpoint_final.pth"), (folder / "validation_report").stat().st_mtime_ns
    otherwise = ("refine", 1, *QUICK, "--samples", 3, "--sampling-steps", 2)
    project.diffseg(*otherwise).ok()
    after = load_safely(folder / "checkpoint_final.pth")
    assert [after["settings"][name] for name in ("samples", "sampling_steps")] == [3, 2]
    for part in ("refiner_weights", "refiner_state"):
        assert all(torch.equal(tensor, after[part][name]) for name, tensor in before[part].items())
    assert not list(project.results.rglob("superseded_*"))
    assert len(list((folder / "validation").glob("*.nii.gz"))) == len(project.splits()[0]["val"])
    assert (folder / "validation_report").stat().st_mtime_ns > history
    assert project.stage("refine/3d_fullres/fold_0")["settings"]["samples"] == 3
    assert "finished before, unchanged" in project.diffseg(*otherwise).ok().out


def test_the_segmentor_learns_in_turn(trained: TinyProject, tmp_path: Path) -> None:
    """A copy of it: the fold it was trained in stays as it is, and is what predicts without --refine."""
    project = trained.copy(tmp_path / "project")
    own = project.trained() / "checkpoint_final.pth"
    before = own.read_bytes()
    predict = ("predict", "-d", 1, "-i", project.test_images, "--no-mirroring", "-o")
    lines = [("refine", 1, *QUICK, *ALTERNATE), (*predict, tmp_path / "plain")]
    project.do(*lines, (*predict, tmp_path / "refined", "--refine"))
    assert own.read_bytes() == before
    assert project.stage("refine/3d_fullres/fold_0")["settings"]["segmentor"] == "alternate"
    refined = load_safely(project.model(REFINER) / "fold_0" / "checkpoint_final.pth")["network_weights"]
    weights = load_safely(own)["network_weights"]
    assert any((refined[key] != tensor).any() for key, tensor in weights.items())
    folder, cases = project.model(REFINER) / "fold_0", project.splits()[0]["val"]
    assert sorted(labels_in(folder / "validation_segmentor")) == [f"{case}.nii.gz" for case in sorted(cases)]
    project.diffseg("run", 1, "--refine", "--no-test").ok()
    comparisons = project.stage("select/refine/finetune/3d_fullres/folds_0")["outputs"]["comparisons"]
    scores = json.loads((folder / "validation_segmentor_report" / "scores.json").read_text())
    assert comparisons[-1]["alone"] == pytest.approx(scores["overall"]["dsc"]["mean"])
    assert labels_in(tmp_path / "plain").keys() == labels_in(tmp_path / "refined").keys()


def test_refined_predictions(refined: TinyProject, tmp_path: Path) -> None:
    predict = ("predict", "-d", 1, "-i", refined.test_images, "--no-mirroring", "-o")
    options = ("--refine", "--samples", 2)
    first, *others = refined.diffseg.in_one_process(
        [
            (*predict, tmp_path / "one", "--uncertainty", *options),
            (*predict, tmp_path / "two", *options),
            (*predict, tmp_path / "plain"),
            (*predict, tmp_path / "untouched", "--refine", "--refine-threshold", 9),
        ]
    )
    assert "100.0% of the windows' voxels were refined" in first.ok().out
    for other in others:
        other.ok()
    one, same, plain, untouched = (labels_in(tmp_path / name) for name in ("one", "two", "plain", "untouched"))
    assert len(one) == 2
    assert one.keys() == same.keys() == plain.keys() == untouched.keys()
    assert all((one[name] == same[name]).all() for name in one)
    for name, labels in one.items():
        path = tmp_path / "one" / "uncertainty" / name
        uncertainty, segmentation = (sitk.ReadImage(str(p)) for p in (path, tmp_path / "one" / name))
        assert uncertainty.GetPixelID() == sitk.sitkFloat32
        for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(uncertainty, geometry)() == getattr(segmentation, geometry)()
        bits = sitk.GetArrayFromImage(uncertainty)
        assert bits.shape == labels.shape
        assert bits.min() >= 0
        assert 0 < bits.max() <= np.log2(4)

    # nothing is as uncertain as its threshold, so nothing was refined: windows were bounded before they were averaged
    assert all((plain[name] != untouched[name]).mean() < 0.01 for name in plain)


def test_the_run_uses_the_refiner_where_validation_speaks_for_it(refined: TinyProject, tmp_path: Path) -> None:
    project = refined.copy(tmp_path)
    run = ("run", 1, "--refine")
    first = project.diffseg(*run).ok()
    assert "refine/3d_fullres/fold_0: finished before, unchanged" in first.out
    record = project.stage("select/refine/finetune/3d_fullres/folds_0")
    assert [each["structure"] for each in record["outputs"]["comparisons"][:-1]] == list(LABELS)
    assert all(f"3d_fullres, {name}: DSC" in first.out for name in list(LABELS))

    def predicted_with() -> dict[str, Any]:
        folder = project.results / "predictions_imagesTs" / "finetune__folds_0"
        assert len(list(folder.glob("*.nii.gz"))) == 2
        assert not list(folder.glob("member_*"))
        return json.loads((folder / "diffseg_prediction.json").read_text())["model"]

    kept = record["outputs"]["structures"]
    assert predicted_with()["refined_structures"] == (kept or None)
    # as if the validation cases had spoken for one structure
    manifest_path = project.results / "diffseg_run.json"
    manifest = project.manifest()
    manifest["stages"]["select/refine/finetune/3d_fullres/folds_0"]["outputs"]["structures"] = ["lungs"]
    manifest_path.write_text(json.dumps(manifest))
    project.diffseg("run", 1).ok()
    assert predicted_with()["refined_structures"] == ["lungs"]
    assert list(predicted_with()["checkpoints"]) == ["3d_fullres/fold_0", "finetune/3d_fullres/fold_0"]
    by_hand = ("predict", "-d", 1, "-i", project.test_images, "-o", tmp_path / "by_hand", "--refine")
    alike, unknown = project.diffseg.in_one_process(
        [(*by_hand, "--refine-structures", "lungs"), (*by_hand, "--refine-structures", "lungs,tail")]
    )
    unknown.refused("has no structure 'tail'", "Choose of: lungs, left_kidney, right_kidney")
    assert "folds: 0" in alike.ok().out
    by_run = labels_in(project.results / "predictions_imagesTs" / "finetune__folds_0")
    assert all((labels == by_run[name]).all() for name, labels in labels_in(tmp_path / "by_hand").items())
    project.diffseg("run", 1, "--no-refine").ok()
    assert predicted_with()["refine"] is None


def test_the_crossval_of_what_would_be_predicted(refined: TinyProject, tmp_path: Path) -> None:
    """One structure's merged label maps, or the refined ones as they are, scored and postprocessed by nnU-Net."""
    project, labels = refined.copy(tmp_path), {"lungs": 1}
    plain, own = (labels_in(folder / "validation") for folder in (project.trained(), project.model(REFINER) / "fold_0"))
    with environment_restored():
        opened = Project.open(Workspace.locate(project.workspace).activate(), 1)
        for structures in (("lungs",), None):
            found = refined_crossval(opened, "3d_fullres", [0], "finetune", structures)
            folder = found.postprocessing.parent
            assert found.postprocessing.is_file()
            for name, merged in labels_in(folder).items():
                values = [labels[structure] for structure in structures or ()]
                wanted = merged_labels(plain[name], own[name], values) if structures else own[name]
                assert (merged == wanted).all()
            assert labels_in(folder).keys() == own.keys()
    # of the refined ones, nnU-Net has said so in the validation already
    summary = json.loads((project.model(REFINER) / "fold_0" / "validation" / "summary.json").read_text())
    assert found.dsc_before == pytest.approx(summary["foreground_mean"]["Dice"])
    assert found.dsc_after >= found.dsc_before  # nnU-Net postprocesses only where that gains


def test_postprocessing_may_be_worth_more_than_a_refiner(refined: TinyProject, tmp_path: Path) -> None:
    project = refined.copy(tmp_path)
    run, stage = ("run", 1, "--refine"), "select/refine/finetune/3d_fullres/folds_0"
    first = project.diffseg(*run, "--no-test").ok()
    assert "2 validation case(s) cannot tell a gain of 3 structure(s) from chance" in " ".join(first.out.split())
    manifest, path = project.manifest(), project.results / "diffseg_run.json"
    outputs = manifest["stages"][stage]["outputs"]
    pickle = project.stage("select/finetune/folds_0")["outputs"]["postprocessing"]
    after = project.stage("select/finetune/folds_0")["outputs"]["dsc_after"]
    for gain, words in (
        (-0.01, "the refiner is not used: with nnU-Net's postprocessing"),
        (0.01, "--refine-structures"),
    ):
        crossval = {"postprocessing": pickle, "dsc_before": after, "dsc_after": after + gain}
        outputs |= {"structures": ["lungs"], "crossval": crossval}
        path.write_text(json.dumps(manifest))
        assert words in " ".join(project.diffseg(*run, "--no-test").ok().out.split())


def test_what_does_not_go_together(refined: TinyProject, tmp_path: Path) -> None:
    out = tmp_path / "out"
    once = ("--refine", "--samples", 1, "--steps", 1, "--no-mirroring")
    refined.diffseg("predict", "-d", 1, "-i", refined.test_images, "-o", out, *once).ok()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    common = ("predict", "-d", 1, "-i", refined.test_images, "-o", out)
    cases = {
        ("--samples", 2): "Add --refine",
        ("--refine", "--steps", 3): "was trained with 2",
        ("--refine", "--samples", 1, "--uncertainty"): "Give --samples 4, or predict without --uncertainty",
        ("--refine", "-f", 1): "Run `diffseg refine 1 -c 3d_fullres --strategy finetune -f 1` first",
        ("--refine", "--strategy", "scratch"): "is of --strategy finetune",
    }
    for run, words in zip(
        refined.diffseg.in_one_process([(*common, *options) for options in cases]), cases.values(), strict=True
    ):
        run.refused(words)
    # what was predicted before stays
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == before

    # and is not done once more where it was recorded before the step could be chosen
    record = json.loads((out / "diffseg_prediction.json").read_text())
    assert record["model"].pop("step_size") == 0.5
    (out / "diffseg_prediction.json").write_text(json.dumps(record))
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    refined.diffseg(*common, *once).ok()
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")} == times
    refined.diffseg(*common, *once, "--step-size", 1).ok()
    assert json.loads((out / "diffseg_prediction.json").read_text())["model"]["step_size"] == 1
    assert all(path.stat().st_mtime_ns > times[path] for path in out.glob("*.nii.gz"))


def test_a_refiner_of_another_version(refined: TinyProject, tmp_path: Path) -> None:
    project = refined.copy(tmp_path)
    path = project.model(REFINER) / "fold_0" / "checkpoint_final.pth"
    content = load_safely(path)
    del content["refiner_format"]
    torch.save(content, path)
    command = ("predict", "-d", 1, "-i", project.test_images, "-o", tmp_path / "out", "--refine")
    project.diffseg(*command).refused("is a refiner of another version", "Run `diffseg refine` again")


def test_a_run_that_could_not_be_refined_says_so_first(project: TinyProject) -> None:
    before = project.manifest()["stages"].keys()
    linear = project.diffseg("run", 1, "--refine", "--strategy", "linear")
    linear.refused("has a head of its own", "--strategy finetune, decoder or scratch")
    assert project.manifest()["stages"].keys() == before


def test_what_cannot_be_refined(project: TinyProject) -> None:
    refine = ("refine", 1, *QUICK)
    segmentation = next((project.trained() / "validation").glob("*.nii.gz"))
    segmentation.rename(segmentation.with_suffix(".away"))  # as if killed amid its validation
    killed, narrow = project.diffseg.in_one_process([refine, ("refine", 1, "--width", 33)])
    killed.refused("is not finished: 1 of its validation cases are not predicted", "`diffseg train 1")
    narrow.refused("--width 33 is no multiple of 4", "8")
    segmentation.with_suffix(".away").rename(segmentation)
    plans_path = project.preprocessed / "DiffSegPlans.json"
    plans = json.loads(plans_path.read_text())
    plans["diffseg"]["memory"]["budget_gib"] = 0.5  # the CUDA context's alone
    plans_path.write_text(json.dumps(plans))
    unfinished, no_stock_network, too_large = project.diffseg.in_one_process(
        [(*refine, "-f", 1), (*refine, "--strategy", "linear"), refine]
    )
    unfinished.refused("There is no trained model", "`diffseg train 1 -c 3d_fullres --strategy finetune -f 1` first")
    no_stock_network.refused("has a head of its own", "--strategy finetune, decoder or scratch")
    project.diffseg("run", 1, "--refine", "--no-test").refused("A refiner of 3d_fullres does not fit 0.5 GiB")
    too_large.refused(
        "does not fit 0.5 GiB: with 8 channels, a batch of 2 patches takes 0.5", "Plan with --gpu-memory 0.6 or more"
    )

    # a segmentor whose data were normalised otherwise fits in shape
    plans["diffseg"]["memory"]["budget_gib"] = 1
    plans_path.write_text(json.dumps(plans))
    segmentor = project.trained() / "checkpoint_final.pth"
    content = load_safely(segmentor)
    content["init_args"]["plans"]["foreground_intensity_properties_per_channel"]["0"]["mean"] += 1
    torch.save(content, segmentor)
    project.diffseg(*refine).refused(
        "is a segmentor of another plan: foreground_intensity_properties_per_channel differ", "`diffseg train 1`"
    )
    assert not (project.model(REFINER) / "fold_0").exists()
