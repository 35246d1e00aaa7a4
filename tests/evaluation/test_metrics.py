"""Scores of one structure against brute force, MONAI, surface-distance, and what follows by thought.

MONAI's surface Dice with sub-voxels is NSD by the same definition. Its Hausdorff and average distances are others: it
takes the centres of surface voxels, all of one weight, where surface elements at the corners count by their area here.
The two agree where one whole surface is moved by a vector, and differ by less than a voxel's diagonal in the maximum.
"""

from __future__ import annotations

import numpy as np
import pytest
import surface_distance
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.metrics import DiceMetric, MeanIoU, compute_hausdorff_distance, compute_surface_dice
from scipy.spatial.distance import cdist
from surface_distance import lookup_tables

from diffseg_nnunet.evaluation.metrics import joint_box, label_boxes, score_structure
from diffseg_nnunet.evaluation.surfaces import surface_distances

pytestmark = pytest.mark.filterwarnings("ignore:.*scipy.ndimage.*:DeprecationWarning")

SHAPE = (7, 8, 9)
masks = hnp.arrays(bool, SHAPE, elements=st.booleans())
spacings = st.tuples(*[st.sampled_from([0.7, 1.0, 2.5, 5.0])] * 3)


def cube(shape: tuple[int, ...], start: tuple[int, ...], size: int) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(corner, corner + size) for corner in start)] = True
    return mask


