"""Plans that stock nnU-Net reads, with both stages on one topology, for labelled and unlabelled data sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset, plan_experiment_dataset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from diffseg_nnunet.atomic import write_json
from diffseg_nnunet.coordinates.head import CoordinateSettings
from diffseg_nnunet.diffusion.gaussian import DiffusionSettings
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.planners import DiffSegFingerprintExtractor, DiffSegPlainPlanner, DiffSegPlanner
from diffseg_nnunet.planning.explanation import explain
from diffseg_nnunet.planning.gpus import MemoryBudget
from diffseg_nnunet.planning.section import allowed_mirror_axes, diffseg_section, stage_plan
from diffseg_nnunet.trainers import DiffSegPretrainer
from diffseg_nnunet.workspace import Workspace
from tests.process_state import environment_restored

LABELLED, UNLABELLED, EMPTY = "Dataset001_Kidneys", "Dataset002_Scans", "Dataset003_Nothing"
PAIRED = {"background": 0, "left_kidney": 1, "right_kidney": 2}
PLANNERS = {"resenc": DiffSegPlanner, "plain": DiffSegPlainPlanner}
NETWORKS = {"resenc": "ResidualEncoderUNet", "plain": "PlainConvUNet"}
# more voxels than a patch for one GiB, so that there is a 3d_lowres, and its cascade
SIZE = (40, 36, 30)

Plan = Callable[..., dict[str, Any]]


@contextmanager
def larger_cases(workspace: Workspace) -> Iterator[None]:
    """The fingerprint of cases five times as long on each axis: a patch for one GiB holds a small part of them."""
    path = workspace.preprocessed / LABELLED / "dataset_fingerprint.json"
    kept = path.read_text()
    fingerprint = json.loads(kept)
    fingerprint["shapes_after_crop"] = [[5 * length for length in shape] for shape in fingerprint["shapes_after_crop"]]
    write_json(path, fingerprint)
    try:
        yield
    finally:
        path.write_text(kept)


def write_case(folder: Path, seed: int, image: str, label: str | None) -> None:
    rng = np.random.default_rng(seed)
    body = np.full(SIZE, -1000.0)
    body[4:-4, 4:-4, 4:-4] = 40
    kidneys = np.zeros(SIZE, np.uint8)
    kidneys[10:20, 10:20, 18:24], kidneys[10:20, 10:20, 6:12] = 1, 2
    volumes = {image: (body + 100 * (kidneys > 0) + rng.normal(0, 20, SIZE)).astype(np.int16)}
    if label is not None:
        volumes[label] = kidneys
    for name, array in volumes.items():
        volume = sitk.GetImageFromArray(array)
        volume.SetSpacing((1.2, 1.2, 1.5))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(volume, str(folder / name))


def describe(folder: Path, labels: dict[str, int], cases: int) -> None:
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    channels = {"0": "CT"}
    write_json(
        folder / "dataset.json",
        {"channel_names": channels, "labels": labels, "numTraining": cases, "file_ending": ".nii.gz"},
    )


@pytest.fixture(scope="module")
def fingerprinted(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A labelled and an unlabelled data set with fingerprints, and one without any image."""
    folder = tmp_path_factory.mktemp("planners")
    with environment_restored():
        workspace = Workspace.locate(folder).activate()
        for number in range(2):
            write_case(
                workspace.raw / LABELLED, number, f"imagesTr/c{number}_0000.nii.gz", f"labelsTr/c{number}.nii.gz"
            )
            write_case(workspace.raw / UNLABELLED, 5 + number, f"imagesUn/u{number}_0000.nii.gz", None)
        describe(workspace.raw / LABELLED, PAIRED, 2)
        describe(workspace.raw / UNLABELLED, {"background": 0}, 0)
        describe(workspace.raw / EMPTY, {"background": 0}, 0)
        for number in (1, 2):
            extract_fingerprint_dataset(number, DiffSegFingerprintExtractor, 1, clean=True, show_progress_bar=False)
    return workspace


@pytest.fixture
def workspace(fingerprinted: Workspace) -> Iterator[Workspace]:
    with environment_restored():
        yield fingerprinted.activate()


