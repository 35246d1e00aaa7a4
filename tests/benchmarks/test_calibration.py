"""Calibration against MONAI, enumeration and closed forms."""

from __future__ import annotations

from pathlib import Path

import calibration
import numpy as np
import pytest
import SimpleITK as sitk
import torch


def test_calibration_error_is_monais():
    binning = pytest.importorskip("monai.metrics.calibration", reason="MONAI 1.6 has it").calibration_binning
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.2, 1, 5000)
    correct = generator.uniform(size=5000) < confidence**2
    of_bins = binning(
        torch.from_numpy(confidence)[None, None], torch.from_numpy(correct)[None, None].float(), calibration.BINS
    )
    mean_p, mean_gt, counts = (each[0, 0].numpy() for each in of_bins)
    expected = np.nansum(np.abs(mean_p - mean_gt) * counts) / counts.sum()
    assert calibration.expected_calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-6)


def test_calibration_error_counts_a_bin_by_its_voxels():
    # 0.95 three times right of four, 0.55 right both times
    confidence, correct = np.array([0.95] * 4 + [0.55] * 2), np.array([True, True, True, False, True, True])
    found = calibration.expected_calibration_error(confidence, correct)
    assert found == pytest.approx(4 / 6 * (0.95 - 0.75) + 2 / 6 * (1 - 0.55))
    assert calibration.expected_calibration_error(np.ones(3), np.ones(3, bool)) == 0


def test_entropy_that_finds_every_error_has_an_area_of_one():
    sure, unsure = [0.98, 0.01, 0.01], [0.2, 0.4, 0.4]
    probabilities = np.array([sure, sure, unsure, unsure], dtype=np.float32).T
    found = calibration.calibration(probabilities, np.array([0, 0, 0, 0]))
    assert found.auroc == 1
    assert calibration.calibration(probabilities, np.array([1, 1, 1, 1])).auroc == 0
    assert np.isnan(calibration.calibration(probabilities[:, :2], np.array([0, 0])).auroc)
    bits = [-sum(p * np.log2(p) for p in each) for each in (sure, unsure)]
    assert found.mean_bits == pytest.approx(np.mean(bits), rel=1e-5)


def test_box_is_widened_by_millimetres_and_stays_within():
    labels = np.zeros((10, 20, 20), dtype=np.int64)
    labels[1:3, 8:10, 15] = 4
    assert calibration.foreground_box(labels, (5.0, 3.0, 3.0), 15.0) == (slice(0, 6), slice(3, 15), slice(10, 20))
    assert calibration.foreground_box(np.zeros((2, 3, 4), int), (1.0, 1.0, 1.0)) == (
        slice(0, 2),
        slice(0, 3),
        slice(0, 4),
    )


def test_case_on_disk_has_the_axes_of_the_image(tmp_path: Path):
    labels = np.zeros((4, 5, 6), dtype=np.uint8)
    labels[1, 2, 3] = 1
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing((20.0, 20.0, 15.0))  # x, y, z: one voxel of margin everywhere
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    right = np.stack([labels == 0, labels == 1]).astype(np.float32)
    np.savez_compressed(tmp_path / "a.npz", probabilities=right)
    found = calibration.case_calibration(tmp_path / "a.npz", tmp_path / "a.nii.gz")
    assert (found.error, found.mean_bits) == (0, 0)
    right[:, 1, 2, 4] = 0.5  # beside it, within the box of 27 voxels; the label stays right
    np.savez_compressed(tmp_path / "a.npz", probabilities=right)
    found = calibration.case_calibration(tmp_path / "a.npz", tmp_path / "a.nii.gz")
    assert found.error == pytest.approx(0.5 / 27)
    assert found.mean_bits == pytest.approx(1 / 27)
    np.savez_compressed(tmp_path / "a.npz", probabilities=right.transpose(0, 3, 2, 1))
    with pytest.raises(ValueError, match="is of shape"):
        calibration.case_calibration(tmp_path / "a.npz", tmp_path / "a.nii.gz")


def test_rank_correlation():
    assert calibration.rank_correlation([0.1, 0.2, 0.4], [0.9, 0.8, 0.1]) == pytest.approx(1)
    assert np.isnan(calibration.rank_correlation([0.1, 0.2], [0.9, 0.8]))
