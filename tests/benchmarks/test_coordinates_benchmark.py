"""Known coordinates give known errors, slopes and spreads."""

from __future__ import annotations

import coordinates
import numpy as np
import pytest


@pytest.fixture
def positions() -> np.ndarray:
    return np.random.default_rng(0).uniform(-100, 100, (4, 50, 3))


def test_shrunken_coordinates_show_in_the_slope(positions):
    record = {"displacements": coordinates.displacement_record(positions * [1, 0.5, 2] + 30, positions)}
    np.testing.assert_allclose(coordinates.slope([record, record]), [1, 0.5, 2])
    assert record["displacements"]["within"]["error"][0] == pytest.approx(0, abs=1e-9)
    across = record["displacements"]["across"]
    assert across["error"][1] == pytest.approx(across["true"][1] / 2)


def test_a_gauge_for_each_window_shows_across_windows_only(positions):
    shifts = np.array([0, 50, 0, 50])[:, None, None]
    record = coordinates.displacement_record(positions + shifts, positions)
    np.testing.assert_allclose(record["within"]["error"], 0, atol=1e-9)
    np.testing.assert_allclose(record["across"]["error"], 50)


def test_spread_is_the_distance_to_the_mean():
    assert coordinates.spread_mm(np.array([[0.0, 0, 0], [6, 8, 0]])) == pytest.approx(5)


def test_spread_over_slope_undoes_shrinking():
    records = []
    for patient in range(3):
        shift = np.array([10.0 * patient, 0, 0])
        across = {"products": [0.5] * 3, "squares": [1.0] * 3}
        records.append(
            {
                "organs": {"liver": {"true": shift.tolist(), "predicted": (shift / 2).tolist()}},
                "displacements": {"across": across},
                "centre": shift.tolist(),
                "box": [(shift - 100).tolist(), (shift + 100).tolist()],
            }
        )
    spreads = coordinates.organ_spreads(records)["liver"]
    assert spreads["network / slope"] == pytest.approx(2 * spreads["network"])
    assert spreads["scan centre"] == spreads["body box"] == pytest.approx(0)


def test_beside_leaves_out_the_other_organ():
    assert coordinates.beside(70, 10, 30, 100) == (31, 100)
    assert coordinates.beside(20, 60, 80, 100) == (0, 60)
