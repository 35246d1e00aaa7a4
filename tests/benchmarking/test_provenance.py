"""What a pretraining saw: FLARE22's rule, test cases in the pool, copies of test cases under other names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from diffseg_nnunet.benchmarking.divisions import Division
from diffseg_nnunet.benchmarking.provenance import (
    Origin,
    flare_legality,
    recorded_pool,
    refuse_copies,
    refuse_seen,
    seen_together,
)
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.starting import learnt_in_training
from diffseg_nnunet.workspace import Workspace

FLARE, POOL, BTCV = (
    Origin("Dataset001_FLARE22", "flare22"),
    Origin("Dataset002_Pool", "flare22"),
    Origin("Dataset003_BTCV", "btcv"),
)
ORIGINS = {origin.name: origin for origin in (FLARE, POOL, BTCV)}


def test_flare_on_its_own_scans_is_legal() -> None:
    found = flare_legality(FLARE, {FLARE.name: ["a", "b"], POOL.name: ["c"]}, ORIGINS)
    assert found.legal
    assert "3 of FLARE22's own scans" in found.reason


def test_flare_without_pretraining_is_legal() -> None:
    assert flare_legality(FLARE, {}, ORIGINS).legal


def test_other_scans_in_the_pretraining_are_not() -> None:
    found = flare_legality(FLARE, {FLARE.name: ["a"], BTCV.name: ["b", "c"]}, ORIGINS)
    assert not found.legal
    assert "Dataset003_BTCV, but was converted as 'btcv' (2 case(s))" in found.reason
    assert "not allowed to use any additional data" in found.reason


def test_scans_of_unknown_origin_are_not() -> None:
    assert not flare_legality(FLARE, {"Dataset009_Gone": ["a"]}, ORIGINS).legal
    unknown = Origin(POOL.name, None)
    assert not flare_legality(FLARE, {POOL.name: ["a"]}, {FLARE.name: FLARE, POOL.name: unknown}).legal


@pytest.mark.parametrize("checkpoint", [{}, {"pool": {}}, {"pool": None}])
def test_a_checkpoint_that_does_not_say_is_not(checkpoint: dict) -> None:
    """As those of nnU-Net, of other projects, and of fine-tuning."""
    pools = [{FLARE.name: ["a"]}, recorded_pool({"network_weights": {}, **checkpoint})]
    found = flare_legality(FLARE, seen_together(pools), ORIGINS)
    assert not found.legal
    assert "not recorded" in found.reason


def test_what_several_pretrainings_saw_is_put_together() -> None:
    pools = [recorded_pool({"pool": {"A": ("a", "b"), "B": ["c"]}}), recorded_pool({"pool": {"A": ["b", "d"]}})]
    assert seen_together(pools) == {"A": {"a", "b", "d"}, "B": {"c"}}
    assert seen_together([]) == {}


def test_other_labels_are_not() -> None:
    assert "is not FLARE22's data" in flare_legality(BTCV, {FLARE.name: ["a"]}, ORIGINS).reason
    made = Origin(FLARE.name, "flare22", pseudo_labelled=("p1", "p2"))
    found = flare_legality(made, {}, {made.name: made})
    assert not found.legal
    assert "2 training case(s) have labels that another's model made" in found.reason


def test_a_pretraining_that_saw_test_cases_is_refused() -> None:
    division, checkpoint = Division(("a",), ("b", "c")), {"pool": {"Dataset001_A": ["a", "c"], "Dataset002_B": ["b"]}}
    with pytest.raises(BadInputError, match=r"pretrained on the images of 1 test case\(s\): c"):
        refuse_seen(checkpoint, "Dataset001_A", division, "x.pth")
    refuse_seen(checkpoint, "Dataset003_C", division, "x.pth")


def test_a_training_on_all_cases_has_learnt_all_labels(named_dataset: Callable[..., Project]) -> None:
    project = named_dataset(["a", "b", "c"])
    checkpoint = {"init_args": {"plans": {"dataset_name": project.name}, "fold": "all"}}
    assert learnt_in_training(checkpoint, project) == {"a", "b", "c"}


def write_dataset(workspace: Workspace, name: str, images: dict[str, int], labelled: bool = True) -> Project:
    """A data set of noise; `images` is case -> seed of its voxels."""
    folder = workspace.raw / name
    for case, seed in images.items():
        voxels = np.random.default_rng(seed).integers(-100, 100, (4, 5, 6), np.int16)
        files = {"imagesTr" if labelled else "imagesUn": (f"{case}_0000", voxels)}
        if labelled:
            files["labelsTr"] = (case, (voxels > 0).astype(np.uint8))
        for part, (stem, array) in files.items():
            (folder / part).mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / part / f"{stem}.nii.gz"))
    labels = {"background": 0, "liver": 1} if labelled else {"background": 0}
    content = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 0, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))
    return Project(workspace, name)


def test_copies_of_test_cases_are_refused(tmp_path: Path) -> None:
    workspace = Workspace.locate(tmp_path)
    own = write_dataset(workspace, "Dataset001_A", {"a": 1, "b": 2, "c": 3, "d": 1})
    clean = write_dataset(workspace, "Dataset002_B", {"x": 7}, labelled=False)
    copies = write_dataset(workspace, "Dataset003_C", {"y": 8, "z": 3}, labelled=False)
    refuse_copies(own, [clean], [Division(("a", "b", "d"), ("c",))])
    with pytest.raises(BadInputError, match="c is Dataset003_C/z"):
        refuse_copies(own, [clean, copies], [Division(("a", "b", "d"), ("c",))])
    refuse_copies(own, [copies], [Division(("a", "b", "d"), ("c",))], {copies.name: ["y"]})
    with pytest.raises(BadInputError, match="c is Dataset003_C/z"):
        refuse_copies(own, [copies], [Division(("a", "b", "d"), ("c",))], {copies.name: ["y", "z"]})
    with pytest.raises(BadInputError, match="a is d"):
        refuse_copies(own, [clean], [Division(("b", "c", "d"), ("a",))])


def test_origins_are_what_conversions_recorded(tmp_path: Path) -> None:
    project = write_dataset(Workspace.locate(tmp_path), "Dataset001_A", {"a": 1})
    assert Origin.of(project) == Origin("Dataset001_A", None)
    (project.raw().folder / "conversion.json").write_text('{"format": "flare22"}')
    dataset_json = project.raw().dataset_json | {"pseudo_labelled": {"source": "s", "cases": ["p"]}}
    (project.raw().folder / "dataset.json").write_text(json.dumps(dataset_json))
    assert Origin.of(project) == Origin("Dataset001_A", "flare22", ("p",))
