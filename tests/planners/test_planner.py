"""Plans are nnU-Net's own, with one section of ours; checked with nnU-Net's reader of plans."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from diffseg_nnunet import registry
from diffseg_nnunet.coordinates.head import CoordinateSettings
from diffseg_nnunet.diffusion.gaussian import DiffusionSettings
from diffseg_nnunet.pipeline.planning import PlanRequest, plan
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.workspace import Workspace

SECTION_KEYS = {
    "version",
    "backbone",
    "base_features",
    "memory",
    "mirroring",
    "pool",
    "diffusion",
    "coordinates",
    "configurations",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Four labelled cases with left and right, and a data set of three unlabelled ones."""
    folder = tmp_path_factory.mktemp("planners")
    environment = dict(os.environ)
    source, rng = folder / "source", np.random.default_rng(0)
    for name in ("images", "labels", "pool"):
        (source / name).mkdir(parents=True)
    for number in range(7):
        image = sitk.GetImageFromArray(rng.normal(0, 100, (24, 40, 36)).astype(np.int16))
        image.SetSpacing((2.0, 2.0, 5.0))
        sitk.WriteImage(image, source / ("images" if number < 4 else "pool") / f"case_{number}.nii.gz")
        if number < 4:
            label = sitk.GetImageFromArray((np.indices((24, 40, 36))[2] // 12).astype(np.uint8))
            label.CopyInformation(image)
            sitk.WriteImage(label, source / "labels" / f"case_{number}.nii.gz")
    (source / "labels.json").write_text('{"background": 0, "kidney_right": 1, "kidney_left": 2}')
    workspace = Workspace(*(folder / name for name in ("raw", "preprocessed", "results"))).activate()
    converter = registry.load("converters", "folder")()
    labelled = converter.plan(source / "images", source / "labels", source / "labels.json", "CT", "Kidneys")
    pool = converter.plan(source / "pool", None, None, "CT", "Pool")
    for dataset_id, conversion in ((1, labelled), (2, pool)):
        conversion.execute(dataset_id=dataset_id, workspace=workspace, workers=1)
    yield Project.open(workspace, 1)
    os.environ.clear()
    os.environ.update(environment)


def light(**changes: object) -> PlanRequest:
    return PlanRequest(**{"gpu_memory": "1", "base_features": 8, **changes})


@pytest.mark.parametrize("backbone", ["plain", "resenc"])
def test_nnunet_reads_the_plans_and_builds_the_network(project: Project, backbone: str) -> None:
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plan(project, light(backbone=backbone))
    manager = PlansManager(str(project.plans_path))
    assert manager.plans_name == "DiffSegPlans"
    for name, dimensions in (("2d", 2), ("3d_fullres", 3)):
        configuration = manager.get_configuration(name)
        assert len(configuration.patch_size) == dimensions
        network = get_network_from_plans(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            1,
            3,
        )
        assert network.encoder.output_channels[0] == 8


def test_the_section_is_complete(project: Project) -> None:
    section = plan(project, light(backbone="plain", unlabelled=(2,)))["diffseg"]
    assert set(section) == SECTION_KEYS
    assert section["backbone"] == "plain"
    assert section["base_features"] == 8
    assert section["memory"]["budget_gib"] == 1.0
    assert section["pool"]["unlabelled_datasets"] == ["Dataset002_Pool"]
    assert DiffusionSettings(**section["diffusion"]) == DiffusionSettings()
    assert CoordinateSettings(**section["coordinates"]) == CoordinateSettings()


def test_both_stages_fit_one_topology_and_pretraining_reads_pairs(project: Project) -> None:
    plans = plan(project, light(backbone="plain"))
    for name, stages in plans["diffseg"]["configurations"].items():
        assert set(stages) == {"training", "pretraining"}
        training = stages["training"]
        assert training["patch_size"] == plans["configurations"][name]["patch_size"]
        assert training["batch_size"] == plans["configurations"][name]["batch_size"]
        strides = np.prod(plans["configurations"][name]["architecture"]["arch_kwargs"]["strides"], axis=0)
        for stage in stages.values():
            assert all(size % stride == 0 for size, stride in zip(stage["patch_size"], strides, strict=True))
            assert stage["predicted_peak_gib"] > 0
        assert stages["pretraining"]["batch_size"] % 2 == 0


def test_left_and_right_are_not_mirrored_wherever_the_transposition_puts_them(project: Project) -> None:
    plans = plan(project, light(backbone="plain"))
    mirroring = plans["diffseg"]["mirroring"]
    assert mirroring["pairs"] == [["kidney_left", "kidney_right"]]
    # the array is z, y, x; x runs left-right
    axis = plans["transpose_forward"].index(2)
    assert mirroring["left_right_axis"] == axis
    assert mirroring["allowed_axes"] == [a for a in range(3) if a != axis]


def test_a_target_spacing_is_honoured(project: Project) -> None:
    plans = plan(project, light(backbone="plain", spacing=(6.0, 3.0, 3.0)))
    assert sorted(plans["configurations"]["3d_fullres"]["spacing"]) == [3.0, 3.0, 6.0]


def test_custom_configurations_are_kept_and_stale_standard_ones_dropped(project: Project) -> None:
    plans = plan(project, light(backbone="plain"))
    edited = json.loads(project.plans_path.read_text())
    edited["configurations"]["mine"] = {"inherits_from": "3d_fullres", "batch_size": 4}
    edited["configurations"]["3d_lowres"] = edited["configurations"]["3d_fullres"]
    project.plans_path.write_text(json.dumps(edited))
    again = plan(project, light(backbone="plain", base_features=16))
    assert "3d_lowres" not in plans["configurations"]
    assert set(again["configurations"]) == {"mine", "2d", "3d_fullres"}


def test_an_unlabelled_data_set_can_be_planned(project: Project) -> None:
    pool = Project.open(project.workspace, 2)
    plans = plan(pool, light(backbone="plain"))
    assert set(plans["configurations"]) >= {"2d", "3d_fullres"}
    fingerprint = json.loads((Path(pool.preprocessed) / "dataset_fingerprint.json").read_text())
    intensities = fingerprint["foreground_intensity_properties_per_channel"]["0"]
    assert abs(intensities["mean"]) < 5  # the voxels are drawn around 0 with a spread of 100
    assert 90 < intensities["std"] < 110
    assert len(fingerprint["spacings"]) == 3


def test_a_data_set_cannot_be_its_own_pool(project: Project) -> None:
    from diffseg_nnunet.errors import BadInputError

    with pytest.raises(BadInputError, match="cannot be its own unlabelled pool"):
        plan(project, light(unlabelled=(1,)))


def test_unchanged_plans_are_not_made_again(project: Project) -> None:
    plan(project, light(backbone="plain"))
    stamp = project.plans_path.stat().st_mtime_ns
    plan(project, light(backbone="plain"))
    assert project.plans_path.stat().st_mtime_ns == stamp
