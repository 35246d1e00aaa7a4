"""The body and its ranges: on the phantom, whose body is known, and on maps whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from diffseg_nnunet.coordinates.body import DIRECTIONS, AxisRange, body_mask, body_ranges, covered
from diffseg_nnunet.coordinates.grids import ScanGrid
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.phantom import LABELS, phantom_case

STRAIGHT = np.column_stack([np.eye(3)[:, ::-1], np.zeros(3)])  # from (z, y, x) to x, y, z


@pytest.fixture(scope="module", params=[3, 4, 5])
def case(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, labels and matrix of a phantom."""
    image, labels = phantom_case(request.param)
    return sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(labels), ScanGrid.of(image).index_to_patient()


def test_the_body_of_the_phantom(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    image, labels, matrix = case
    body = body_mask(image, True, matrix)
    assert ndimage.label(body)[1] == 1
    for name, value in LABELS.items():
        if value:  # the lungs among them, though they end in the scan's last slice
            assert body[labels == value].mean() > 0.97, name
    outside = np.zeros_like(body)
    outside[:, :2, :2] = outside[:, :2, -2:] = True
    assert not body[outside].any()
    assert 0.3 < body.mean() < 0.8


def test_without_hounsfield_units_otsu_finds_the_body(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    image, _, matrix = case
    expected = body_mask(image, True, matrix)
    body = body_mask(3.0 * image + 7000, False, matrix)
    assert 2 * (body & expected).sum() / (body.sum() + expected.sum()) > 0.95


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_holes_are_filled_across_the_body_wherever_its_axis_lies(axis: int) -> None:
    tube = np.full((12, 12, 12), -1000)
    tube[:, 2:10, 2:10], tube[:, 4:8, 4:8] = 0, -1000
    tube[:, 0, 0] = 0  # something beside the body
    order = np.insert([1, 2], axis, 0)
    matrix = np.column_stack([STRAIGHT[:, :3][:, order], np.zeros(3)])
    body = body_mask(tube.transpose(order), True, matrix)
    expected = np.zeros(tube.shape, bool)
    expected[:, 2:10, 2:10] = True
    np.testing.assert_array_equal(body, expected.transpose(order))


@pytest.mark.parametrize("ct", [True, False])
def test_a_scan_without_a_body_is_refused(ct: bool) -> None:
    with pytest.raises(BadInputError, match="shows no body"):
        body_mask(np.full((4, 5, 6), -1000), ct, STRAIGHT)


def test_ranges_of_a_map_that_is_known(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Stretched and shifted positions: slopes are the stretches, and the range follows from the body's own."""
    image, _, matrix = case
    body = body_mask(image, True, matrix)
    index = np.argwhere(body)
    positions = index @ matrix[:, :3].T + matrix[:, 3]
    coordinates = np.full((*body.shape, 3), 1e6, np.float32)  # outside the body nothing counts
    stretch, shift = np.array([1.0, 0.8, 1.2]), np.array([10.0, -700.0, 0.0])
    coordinates[body] = positions * stretch + shift
    ranges = body_ranges(coordinates, matrix, body)
    assert tuple(ranges) == DIRECTIONS
    expected = np.percentile(positions, [1, 50, 99], axis=0) * stretch + shift
    for k, one in enumerate(ranges.values()):
        np.testing.assert_allclose((one.low_mm, one.median_mm, one.high_mm), expected[:, k], atol=1e-2)
        assert one.extent_mm == pytest.approx(one.high_mm - one.low_mm)
        assert one.slope == pytest.approx(stretch[k], abs=1e-5)
        assert one.residual_mm < 1e-2


def test_a_noisy_map_shows_in_the_residual() -> None:
    rng = np.random.default_rng(0)
    index = np.stack(np.meshgrid(*[np.arange(30)] * 3, indexing="ij"), axis=-1)
    coordinates = (index @ STRAIGHT[:, :3].T + rng.normal(0, 4, index.shape)).astype(np.float32)
    for one in body_ranges(coordinates, STRAIGHT, np.ones((30, 30, 30), bool)).values():
        assert one.residual_mm == pytest.approx(4, rel=0.05)
        assert one.slope == pytest.approx(1, abs=0.02)


def test_one_slice_has_no_slope_across_it() -> None:
    coordinates = np.zeros((1, 4, 5, 3), np.float32)
    ranges = body_ranges(coordinates, STRAIGHT, np.ones((1, 4, 5), bool))
    assert ranges["superior"].slope is None
    assert ranges["left"].slope == 0


def test_huge_bodies_are_sampled() -> None:
    shape = (128, 128, 128)
    z = np.arange(128, dtype=np.float32)[:, None, None]
    coordinates = np.broadcast_to(z[..., None], (*shape, 3))
    superior = body_ranges(coordinates, STRAIGHT, np.ones(shape, bool))["superior"]
    np.testing.assert_allclose((superior.low_mm, superior.median_mm, superior.high_mm), (1, 63.5, 126), atol=0.51)
    assert superior.slope == pytest.approx(1)


def test_structures_are_covered_from_the_head_downwards() -> None:
    superior = AxisRange(-100, 0, 100, 200, 1, 0)
    landmarks = {"bladder": -250.0, "kidney": -40.0, "liver": 20.0, "heart": 99.0, "brain": 400.0}
    assert covered(superior, landmarks) == ["heart", "liver", "kidney"]