def plans_file(workspace: Workspace, dataset: str = LABELLED) -> Path:
    return workspace.preprocessed / dataset / "DiffSegPlans.json"


@pytest.fixture
def plan(workspace: Workspace) -> Iterator[Plan]:
    """Plans a data set, and returns what the plans file then says."""

    def make(
        backbone: str = "plain", dataset: str = LABELLED, spacing: list[float] | None = None, **options: Any
    ) -> dict[str, Any]:
        planner = PLANNERS[backbone](dataset, overwrite_target_spacing=spacing)
        planner.configure(**{"budget": MemoryBudget(1.0, "requested"), "base_features": 8, **options})
        planner.plan_experiment()
        return json.loads(plans_file(workspace, dataset).read_text())

    yield make
    for dataset in (LABELLED, UNLABELLED):
        plans_file(workspace, dataset).unlink(missing_ok=True)


@pytest.mark.parametrize("backbone", PLANNERS)
def test_stock_nnunet_reads_the_plans(plan: Plan, workspace: Workspace, backbone: str) -> None:
    plan(backbone)
    manager = PlansManager(str(plans_file(workspace)))
    assert {"2d", "3d_fullres"} <= set(manager.available_configurations)
    for name in manager.available_configurations:
        configuration = manager.get_configuration(name)
        assert configuration.network_arch_class_name.endswith(NETWORKS[backbone])
        assert configuration.data_identifier == f"DiffSegPlans_{name}"
        network = nnUNetTrainer.build_network_architecture(manager, configuration, 1, 3, enable_deep_supervision=False)
        with torch.no_grad():
            output = network(torch.zeros((1, 1, *configuration.patch_size)))
        assert output.shape == (1, 3, *configuration.patch_size)


@pytest.mark.parametrize("backbone", PLANNERS)
def test_both_stages_have_one_topology(plan: Plan, workspace: Workspace, backbone: str) -> None:
    plans = plan(backbone)
    manager = PlansManager(plans)
    for name in ("2d", "3d_fullres"):
        training, pretraining = (stage_plan(plans, name, stage) for stage in ("training", "pretraining"))
        configuration = manager.get_configuration(name)
        assert training["patch_size"] == list(configuration.patch_size)
        assert training["batch_size"] == configuration.batch_size
        assert pretraining["batch_size"] % 2 == 0  # patches come in pairs
        divisor = np.prod(configuration.pool_op_kernel_sizes, axis=0)
        assert not any(np.mod(pretraining["patch_size"], divisor))
        stock, denoiser = (
            builder.build_network_architecture(manager, configuration, 1, 3, enable_deep_supervision=deep).state_dict()
            for builder, deep in ((nnUNetTrainer, True), (DiffSegPretrainer, False))
        )
        assert stock.keys() == denoiser.keys()
        differing = {key for key in stock if stock[key].shape != denoiser[key].shape}
        assert differing == {key for key in stock if ".seg_layers." in key}


def test_section_is_complete(plan: Plan) -> None:
    diffusion = DiffusionSettings(timesteps=500, schedule="cosine", fold_timestep=20)
    coordinates = CoordinateSettings(mode="none", weight=0.3)
    plans = plan(unlabelled=(UNLABELLED,), diffusion=diffusion, coordinates=coordinates)
    section = diffseg_section(plans)
    assert section["version"] == 1
    assert (section["backbone"], section["base_features"]) == ("plain", 8)
    assert (section["memory"]["budget_gib"], section["memory"]["budget_source"]) == (1.0, "requested")
    assert section["pool"] == {"unlabelled_datasets": [UNLABELLED]}
    assert DiffusionSettings(**section["diffusion"]) == diffusion
    assert CoordinateSettings(**section["coordinates"]) == coordinates
    assert set(section["configurations"]) == set(plans["configurations"])
    for name, stages in section["configurations"].items():
        assert "previous_stage" not in plans["configurations"][name]
        assert set(stages) == {"training", "pretraining", "inference", "reasons"}
        assert set(stages["reasons"]) == {"patch", "batch", "pretraining_patch", "pretraining_batch"}
        inference = stages["inference"]
        assert 0 < inference["window_gib"] <= inference["median_case_gib"] <= inference["largest_case_gib"]
        for stage in (stages["training"], stages["pretraining"]):
            assert set(stage) == {"patch_size", "batch_size", "predicted_peak_gib", "memory_gib"}
            assert 0 < stage["predicted_peak_gib"] <= 1.0
            assert sum(stage["memory_gib"].values()) == pytest.approx(stage["predicted_peak_gib"], abs=1e-6)


