"""Centres of structures in body coordinates."""

from __future__ import annotations

import numpy as np
import pytest

from diffseg_nnunet.coordinates.landmarks import mean_landmarks, structure_centres

SHAPE = (12, 10, 8)
LABELS = {"organ": [1], "pair": [1, 2], "cut": [3], "absent": [9]}


def test_centres_of_whole_structures() -> None:
    segmentation = np.zeros(SHAPE, np.int8)
    segmentation[2:5, 3:6, 4:7] = 1
    segmentation[8:11, 3:6, 4:7] = 2
    segmentation[4:, 7:9, 1:3] = 3  # it reaches the last slice
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij")).astype(np.float32)
    centres = structure_centres(10 * index, segmentation, LABELS)
    assert {name: centre.tolist() for name, centre in centres.items()} == {"organ": [30, 40, 50], "pair": [60, 40, 50]}


def test_landmarks_are_means_over_the_scans_that_show_them() -> None:
    scans = [{"liver": np.array([1.0, 2, 3]), "spleen": np.array([4.0, 5, 6])}, {"liver": np.array([3.0, 4, 7])}, {}]
    landmarks = mean_landmarks(scans)
    liver, spleen = landmarks["liver"], landmarks["spleen"]
    assert (liver.scans, liver.left_mm, liver.posterior_mm, liver.superior_mm) == (2, 2, 3, 5)
    assert liver.deviation_mm == pytest.approx(8**0.5)
    assert (spleen.scans, spleen.superior_mm, spleen.deviation_mm) == (1, 6, None)
    assert mean_landmarks([]) == {}
