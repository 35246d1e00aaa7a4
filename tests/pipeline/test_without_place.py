"""Images without direction cosines: what can be pretrained on them, and what is refused before it costs anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tifffile

if TYPE_CHECKING:
    from tests.conftest import CommandLine

pytestmark = pytest.mark.pipeline

NAME, CASES, SIZE = "Dataset001_Cells", 5, 20
LIGHT = ("--backbone", "plain", "--base-features", 4, "--gpu-memory", 1)


@pytest.fixture
def results(diffseg: CommandLine) -> Path:
    """The results' folder of a raw data set of TIFF stacks, as microscopes write them."""
    workspace = diffseg.folder / "diffseg_workspace"
    raw = workspace / "nnUNet_raw" / NAME
    generator = np.random.default_rng(0)
    for part, ending, largest in (("imagesTr", "_0000", 256), ("labelsTr", "", 2)):
        (raw / part).mkdir(parents=True)
        for number in range(CASES):
            voxels = generator.integers(largest, size=(SIZE, SIZE, SIZE), dtype=np.uint8)
            tifffile.imwrite(raw / part / f"case_{number}{ending}.tif", voxels)
    content = {
        "channel_names": {"0": "grey"},
        "labels": {"background": 0, "cell": 1},
        "numTraining": CASES,
        "file_ending": ".tif",
    }
    (raw / "dataset.json").write_text(json.dumps(content))
    return workspace / "nnUNet_results" / NAME


def test_coordinates_are_refused_and_finished_work_stays(diffseg: CommandLine, results: Path) -> None:
    pretrain = ("pretrain", 1, "--iterations", 1)
    lines = [
        ("plan", 1, *LIGHT),
        ("preprocess", 1, "-c", "3d_fullres"),
        (*pretrain, "--coordinates", "none"),
        pretrain,
        (*pretrain, "--no-resume"),
        (*pretrain, "--pool", "unlabeled", "--coordinates", "none"),
        (*pretrain, "--coordinates", "none"),
    ]
    *done, refused, afresh, empty, again = diffseg.in_one_process(lines)
    for finished in done:
        finished.ok()
    for finished in (refused, afresh):
        finished.refused(
            f"{NAME}/case_",
            "no 3D direction cosines, so its voxels have no place in the body",
            "`--coordinates none`",
            "`diffseg plan 1 --coordinates none`",
        )
    empty.refused("pool to pretrain on is empty", "imagesUn")
    assert "finished before, unchanged" in again.ok().out
    assert not list(results.rglob("superseded_*"))


def test_they_are_trained_on_and_said_not_to_be_scored(diffseg: CommandLine, results: Path) -> None:
    train = ("train", 1, "--strategy", "scratch", "--iterations", 1, "--optimizer", "adamw")
    lines = [("plan", 1, *LIGHT), ("preprocess", 1, "-c", "3d_fullres"), train, ("refine", 1, "--strategy", "scratch")]
    *_, trained, refined = diffseg.in_one_process(lines)
    assert "has .tif files, which say no spacing" in trained.ok().out.replace("\n", " ")
    assert len(list(results.glob("DiffSegTrainerScratch__*/fold_0/validation/*.tif"))) == 1
    refined.refused("Whether a refiner helps could not be told", ".tif")
    diffseg("report", 1).ok()
    assert "which say no spacing" in (results / "report.html").read_text()
