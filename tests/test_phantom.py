"""The synthetic CT is what the demo and the other tests rely on: labels, geometry, and what makes it hard."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import label as connected_components

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.phantom import LABELS, PhantomSettings, phantom_case, write_phantom

SEEDS = range(12)


@cache
def case(seed: int) -> tuple[sitk.Image, sitk.Image]:
    return phantom_case(seed)


def arrays(seed: int) -> tuple[np.ndarray, np.ndarray]:
    image, label = case(seed)
    return sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(label)


def centre_mm(seed: int, name: str) -> np.ndarray:
    """Centre of a structure in patient coordinates (left, posterior, superior), through SimpleITK."""
    image, label = case(seed)
    z, y, x = np.argwhere(sitk.GetArrayFromImage(label) == LABELS[name]).mean(axis=0)
    return np.array(image.TransformContinuousIndexToPhysicalPoint((x, y, z)))


def test_same_seed_same_case() -> None:
    first, again = phantom_case(3), phantom_case(3)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(sitk.GetArrayViewFromImage(one), sitk.GetArrayViewFromImage(other))
        assert one.GetSpacing() == other.GetSpacing()
        assert one.GetOrigin() == other.GetOrigin()
        assert one.GetDirection() == other.GetDirection()


def test_other_seed_other_case() -> None:
    assert len({case(seed)[0].GetSpacing() for seed in SEEDS}) == len(SEEDS)
    assert len({case(seed)[0].GetOrigin() for seed in SEEDS}) == len(SEEDS)


@pytest.mark.parametrize("seed", SEEDS)
def test_types_and_grid(seed: int) -> None:
    image, label = case(seed)
    assert image.GetPixelID() == sitk.sitkInt16
    assert label.GetPixelID() == sitk.sitkUInt8
    assert all(40 <= voxels <= 56 for voxels in image.GetSize())
    assert all(5 <= spacing <= 8 for spacing in image.GetSpacing())
    assert image.GetSize() == label.GetSize()
    assert image.GetSpacing() == label.GetSpacing()
    assert image.GetOrigin() == label.GetOrigin()
    assert image.GetDirection() == label.GetDirection()


@pytest.mark.parametrize("seed", SEEDS)
def test_all_structures_are_large_enough_to_learn(seed: int) -> None:
    _, labels = arrays(seed)
    counts = np.bincount(labels.ravel(), minlength=len(LABELS))
    assert len(counts) == len(LABELS)
    assert counts.min() >= 60
    # the aorta is at least two voxels wide, to the left and to the back, in most of its slices
    slices = [labels[z] == LABELS["aorta"] for z in range(len(labels))]
    widths = [min(found.any(axis=0).sum(), found.any(axis=1).sum()) for found in slices if found.any()]
    assert np.median(widths) >= 2
    for kidney in ("left_kidney", "right_kidney"):
        assert connected_components(labels == LABELS[kidney])[1] == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_anatomy_in_patient_coordinates(seed: int) -> None:
    """x grows to the patient's left, y to the back, z to the head."""
    spine = centre_mm(seed, "spine")
    assert centre_mm(seed, "liver")[0] < spine[0] - 30
    assert centre_mm(seed, "spleen")[0] > spine[0] + 30
    assert centre_mm(seed, "left_kidney")[0] > spine[0] + 30
    assert centre_mm(seed, "right_kidney")[0] < spine[0] - 30
    assert centre_mm(seed, "aorta")[1] < spine[1]
    assert centre_mm(seed, "lungs")[2] > centre_mm(seed, "liver")[2] > centre_mm(seed, "right_kidney")[2]


def test_brightness_does_not_tell_the_kidneys_apart() -> None:
    differences = []
    for seed in SEEDS:
        image, labels = arrays(seed)
        left, right = (image[labels == LABELS[name]].mean() for name in ("left_kidney", "right_kidney"))
        assert left == pytest.approx(right, abs=12)
        differences.append(left - right)
    assert abs(np.mean(differences)) < 4


