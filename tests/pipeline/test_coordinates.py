"""``diffseg coordinates`` on the phantom, by a pretraining of two iterations: the files are right, the map is poor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from diffseg_nnunet.phantom import write_phantom

if TYPE_CHECKING:
    from tests.conftest import CommandLine, Finished

pytestmark = pytest.mark.pipeline

LIGHT = ("--backbone", "plain", "--base-features", 8, "--gpu-memory", 1, "--spacing", 14, 14, 14)
WITH = ("coordinates", "-d", 1, "-f", "all", "--device", "cpu")


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory, command_line: Callable[[Path], CommandLine]
) -> tuple[Path, dict[str, Finished]]:
    """A folder with the scans "scans" and their maps "maps", and what each command said."""
    diffseg = command_line(tmp_path_factory.mktemp("coordinates"))
    folder = diffseg.folder
    write_phantom(folder / "phantom", labelled=2, unlabelled=0, test=2)
    shutil.copytree(folder / "phantom" / "test_images", folder / "scans")
    # the same two, one of them another image under its old name
    shutil.copytree(folder / "scans", folder / "changed")
    shutil.copy(folder / "scans" / "phantom_003.nii.gz", folder / "changed" / "phantom_002.nii.gz")
    whole = min((folder / "scans").iterdir())
    (folder / "scans" / "truncated.nii.gz").write_bytes(whole.read_bytes()[:5000])
    phantom = folder / "phantom"
    labels = ("--labels", phantom / "labels", "--label-names", phantom / "labels.json")
    images = ("--images", phantom / "images", *labels, "--modality", "CT")
    pretrain = ("pretrain", 1, "-f", "all", "--workers", 0, "--device", "cpu")
    missing = folder / "without.pth"
    results = folder / "diffseg_workspace" / "nnUNet_results" / "Dataset001_Scans"
    own = (
        "--checkpoint",
        results / "DiffSegPretrainer__DiffSegPlans__3d_fullres" / "fold_all" / "checkpoint_final.pth",
    )
    lines = {
        "convert": ("convert", "folder", *images, "--id", 1, "--name", "Scans"),
        "plan": ("plan", 1, *LIGHT),
        "preprocess": ("preprocess", 1, "-c", "3d_fullres"),
        "pretrain": (*pretrain, "--iterations", 2),
        "first": (*WITH, "-i", "scans", "-o", "maps"),
        "again": (*WITH, "-i", "scans", "-o", "maps", "--landmarks"),
        "before": (*WITH, "-i", "phantom/test_images", "-o", "redone"),
        "changed": (*WITH, "-i", "changed", "-o", "redone"),
        "same folder": (*WITH, "-i", "scans", "-o", "scans"),
        "no folder": (*WITH, "-i", "gone", "-o", "maps"),
        "no fold": ("coordinates", "-d", 1, "-f", 3, "-i", "scans", "-o", "maps"),
        "other plan": (*WITH[:3], "-c", "2d", *WITH[3:], "-i", "scans", "-o", "maps", "--landmarks", *own),
        "no checkpoint": (*WITH, "-i", "scans", "-o", "maps", "--checkpoint", missing),
        "plan without": ("plan", 1, *LIGHT, "--coordinates", "none"),
        "preprocess without": ("preprocess", 1, "-c", "3d_fullres"),
        "pretrain without": (*pretrain, "--iterations", 1),
        "without": (*WITH, "-i", "scans", "-o", "maps"),
    }
    return folder, dict(zip(lines, diffseg.in_one_process(list(lines.values())), strict=True))


def test_maps_lie_on_the_grids_of_the_scans(project: tuple[Path, dict[str, Finished]]) -> None:
    folder, said = project
    for stage in ("convert", "plan", "preprocess", "pretrain"):
        said[stage].ok()
    maps = sorted(path.name for path in (folder / "maps").glob("*.nii.gz"))
    assert maps == ["phantom_002.nii.gz", "phantom_003.nii.gz"]
    for name in maps:
        scan, result = (sitk.ReadImage(str(folder / place / name)) for place in ("scans", "maps"))
        assert result.GetPixelID() == sitk.sitkVectorFloat32
        assert result.GetNumberOfComponentsPerPixel() == 3
        assert result.GetSize() == scan.GetSize()
        for geometry in ("GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(result, geometry)(), getattr(scan, geometry)(), atol=1e-4)
        values = sitk.GetArrayViewFromImage(result)
        assert values.std(axis=(0, 1, 2)).min() > 0


def test_a_bad_case_is_set_aside(project: tuple[Path, dict[str, Finished]]) -> None:
    _, said = project
    for run in ("first", "again"):
        assert said[run].code == 2
        assert "truncated was set aside" in said[run].out
        assert "truncated" in said[run].out.split("was set aside")[1]


def test_ranges_are_reported(project: tuple[Path, dict[str, Finished]]) -> None:
    folder, said = project
    report = json.loads((folder / "maps" / "body_ranges.json").read_text())
    assert list(report["cases"]) == ["phantom_002", "phantom_003"]
    assert report["percentiles"] == [1, 99]
    assert report["checkpoint"]["path"].endswith("fold_all/checkpoint_final.pth")
    for case, entry in report["cases"].items():
        for direction in ("left", "posterior", "superior"):
            one = entry[direction]
            assert one["low_mm"] <= one["median_mm"] <= one["high_mm"]
            assert one["extent_mm"] == pytest.approx(one["high_mm"] - one["low_mm"])
            assert np.isfinite([one["slope"], one["residual_mm"]]).all()
        assert f"{case}: superior" in said["first"].out
    table = pd.read_csv(folder / "maps" / "body_ranges.csv").set_index("case")
    assert list(table.index) == list(report["cases"])
    assert table.loc["phantom_002", "superior_high_mm"] == report["cases"]["phantom_002"]["superior"]["high_mm"]


def test_finished_cases_are_left_alone(project: tuple[Path, dict[str, Finished]]) -> None:
    assert "superior" not in project[1]["again"].out


def test_a_changed_image_is_predicted_again(project: tuple[Path, dict[str, Finished]]) -> None:
    folder, said = project
    said["before"].ok()
    assert "phantom_002: superior" in said["changed"].ok().out
    assert "phantom_003: superior" not in said["changed"].out
    one, other = (sitk.ReadImage(str(folder / "redone" / f"phantom_00{number}.nii.gz")) for number in (2, 3))
    np.testing.assert_array_equal(sitk.GetArrayViewFromImage(one), sitk.GetArrayViewFromImage(other))


def test_structures_within_the_range_are_named(project: tuple[Path, dict[str, Finished]]) -> None:
    folder, said = project
    landmarks = json.loads((folder / "maps" / "landmarks.json").read_text())
    assert landmarks["cases"] == ["phantom_000", "phantom_001"]
    structures = landmarks["structures"]
    assert {"liver", "left_kidney", "right_kidney"} <= structures.keys()
    assert "lungs" not in structures  # every scan cuts them
    assert structures["liver"]["scans"] == 2
    report = json.loads((folder / "maps" / "body_ranges.json").read_text())["cases"]
    table = pd.read_csv(folder / "maps" / "body_ranges.csv", keep_default_na=False).set_index("case")
    for case, entry in report.items():
        low, high = entry["superior"]["low_mm"], entry["superior"]["high_mm"]
        within = {name for name, landmark in structures.items() if low <= landmark["superior_mm"] <= high}
        assert set(entry["covers"]) == within
        assert table.loc[case, "covers"] == "; ".join(entry["covers"])
        assert f"{case} covers: {', '.join(entry['covers']) or 'none'}" in said["again"].out


def test_wrong_use_is_refused(project: tuple[Path, dict[str, Finished]]) -> None:
    folder, said = project
    said["same folder"].refused("scans holds the images", "-o")
    said["no folder"].refused("There is no folder gone", "-i")
    said["no fold"].refused("no pretrained network for fold 3", "there: fold_all", "diffseg pretrain 1", "--checkpoint")
    said["other plan"].refused("with another plan than 2d of Dataset001_Scans", "Leave --landmarks out")
    said["no checkpoint"].refused(f"There is no checkpoint {folder / 'without.pth'}")


def test_a_network_without_coordinates_is_refused(project: tuple[Path, dict[str, Finished]]) -> None:
    said = project[1]
    said["pretrain without"].ok()
    said["without"].refused("pretrained with `--coordinates none`", "Pretrain with coordinates", "--checkpoint")