def test_left_and_right_are_not_to_be_mirrored(plan: Plan) -> None:
    plans = plan()
    mirroring = diffseg_section(plans)["mirroring"]
    # no transposition, and image axis x, the last of the array, runs left-right
    assert plans["transpose_forward"] == [0, 1, 2]
    assert mirroring["left_right_axis"] == 2
    assert mirroring["pairs"] == [["left_kidney", "right_kidney"]]
    assert "left_kidney" in mirroring["reason"]
    assert allowed_mirror_axes(plans, 3) == (0, 1)
    assert allowed_mirror_axes(plans, 2) == (0,)


@pytest.mark.parametrize(("reader", "axes"), [("Tiff3DIO", ()), ("NibabelIOWithReorient", (0, 1)), (None, (1, 2))])
def test_the_reader_decides_what_directions_mean(
    plan: Plan, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, reader: str | None, axes: tuple[int, ...]
) -> None:
    """A TIFF has no direction cosines, a reorienting reader ignores them, all others keep the axes of the file."""
    dataset_json = workspace.raw / LABELLED / "dataset.json"
    kept = dataset_json.read_text()
    first_axis_to_the_left = (0.0, 0, 1, 0, 1, 0, 1, 0, 0)
    monkeypatch.setattr("diffseg_nnunet.planners.planner.header_direction", lambda _: first_axis_to_the_left)
    try:
        write_json(dataset_json, json.loads(kept) | ({"overwrite_image_reader_writer": reader} if reader else {}))
        assert allowed_mirror_axes(plan(), 3) == axes
    finally:
        dataset_json.write_text(kept)


def test_target_spacing_can_be_chosen(plan: Plan) -> None:
    """Given in array order, (z, y, x); nnU-Net puts the axis of the coarsest voxels first."""
    plans = plan(spacing=[2.0, 2.0, 3.0])
    assert plans["transpose_forward"] == [2, 0, 1]
    assert plans["configurations"]["3d_fullres"]["spacing"] == [3.0, 2.0, 2.0]
    # the axis to the patient's left is now the first, along which 2D slices are stacked
    assert allowed_mirror_axes(plans, 3) == (1, 2)
    assert allowed_mirror_axes(plans, 2) == (0, 1)


@pytest.mark.parametrize("backbone", PLANNERS)
@pytest.mark.parametrize("base_features", [8, 12])
def test_base_features(plan: Plan, backbone: str, base_features: int) -> None:
    plans = plan(backbone, base_features=base_features)
    for configuration in plans["configurations"].values():
        if "architecture" in configuration:
            features = configuration["architecture"]["arch_kwargs"]["features_per_stage"]
            assert features[0] == base_features
            assert features[1] == 2 * base_features


def test_more_memory_gives_no_smaller_patches(plan: Plan) -> None:
    """A plan for a small GPU must fit it."""
    voxels = []
    for gib in (0.56, 0.62, 1.0):
        plans = plan(budget=MemoryBudget(gib, "test"), base_features=32)
        stages = [stage_plan(plans, "3d_fullres", stage) for stage in ("training", "pretraining")]
        voxels.append(np.prod(stages[0]["patch_size"]) * stages[0]["batch_size"])
        assert all(stage["predicted_peak_gib"] <= gib for stage in stages)
    assert voxels == sorted(set(voxels))


