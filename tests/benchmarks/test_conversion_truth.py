"""The comparison finds what it is made to find."""

from __future__ import annotations

import json
from pathlib import Path

import conversion_truth
import nibabel as nib
import numpy as np
import pytest

VALUES = {"background": 0, "liver": 1, "spleen": 2}
AFFINE = np.array([[0, -2.0, 0, 5], [3.0, 0, 0, -7], [0, 0, 1.5, 1], [0, 0, 0, 1]])


@pytest.fixture
def case(tmp_path: Path) -> tuple[Path, conversion_truth.Pair]:
    """A data set of one case that is written truly, its labels with other values than in the source."""
    folder = tmp_path / "written"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    image = rng.integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
    label = rng.integers(0, 3, image.shape).astype(np.uint8)
    save(image, tmp_path / "image.nii.gz")
    save(label, tmp_path / "label.nii.gz")
    save(image, folder / "imagesTr/a_0000.nii.gz")
    save(np.array([0, 2, 1], np.uint8)[label], folder / "labelsTr/a.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "spleen": 1, "liver": 2}}))
    return folder, conversion_truth.Pair("a", "training", tmp_path / "image.nii.gz", tmp_path / "label.nii.gz")


def save(voxels: np.ndarray, path: Path, affine: np.ndarray = AFFINE) -> None:
    nib.save(nib.Nifti1Image(voxels, affine), path)


def voxels_of(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj).copy()


def test_a_true_conversion(case: tuple[Path, conversion_truth.Pair]) -> None:
    folder, pair = case
    difference = conversion_truth.compare(folder, pair, VALUES)
    assert (difference.voxels, difference.image, difference.label, difference.grid) == (120, 0, 0, 0)
    assert difference.anew == 1
    assert conversion_truth.is_true(difference)
    assert conversion_truth.strays(folder, [pair]) == []


def test_one_voxel_of_the_image(case: tuple[Path, conversion_truth.Pair]) -> None:
    folder, pair = case
    path = folder / "imagesTr/a_0000.nii.gz"
    voxels = voxels_of(path)
    voxels[1, 2, 3] += 1
    save(voxels, path)
    difference = conversion_truth.compare(folder, pair, VALUES)
    assert difference.image == 1
    assert not conversion_truth.is_true(difference)


def test_structures_that_were_confused(case: tuple[Path, conversion_truth.Pair]) -> None:
    folder, pair = case
    # as if the source's values had been kept
    save(voxels_of(pair.label), folder / "labelsTr/a.nii.gz")
    difference = conversion_truth.compare(folder, pair, VALUES)
    assert difference.label == np.count_nonzero(voxels_of(pair.label))


def test_a_place_that_moved_and_a_flip(case: tuple[Path, conversion_truth.Pair]) -> None:
    folder, pair = case
    path = folder / "imagesTr/a_0000.nii.gz"
    moved = AFFINE.copy()
    moved[2, 3] += 0.5
    save(voxels_of(path), path, moved)
    difference = conversion_truth.compare(folder, pair, VALUES)
    assert difference.place == pytest.approx(0.5, abs=1e-4)
    assert difference.grid == 1
    save(voxels_of(path)[::-1], path)
    assert not conversion_truth.is_true(conversion_truth.compare(folder, pair, VALUES))


def test_files_missing_or_too_many(case: tuple[Path, conversion_truth.Pair]) -> None:
    folder, pair = case
    (folder / "labelsTr/a.nii.gz").rename(folder / "labelsTr/b.nii.gz")
    assert conversion_truth.strays(folder, [pair]) == ["labelsTr/a.nii.gz", "labelsTr/b.nii.gz"]