def test_size_does_not_tell_the_kidneys_apart() -> None:
    sizes = np.array([np.bincount(arrays(seed)[1].ravel(), minlength=8)[5:7] for seed in SEEDS], dtype=float)
    ratio = np.log(sizes[:, 0] / sizes[:, 1])
    # neither side is always the larger one, and the mean is zero within three standard errors
    assert ratio.min() < 0 < ratio.max()
    assert abs(ratio.mean()) < 3 * ratio.std(ddof=1) / np.sqrt(len(ratio))


def test_looks_like_ct() -> None:
    for seed in SEEDS:
        image, labels = arrays(seed)
        mean = {name: image[labels == number].mean() for name, number in LABELS.items()}
        assert mean["lungs"] < -600
        assert 60 < mean["liver"] < 140
        assert mean["spine"] > 150
        assert np.median(image[:, 0, 0]) == pytest.approx(-1000, abs=20)
        # noise: neighbouring voxels in air differ
        assert image[:, 0, :].std() > 5


def test_field_of_view_and_direction_vary() -> None:
    below = [centre_mm(seed, "left_kidney")[2] - case(seed)[0].GetOrigin()[2] for seed in SEEDS]
    assert np.ptp(below) > 20
    tilted = [not np.array_equal(case(seed)[0].GetDirection(), np.eye(3).ravel()) for seed in range(12)]
    assert 0 < sum(tilted) < len(tilted) / 2


def test_settings_are_used() -> None:
    image, _ = phantom_case(0, PhantomSettings(noise_hu=(0.0, 0.0), voxels=(40, 44), tilt_share=0.0))
    assert max(image.GetSize()) <= 44
    assert sitk.GetArrayFromImage(image)[:, 0, 0].std() < 1
    assert image.GetDirection() == tuple(np.eye(3).ravel())


def test_write_phantom(tmp_path: Path) -> None:
    write_phantom(tmp_path / "phantom", labelled=2, unlabelled=1, test=1, seed=5)
    files = {path.name: sorted(file.name for file in path.iterdir()) for path in (tmp_path / "phantom").glob("*/")}
    assert files["images"] == files["labels"] == ["phantom_000.nii.gz", "phantom_001.nii.gz"]
    assert files["unlabelled_images"] == ["phantom_002.nii.gz"]
    assert files["test_images"] == files["test_labels"] == ["phantom_003.nii.gz"]
    assert json.loads((tmp_path / "phantom" / "labels.json").read_text()) == LABELS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["phantom"]


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    """ITK refuses direction cosines that are not orthonormal after NIfTI's rounding."""
    for seed in SEEDS:
        image, _ = case(seed)
        sitk.WriteImage(image, tmp_path / "image.nii.gz")
        again = sitk.ReadImage(tmp_path / "image.nii.gz")
        np.testing.assert_array_equal(sitk.GetArrayViewFromImage(again), sitk.GetArrayViewFromImage(image))
        np.testing.assert_allclose(again.GetDirection(), image.GetDirection(), atol=1e-5)
        np.testing.assert_allclose(again.GetOrigin(), image.GetOrigin(), atol=1e-3)


def test_seeds_give_other_patients(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_phantom(tmp_path / str(seed), labelled=1, unlabelled=0, test=0, seed=seed)
    one, other = (sitk.ReadImage(tmp_path / str(seed) / "images" / "phantom_000.nii.gz") for seed in (0, 1))
    assert one.GetOrigin() != other.GetOrigin()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInputError, match="holds something already"):
        write_phantom(tmp_path, labelled=1, unlabelled=0, test=0)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_phantom(tmp_path / "empty", labelled=1, unlabelled=0, test=0)
    assert (tmp_path / "empty" / "labels.json").is_file()


def test_negative_numbers(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="negative"):
        write_phantom(tmp_path / "phantom", labelled=-1)