def test_the_budget_of_nnunets_own_interface_counts(workspace: Workspace) -> None:
    """`plan_experiment_dataset(..., gpu_memory_target_in_gb=...)`."""
    plan_experiment_dataset(LABELLED, DiffSegPlainPlanner, 1.5, overwrite_plans_name="OfNnunet")
    section = json.loads((workspace.preprocessed / LABELLED / "OfNnunet.json").read_text())["diffseg"]
    assert section["memory"]["budget_gib"] == 1.5
    assert section["memory"]["budget_source"] == "nnU-Net's GPU memory target"
    for stages in section["configurations"].values():
        assert stages["training"]["predicted_peak_gib"] <= 1.5


def test_a_budget_too_small_for_any_patch(plan: Plan, workspace: Workspace) -> None:
    with pytest.raises(BadInputError, match=r"3d_fullres does not fit 0.4 GiB.*--gpu-memory 0.\d or more"):
        plan(budget=MemoryBudget(0.4, "test"))
    assert not plans_file(workspace).exists()


def test_cascades_have_no_pretraining_of_their_last_stage(plan: Plan, workspace: Workspace) -> None:
    with larger_cases(workspace):
        plans = plan(budget=MemoryBudget(1.0, "test"), base_features=32)
    assert "3d_cascade_fullres" in plans["configurations"]
    assert "pretraining" in diffseg_section(plans)["configurations"]["3d_lowres"]
    fullres, cascade = (stage_plan(plans, name, "training") for name in ("3d_fullres", "3d_cascade_fullres"))
    # it reads a segmentation too: the same patch takes more, or a smaller one is taken
    assert cascade["predicted_peak_gib"] <= 1.0
    smaller = np.prod(cascade["patch_size"]) < np.prod(fullres["patch_size"])
    assert smaller or cascade["predicted_peak_gib"] > fullres["predicted_peak_gib"]
    configuration = PlansManager(plans).get_configuration("3d_cascade_fullres")
    assert (configuration.patch_size, configuration.batch_size) == (cascade["patch_size"], cascade["batch_size"])
    with pytest.raises(BadInputError, match="has no pretraining stage"):
        stage_plan(plans, "3d_cascade_fullres", "pretraining")
    # a plan for more memory needs no cascade, and leaves none behind
    again = plan()
    assert {"2d", "3d_fullres"} == set(again["configurations"]) == set(diffseg_section(again)["configurations"])


def test_every_planned_configuration_is_explained(plan: Plan, workspace: Workspace) -> None:
    """The reasons found from the fingerprint alone are those by which nnU-Net planned."""
    with larger_cases(workspace):
        plans = plan(budget=MemoryBudget(1.0, "test"), base_features=32)
        fingerprint = json.loads((workspace.preprocessed / LABELLED / "dataset_fingerprint.json").read_text())
    decisions = {(each.scope, each.what): each for each in explain(plans, fingerprint)}
    assert {scope for scope, _ in decisions} == {"data set", *plans["configurations"]}
    for name, stages in diffseg_section(plans)["configurations"].items():
        for stage in ("training", "pretraining"):
            if stage in stages:
                assert decisions[name, f"patch of {stage}, voxels"].value == stages[stage]["patch_size"]
                assert decisions[name, f"batch of {stage}"].value == stages[stage]["batch_size"]
                assert decisions[name, f"memory of {stage}, GiB"].value["peak"] == stages[stage]["predicted_peak_gib"]
    assert decisions["3d_fullres", "target spacing, mm"].why.startswith("median of the 2 cases")
    assert decisions["3d_lowres", "planned"].value is True
    assert decisions["3d_cascade_fullres", "pretraining"].value is None


def test_custom_configurations_are_kept(plan: Plan, workspace: Workspace) -> None:
    plans = plan()
    custom = {"inherits_from": "3d_fullres", "batch_size": 5}
    stale = {**plans["configurations"]["3d_fullres"], "spacing": [9.0, 9.0, 9.0]}
    plans["configurations"] |= {"3d_mine": custom, "3d_lowres": stale, "3d_fullres": stale}
    write_json(plans_file(workspace), plans)
    again = plan()
    assert again["configurations"]["3d_mine"] == custom
    assert "3d_lowres" not in again["configurations"]
    assert again["configurations"]["3d_fullres"]["spacing"] != stale["spacing"]
    manager = PlansManager(str(plans_file(workspace)))
    assert manager.get_configuration("3d_mine").batch_size == 5
    # a plan of our stages is made for standard configurations
    with pytest.raises(BadInputError, match=r"no configuration '3d_mine'.*2d, 3d_fullres"):
        stage_plan(again, "3d_mine", "training")


