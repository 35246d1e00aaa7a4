"""Windows stay in the scan, and padding says where the voxels went."""

from __future__ import annotations

import numpy as np
import scans


def test_window_is_centred_moved_inside_or_cut():
    assert scans.window((50, 50, 50), (10, 11, 12), (100, 100, 100)) == (slice(46, 56), slice(45, 56), slice(44, 56))
    assert scans.window((1, 99, 5), (10, 10, 10), (100, 100, 8)) == (slice(0, 10), slice(90, 100), slice(0, 8))


def test_padding_keeps_the_voxels_at_the_place_it_names():
    voxels = np.random.default_rng(0).normal(size=(1, 3, 4, 5)).astype(np.float32)
    larger, place = scans.padded(voxels, (4, 4, 8))
    assert larger.shape == (1, 4, 4, 8)
    np.testing.assert_array_equal(larger[(slice(None), *place)], voxels)
    assert np.count_nonzero(larger) == np.count_nonzero(voxels)


def test_rounding_gives_at_least_one_multiple():
    assert scans.rounded_to((56, 48, 3), (16, 16, 16)) == (64, 48, 16)
    assert scans.rounded_to((56, 48, 3), (16, 16, 16), up=False) == (48, 48, 16)


def test_scan_maps_there_and_back():
    matrix = np.array([[0, 0, 2.0, 5], [0, 3.0, 0, -7], [4.0, 0, 0, 1]])
    scan = scans.Scan("a", np.zeros((1, 4, 5, 6), np.float32), matrix, None)
    index = np.array([[1.0, 2.5, 3.0]])
    np.testing.assert_allclose(scan.to_mm(index), [[11, 0.5, 5]])
    np.testing.assert_allclose(scan.to_index(scan.to_mm(index)), index)
    assert scan.left_axis == 2


def test_largest_component_leaves_the_table():
    mask = np.zeros((20, 30, 30), bool)
    mask[:, 2:20, 5:25] = True
    mask[:, 26:29, :] = True  # thin
    body = scans.largest_component(mask)
    assert body[:, 5:18, 8:22].all()
    assert not body[:, 26:].any()