def surface_elements(mask: np.ndarray, spacing_mm: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Positions in mm and areas of the corners whose 2 x 2 x 2 neighbours are not all in or all out."""
    padded = np.pad(mask, 1)
    positions, areas = [], []
    table = lookup_tables.create_table_neighbour_code_to_surface_area(spacing_mm)
    for corner in np.ndindex(*(side - 1 for side in padded.shape)):
        neighbours = padded[tuple(slice(index, index + 2) for index in corner)]
        if neighbours.any() and not neighbours.all():
            positions.append(np.multiply(corner, spacing_mm))
            areas.append(table[int((neighbours * lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL).sum())])
    return np.array(positions), np.array(areas)


def brute_force(
    a: np.ndarray, b: np.ndarray, spacing_mm: tuple[float, ...], tolerance_mm: float
) -> tuple[float, float, float]:
    """NSD, HD95 and ASSD from all pairs of surface elements."""
    (at_a, area_a), (at_b, area_b) = surface_elements(a, spacing_mm), surface_elements(b, spacing_mm)
    pairs = cdist(at_a, at_b)
    percentiles, within, total = [], 0.0, 0.0
    for distances, areas in ((pairs.min(axis=1), area_a), (pairs.min(axis=0), area_b)):
        order = np.argsort(distances, kind="stable")
        share = np.cumsum(areas[order]) / areas.sum()
        percentiles.append(distances[order][np.argmax(share >= 0.95)])
        within += areas[distances <= tolerance_mm + 1e-9].sum()
        total += distances @ areas
    area = area_a.sum() + area_b.sum()
    return within / area, max(percentiles), total / area


def test_both_empty_is_perfect() -> None:
    empty = np.zeros(SHAPE, dtype=bool)
    scores = score_structure(empty, empty, (1, 1, 1), 1.0)
    assert (scores.dsc, scores.iou, scores.nsd, scores.hd95_mm, scores.assd_mm) == (1.0, 1.0, 1.0, 0.0, 0.0)
    assert (scores.reference_ml, scores.prediction_ml) == (0.0, 0.0)
    assert (scores.volume_error_ml, scores.volume_error_relative) == (0.0, 0.0)


@pytest.mark.parametrize("swapped", [False, True])
def test_one_empty_scores_zero_and_has_no_distance(swapped: bool) -> None:
    pair = [cube(SHAPE, (2, 2, 2), 3), np.zeros(SHAPE, dtype=bool)]
    scores = score_structure(*(pair[::-1] if swapped else pair), (1, 1, 1), 1.0)
    assert (scores.dsc, scores.iou, scores.nsd) == (0.0, 0.0, 0.0)
    assert np.isnan([scores.hd95_mm, scores.assd_mm]).all()
    assert scores.volume_error_ml == pytest.approx(0.027 if swapped else -0.027)
    np.testing.assert_equal(scores.volume_error_relative, np.nan if swapped else -1.0)


def test_volumes_are_in_millilitres() -> None:
    scores = score_structure(cube(SHAPE, (0, 0, 0), 2), cube(SHAPE, (0, 0, 0), 3), (2.0, 5.0, 10.0), 1.0)
    assert scores.reference_ml == pytest.approx(0.8)
    assert scores.prediction_ml == pytest.approx(2.7)
    assert scores.volume_error_ml == pytest.approx(1.9)
    assert scores.volume_error_relative == pytest.approx(19 / 8)


@pytest.mark.parametrize("corner", [(0, 0, 0), (3, 4, 4), (6, 7, 8)])
def test_a_single_voxel_equals_itself(corner: tuple[int, ...]) -> None:
    voxel = cube(SHAPE, corner, 1)
    scores = score_structure(voxel, voxel, (5.0, 0.7, 0.7), 0.0)
    assert (scores.dsc, scores.nsd, scores.hd95_mm) == (1.0, 1.0, 0.0)


def test_two_single_voxels_are_as_far_apart_as_they_lie() -> None:
    scores = score_structure(cube(SHAPE, (0, 0, 1), 1), cube(SHAPE, (0, 0, 7), 1), (5.0, 3.0, 2.0), 1.0)
    assert (scores.dsc, scores.nsd) == (0.0, 0.0)
    assert scores.hd95_mm == pytest.approx(12.0)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("voxels", [1, 3])
def test_a_translated_cube_is_off_by_the_translation(axis: int, voxels: int) -> None:
    spacing_mm = (2.5, 1.25, 0.5)
    start = [4, 4, 4]
    start[axis] += voxels
    scores = score_structure(cube((24,) * 3, (4, 4, 4), 12), cube((24,) * 3, tuple(start), 12), spacing_mm, 0.1)
    assert scores.hd95_mm == pytest.approx(voxels * spacing_mm[axis])
    assert scores.dsc == pytest.approx((12 - voxels) / 12)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_translated_slab_is_off_by_the_translation_everywhere(axis: int) -> None:
    """Both faces move by 6 mm; the slab fills the volume across, and its rim is too narrow to show in 95 percent."""
    shape, spacing_mm = [60, 60, 60], [0.5, 0.5, 0.5]
    shape[axis], spacing_mm[axis] = 20, 3.0
    slab, moved = np.zeros((2, *shape), dtype=bool)
    along = [slice(None)] * 3
    along[axis] = slice(4, 8)
    slab[tuple(along)] = True
    moved = np.roll(slab, 2, axis)
    scores = score_structure(slab, moved, spacing_mm, 5.9)
    assert scores.hd95_mm == pytest.approx(6.0)
    assert scores.dsc == pytest.approx(0.5)
    assert scores.iou == pytest.approx(1 / 3)


def test_nsd_forgives_a_shift_within_the_tolerance() -> None:
    a, b = cube((20,) * 3, (4, 4, 4), 10), cube((20,) * 3, (5, 4, 4), 10)
    assert score_structure(a, b, (2.0, 1.0, 1.0), 2.0).nsd == 1.0
    assert score_structure(a, b, (2.0, 1.0, 1.0), 1.9).nsd < 1.0


def test_touching_the_border_costs_nothing() -> None:
    full = np.ones((4, 5, 6), dtype=bool)
    part = cube((4, 5, 6), (0, 0, 0), 4)
    inside = score_structure(np.pad(full, 3), np.pad(part, 3), (3.0, 1.0, 1.0), 1.0)
    assert score_structure(full, part, (3.0, 1.0, 1.0), 1.0) == inside


@settings(max_examples=25, deadline=None)
@given(masks, masks, spacings)
def test_equals_brute_force(a: np.ndarray, b: np.ndarray, spacing_mm: tuple[float, ...]) -> None:
    a[2, 3, 4] = b[3, 3, 3] = True
    # Distances of a grid repeat; a tolerance between the grid's distances keeps rounding out of the comparison.
    tolerance_mm = 1.0371
    scores = score_structure(a, b, spacing_mm, tolerance_mm)
    expected = brute_force(a, b, spacing_mm, tolerance_mm)
    assert (scores.nsd, scores.hd95_mm, scores.assd_mm) == pytest.approx(expected, abs=1e-9)


def test_smooth_shapes_equal_brute_force() -> None:
    z, y, x = np.ogrid[:9, :14, :14]
    a = ((z - 4) * 2.5) ** 2 + (y - 6) ** 2 + (x - 6) ** 2 < 25
    b = ((z - 4) * 2.5) ** 2 + (y - 8) ** 2 + (x - 7) ** 2 < 30
    scores = score_structure(a, b, (2.5, 1.0, 1.0), 1.1)
    expected = brute_force(a, b, (2.5, 1.0, 1.0), 1.1)
    assert (scores.nsd, scores.hd95_mm, scores.assd_mm) == pytest.approx(expected)
    assert 0.1 < scores.nsd < 0.9


@settings(max_examples=50, deadline=None)
@given(masks, masks, spacings)
def test_symmetric_and_bounded(a: np.ndarray, b: np.ndarray, spacing_mm: tuple[float, ...]) -> None:
    there, back = score_structure(a, b, spacing_mm, 1.0), score_structure(b, a, spacing_mm, 1.0)
    assert (there.dsc, there.iou, there.nsd) == (back.dsc, back.iou, back.nsd)
    np.testing.assert_equal((there.hd95_mm, there.assd_mm), (back.hd95_mm, back.assd_mm))
    assert there.volume_error_ml == -back.volume_error_ml
    assert there.iou == pytest.approx(there.dsc / (2 - there.dsc))
    assert 0 <= there.dsc <= 1
    assert 0 <= there.nsd <= 1
    assert np.isnan(there.hd95_mm) or 0 <= there.hd95_mm <= np.linalg.norm(np.multiply(SHAPE, spacing_mm))


@settings(max_examples=25, deadline=None)
@given(masks, spacings)
def test_identity_is_perfect(a: np.ndarray, spacing_mm: tuple[float, ...]) -> None:
    scores = score_structure(a, a.copy(), spacing_mm, 0.0)
    assert (scores.dsc, scores.iou, scores.nsd, scores.hd95_mm, scores.assd_mm) == (1.0, 1.0, 1.0, 0.0, 0.0)
    assert scores.volume_error_ml == 0


@settings(max_examples=25, deadline=None)
@given(masks, masks, st.tuples(*[st.tuples(st.integers(0, 6), st.integers(0, 6))] * 3))
def test_the_crop_changes_nothing(a: np.ndarray, b: np.ndarray, padding: tuple[tuple[int, int], ...]) -> None:
    a[1, 1, 1] = b[5, 5, 5] = True
    wide = [np.pad(mask, padding) for mask in (a, b)]
    scores = score_structure(*wide, (2.5, 0.8, 0.7), 1.0)
    assert scores == score_structure(a, b, (2.5, 0.8, 0.7), 1.0)
    uncropped = surface_distance.compute_surface_distances(*wide, (2.5, 0.8, 0.7))
    assert scores.hd95_mm == surface_distance.compute_robust_hausdorff(uncropped, 95)
    assert scores.nsd == min(1.0, surface_distance.compute_surface_dice_at_tolerance(uncropped, 1.0))
    # Theirs is a mean a side; ours one over both sides.
    areas = [uncropped[f"surfel_areas_{side}"].sum() for side in ("gt", "pred")]
    means = surface_distance.compute_average_surface_distance(uncropped)
    assert scores.assd_mm == pytest.approx(np.average(means, weights=areas))


def test_the_joint_box_is_tight() -> None:
    box = joint_box(cube((10, 10, 10), (0, 3, 4), 2), cube((10, 10, 10), (5, 4, 8), 2))
    assert box == (slice(0, 7), slice(3, 6), slice(4, 10))


@settings(max_examples=25, deadline=None)
@given(masks, masks)
def test_dsc_equals_monai(a: np.ndarray, b: np.ndarray) -> None:
    a[0, 0, 0] = True  # MONAI leaves an empty reference undefined
    reference, prediction = (torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (a, b))
    metric = DiceMetric(include_background=True)
    metric(y_pred=prediction, y=reference)
    assert score_structure(a, b, (1, 1, 1), 1.0).dsc == pytest.approx(metric.aggregate().item(), abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(masks, masks, st.sampled_from([(1.0, 1.0, 1.0), (2.5, 0.8, 0.7)]))
def test_nsd_and_iou_equal_monai(a: np.ndarray, b: np.ndarray, spacing_mm: tuple[float, ...]) -> None:
    a[2, 3, 4] = b[3, 3, 3] = True
    reference, prediction = (torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (a, b))
    scores = score_structure(a, b, spacing_mm, 1.0371)
    nsd = compute_surface_dice(
        prediction, reference, [1.0371], include_background=True, spacing=spacing_mm, use_subvoxels=True
    )
    assert scores.nsd == pytest.approx(nsd.item(), abs=1e-5)
    iou = MeanIoU()
    iou(y_pred=prediction, y=reference)
    assert scores.iou == pytest.approx(iou.aggregate().item(), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_largest_distance_is_monais_but_for_a_voxel(seed: int) -> None:
    generator = np.random.default_rng(seed)
    grid = np.ogrid[:16, :22, :22]
    spacing_mm = (2.5, 1.0, 0.8)
    a, b = (
        sum((axis - at) ** 2 for axis, at in zip(grid, generator.uniform(6, 10, 3), strict=True)) <= radius**2
        for radius in generator.uniform(3, 6, 2)
    )
    reference, prediction = (torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (a, b))
    theirs = compute_hausdorff_distance(prediction, reference, include_background=True, spacing=spacing_mm).item()
    ours = surface_distances(a, b, spacing_mm).hausdorff_mm(100)
    assert abs(ours - theirs) < np.linalg.norm(spacing_mm)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_hd95_of_a_translated_cube_equals_monais(axis: int) -> None:
    start = [4, 4, 4]
    start[axis] += 2
    a, b = cube((20,) * 3, (4, 4, 4), 10), cube((20,) * 3, tuple(start), 10)
    spacing_mm = (2.5, 1.25, 0.5)
    reference, prediction = (torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (a, b))
    theirs = compute_hausdorff_distance(
        prediction, reference, include_background=True, percentile=95, spacing=spacing_mm
    )
    assert score_structure(a, b, spacing_mm, 1.0).hd95_mm == pytest.approx(theirs.item())


def test_an_empty_mask_has_no_surface() -> None:
    with pytest.raises(ValueError, match="no surface"):
        surface_distances(cube(SHAPE, (1, 1, 1), 2), np.zeros(SHAPE, dtype=bool), (1, 1, 1))


def test_label_boxes_lists_what_is_present() -> None:
    labels = np.zeros((4, 4, 4), dtype=np.int16)
    labels[1, 2, 3], labels[3, 3, 3] = 2, 5
    assert label_boxes(labels) == {
        2: (slice(1, 2), slice(2, 3), slice(3, 4)),
        5: (slice(3, 4), slice(3, 4), slice(3, 4)),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": np.zeros(SHAPE, dtype=np.uint8)}, "3D bool mask"),
        ({"prediction": np.zeros((8, 9), dtype=bool)}, "3D bool mask"),
        ({"prediction": np.zeros((7, 8, 8), dtype=bool)}, "differ in shape"),
        ({"spacing_mm": (1.0, 1.0)}, "three positive numbers"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "three positive numbers"),
        ({"tolerance_mm": -1.0}, "0 mm or more"),
        ({"tolerance_mm": float("nan")}, "0 mm or more"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"spacing_mm": (1.0, 1.0, 1.0), "tolerance_mm": 1.0}
    arguments |= {side: np.zeros(SHAPE, dtype=bool) for side in ("reference", "prediction")}
    with pytest.raises(ValueError, match=message):
        score_structure(**(arguments | change))


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(bool, SHAPE[1:], elements=st.booleans()),
    hnp.arrays(bool, SHAPE[1:], elements=st.booleans()),
    spacings,
    st.integers(0, 2),
)
def test_a_single_slice_is_scored_as_surface_distance_scores_it_in_2d(
    a: np.ndarray, b: np.ndarray, spacing_mm: tuple[float, ...], axis: int
) -> None:
    a[0, 0] = b[-1, -1] = True
    in_slice = [side for other, side in enumerate(spacing_mm) if other != axis]
    theirs = surface_distance.compute_surface_distances(a, b, in_slice)
    ours = score_structure(np.expand_dims(a, axis), np.expand_dims(b, axis), spacing_mm, 1.0, axis)
    assert ours.nsd == pytest.approx(surface_distance.compute_surface_dice_at_tolerance(theirs, 1.0))
    assert ours.hd95_mm == pytest.approx(surface_distance.compute_robust_hausdorff(theirs, 95))
    assert ours.assd_mm == pytest.approx(
        np.average(
            np.concatenate([theirs["distances_gt_to_pred"], theirs["distances_pred_to_gt"]]),
            weights=np.concatenate([theirs["surfel_areas_gt"], theirs["surfel_areas_pred"]]),
        )
    )
    volume = score_structure(np.expand_dims(a, axis), np.expand_dims(b, axis), spacing_mm, 1.0)
    assert (ours.dsc, ours.iou, ours.reference_ml) == (volume.dsc, volume.iou, volume.reference_ml)