def test_stock_preprocessing_reads_the_plans(plan: Plan, workspace: Workspace) -> None:
    plan()
    manager = PlansManager(str(plans_file(workspace)))
    configuration = manager.get_configuration("3d_fullres")
    raw = workspace.raw / LABELLED
    data, segmentation, properties = configuration.preprocessor_class(verbose=False).run_case(
        [str(raw / "imagesTr" / "c0_0000.nii.gz")],
        str(raw / "labelsTr" / "c0.nii.gz"),
        manager,
        configuration,
        str(raw / "dataset.json"),
    )
    assert data.shape == segmentation.shape == (1, *SIZE)
    assert set(np.unique(segmentation)) == {0, 1, 2}
    assert set(properties["class_locations"]) == {1, 2}
    # CT normalisation: intensities of the foreground, (140 ± 20) HU, are centred
    assert abs(data[segmentation > 0].mean()) < 0.1


@pytest.mark.parametrize("backbone", PLANNERS)
def test_an_unlabelled_data_set_can_be_planned(plan: Plan, workspace: Workspace, backbone: str) -> None:
    plans = plan(backbone, UNLABELLED)
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    stage = stage_plan(plans, "3d_fullres", "pretraining")
    assert stage["batch_size"] >= 2
    assert diffseg_section(plans)["mirroring"]["allowed_axes"] == [0, 1, 2]
    network = DiffSegPretrainer.build_network_architecture(manager, configuration, 1, 1)
    with torch.no_grad():
        assert network(torch.zeros((1, 1, *stage["patch_size"]))).shape == (1, 1, *stage["patch_size"])


def test_fingerprint_of_an_unlabelled_data_set(workspace: Workspace) -> None:
    """Spacing and shape are those of the files; intensities those of the body, at 40 HU, without the air around it."""
    fingerprint = json.loads((workspace.preprocessed / UNLABELLED / "dataset_fingerprint.json").read_text())
    labelled = json.loads((workspace.preprocessed / LABELLED / "dataset_fingerprint.json").read_text())
    assert fingerprint.keys() == labelled.keys()
    np.testing.assert_allclose(fingerprint["spacings"], [[1.5, 1.2, 1.2]] * 2, rtol=1e-6)
    assert fingerprint["shapes_after_crop"] == [list(SIZE)] * 2
    assert fingerprint["median_relative_size_after_cropping"] == 1
    statistics = fingerprint["foreground_intensity_properties_per_channel"]["0"]
    assert statistics.keys() == labelled["foreground_intensity_properties_per_channel"]["0"].keys()
    images = [
        sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in (workspace.raw / UNLABELLED / "imagesUn").iterdir()
    ]
    body = np.concatenate([image[image > -500] for image in images])
    assert statistics["mean"] == pytest.approx(body.mean(), abs=0.5)
    assert statistics["std"] == pytest.approx(body.std(), rel=0.02)
    assert statistics["median"] == pytest.approx(np.median(body), abs=1)
    assert statistics["percentile_00_5"] == pytest.approx(np.percentile(body, 0.5), abs=2)
    assert statistics["percentile_99_5"] == pytest.approx(np.percentile(body, 99.5), abs=2)
    assert (statistics["min"], statistics["max"]) == (body.min(), body.max())


def test_a_data_set_without_images_is_refused(workspace: Workspace) -> None:
    with pytest.raises(BadInputError, match="has no images"):
        DiffSegFingerprintExtractor(EMPTY, num_processes=1).run()


def test_plans_of_another_planner_are_refused() -> None:
    stock = {"plans_name": "nnUNetPlans", "dataset_name": LABELLED, "experiment_planner_used": "ExperimentPlanner"}
    with pytest.raises(
        BadInputError, match=r"'nnUNetPlans' of Dataset001_Kidneys were made by ExperimentPlanner.*diffseg plan"
    ):
        diffseg_section(stock)
