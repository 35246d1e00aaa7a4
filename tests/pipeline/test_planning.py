"""The stage *plan*: what it refuses, what it honours, and that it does nothing twice."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from diffseg_nnunet import registry
from diffseg_nnunet.cli.app import run
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline.planning import PlanRequest, plan
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.planning.decisions import shown
from diffseg_nnunet.workspace import Workspace
from tests.process_state import environment_restored


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Four labelled cases with left and right, and a data set of three unlabelled ones."""
    folder = tmp_path_factory.mktemp("planners")
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
    with environment_restored():
        workspace = Workspace(*(folder / name for name in ("raw", "preprocessed", "results"))).activate()
        converter = registry.load("converters", "folder")()
        labelled = converter.plan(source / "images", source / "labels", source / "labels.json", "CT", "Kidneys")
        pool = converter.plan(source / "pool", None, None, "CT", "Pool")
        for dataset_id, conversion in ((1, labelled), (2, pool)):
            conversion.execute(dataset_id=dataset_id, workspace=workspace, workers=1)
        yield Project.open(workspace, 1)


def light(**changes: object) -> PlanRequest:
    return PlanRequest(**{"gpu_memory": "1", "base_features": 8, **changes})


def test_a_target_spacing_is_honoured(project: Project) -> None:
    plans = plan(project, light(backbone="plain", spacing=(6.0, 3.0, 3.0)))
    assert sorted(plans["configurations"]["3d_fullres"]["spacing"]) == [3.0, 3.0, 6.0]


@pytest.mark.parametrize("spacing", [(0.0, 1.0, 1.0), (1.0, -2.0, 1.0), (1.0, 1.0, math.nan), (math.inf, 1.0, 1.0)])
def test_a_spacing_that_is_none(spacing: tuple[float, float, float]) -> None:
    with pytest.raises(BadInputError, match=r"--spacing .* has an axis that is not a positive length.*Z Y X"):
        light(spacing=spacing)


def test_a_data_set_cannot_be_its_own_pool(project: Project) -> None:
    with pytest.raises(BadInputError, match="cannot be its own unlabelled pool"):
        plan(project, light(unlabelled=(1,)))


@pytest.mark.parametrize("channels", [["MRI"], ["CT", "PET"], []])
def test_a_pool_of_other_channels_is_refused(project: Project, channels: list[str]) -> None:
    own = project.workspace.raw / project.name
    other = own.with_name("Dataset003_Other")
    shutil.copytree(own.with_name("Dataset002_Pool"), other, dirs_exist_ok=True)
    content = json.loads((other / "dataset.json").read_text())
    content["channel_names"] = {str(number): name for number, name in enumerate(channels)}
    (other / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(BadInputError) as refused:
        plan(project, light(unlabelled=(3,)))
    named = f"Dataset003_Other has the channel(s) {', '.join(channels)}, {project.name} has CT"
    assert str(refused.value).startswith(f"{named}: one network cannot read both.")
    assert "--unlabeled" in str(refused.value)


def test_unchanged_plans_are_not_made_again(project: Project) -> None:
    plan(project, light(backbone="plain"))
    stamp = project.plans_path.stat().st_mtime_ns
    plan(project, light(backbone="plain"))
    assert project.plans_path.stat().st_mtime_ns == stamp


def test_a_plan_is_explained_and_not_made_again(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    options = "--backbone plain --base-features 12 --gpu-memory 1 --spacing 6 3 3 --coordinates none"
    assert run(["plan", "1", "--json", *options.split()]) == 0
    planned, stamp = capsys.readouterr(), project.plans_path.stat().st_mtime_ns
    assert "planning for 1 GiB (requested)" in planned.err
    # the options it was made with need no repetition
    assert run(["plan", "1", "--json"]) == 0
    machines = capsys.readouterr()
    assert run(["plan", "1", "--explain"]) == 0
    people = capsys.readouterr()
    assert project.plans_path.stat().st_mtime_ns == stamp
    assert machines.out == planned.out
    assert machines.err == people.err == ""
    explained = json.loads(machines.out)
    assert (explained["dataset"], explained["plans"]) == (project.name, str(project.plans_path))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in people.out.splitlines() if "│" in line]
    assert rows == [[d["scope"], d["what"], shown(d["value"]), d["why"]] for d in explained["decisions"]]
    values = {(d["scope"], d["what"]): d["value"] for d in explained["decisions"]}
    training = project.plans()["diffseg"]["configurations"]["3d_fullres"]["training"]
    assert values["3d_fullres", "patch of training, voxels"] == training["patch_size"]
    assert values["3d_fullres", "batch of training"] == training["batch_size"]
    assert values["3d_fullres", "features"][:2] == [12, 24]
    assert values["data set", "mirrored axes"] == [0, 1]
    assert values["data set", "coordinates"] == "none"
    assert "asked for (--spacing)" in people.out


def test_a_refusal_leaves_standard_output_empty(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "1", "--json", "--gpu-memory", "nothing"]) == 2
    finished = capsys.readouterr()
    assert finished.out == ""
    assert "'nothing' is not a memory budget" in finished.err
