"""What is annotated in a scan, on the grids of the configurations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffseg_nnunet.budgets.annotation import Annotation, ScanGrid, SliceAnnotation, VoxelAnnotation, _random_bits


def whole(annotation: Annotation, grid: ScanGrid) -> np.ndarray:
    indices = [np.arange(size) for size in grid.shape]
    return np.broadcast_to(annotation.mask(grid, indices), grid.shape)


@st.composite
def grids(draw: st.DrawFn) -> ScanGrid:
    scan = [draw(st.integers(1, 9)) for _ in range(3)]
    corner = [draw(st.integers(0, size - 1)) for size in scan]
    crop = [draw(st.integers(1, size - start)) for size, start in zip(scan, corner, strict=True)]
    shape = [draw(st.integers(1, 12)) for _ in range(3)]
    return ScanGrid(tuple(scan), tuple(corner), tuple(crop), tuple(shape))


@given(grids())
def test_voxels_lie_where_their_centres_do(grid: ScanGrid) -> None:
    """By floating-point arithmetic, as resampling places them; on a border, either neighbour will do."""
    for axis in range(3):
        index = np.arange(grid.shape[axis])
        centre = (index + 0.5) * grid.crop[axis] / grid.shape[axis]
        assert np.all(np.abs(grid.nearest_in_scan(axis, index) - grid.corner[axis] + 0.5 - centre) <= 0.5 + 1e-9)
        back = np.arange(grid.crop[axis])
        centre = (back + 0.5) * grid.shape[axis] / grid.crop[axis]
        found = grid.nearest_in_array(axis, back + grid.corner[axis])
        assert np.all(np.abs(found + 0.5 - centre) <= 0.5 + 1e-9)
        assert found.min() >= 0
        assert found.max() < grid.shape[axis]


@given(grids(), st.data())
def test_slices_keep_theirs_and_nest(grid: ScanGrid, data: st.DataObject) -> None:
    inside = st.integers(grid.corner[0], grid.corner[0] + grid.crop[0] - 1)
    many = data.draw(st.sets(inside, min_size=1))
    few = data.draw(st.sets(st.sampled_from(sorted(many)), min_size=1))
    small, large = (whole(SliceAnnotation(tuple(sorted(slices))), grid) for slices in (few, many))
    assert np.all(large | ~small)
    for mask, slices in ((small, few), (large, many)):
        assert np.array_equal(mask, np.broadcast_to(mask[:, :1, :1], grid.shape))  # whole slices
        assert mask[grid.nearest_in_array(0, np.array(sorted(slices)))].all()  # none is lost
        lies_in = grid.nearest_in_scan(0, np.arange(grid.shape[0]))
        extra = mask[:, 0, 0] & ~np.isin(lies_in, sorted(slices))
        assert extra.sum() <= len(slices)
    if grid.shape[0] == grid.crop[0]:  # 2d, and wherever the spacing is kept
        assert np.flatnonzero(small[:, 0, 0]).tolist() == [number - grid.corner[0] for number in sorted(few)]


def test_slices_that_were_multiplied_all_count() -> None:
    grid = ScanGrid((6, 2, 2), (1, 0, 0), (4, 2, 2), (12, 3, 3))
    mask = whole(SliceAnnotation((2,)), grid)
    assert np.flatnonzero(mask[:, 0, 0]).tolist() == [3, 4, 5]


@given(grids(), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 3))
def test_voxels_nest(grid: ScanGrid, one: float, other: float, seed: int) -> None:
    few, many = (whole(VoxelAnnotation.of_case(share, seed, "case"), grid) for share in sorted((one, other)))
    assert np.all(many | ~few)
    assert whole(VoxelAnnotation.of_case(1.0, seed, "case"), grid).all()


@given(grids(), st.data())
def test_a_crop_sees_what_the_whole_sees(grid: ScanGrid, data: st.DataObject) -> None:
    annotation = data.draw(st.sampled_from([VoxelAnnotation.of_case(0.5, 0, "a"), SliceAnnotation((grid.corner[0],))]))
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in grid.shape]
    indices = [np.arange(low, high) for low, high in bounds]
    crop = np.broadcast_to(annotation.mask(grid, indices), [len(index) for index in indices])
    box = tuple(slice(low, high) for low, high in bounds)
    assert np.array_equal(crop, whole(annotation, grid)[box])


@given(grids())
def test_configurations_see_the_same_voxels(grid: ScanGrid) -> None:
    annotation = VoxelAnnotation.of_case(0.4, 7, "case")
    acquired = whole(annotation, ScanGrid(grid.scan, (0, 0, 0), grid.scan, grid.scan))
    nearest = np.ix_(*(grid.nearest_in_scan(axis, np.arange(size)) for axis, size in enumerate(grid.shape)))
    assert np.array_equal(whole(annotation, grid), acquired[nearest])


@pytest.mark.parametrize("share", [0.005, 0.1, 0.5])
def test_voxels_are_drawn_independently(share: float) -> None:
    """The count is binomial, in the volume and in each slice; neighbours, cases and seeds say nothing of each other."""
    shape = (40, 100, 100)
    grid = ScanGrid(shape, (0, 0, 0), shape, shape)
    one, case, seed = (
        whole(VoxelAnnotation.of_case(share, seed, case), grid) for seed, case in ((0, "a"), (0, "b"), (1, "a"))
    )

    def binomial(count: int, trials: int, probability: float) -> bool:
        return abs(count - trials * probability) < 5 * np.sqrt(trials * probability * (1 - probability)) + 1

    assert binomial(one.sum(), one.size, share)
    assert all(binomial(plane.sum(), plane.size, share) for axis in range(3) for plane in np.moveaxis(one, axis, 0))
    for axis in range(3):
        assert binomial((one & np.roll(one, 1, axis)).sum(), one.size, share**2)
    for other in (case, seed):
        assert binomial((one & other).sum(), one.size, share**2)


def test_voxels_are_those_of_splitmix64() -> None:
    """The reference output of the generator for the seed 1234567."""
    reference = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert _random_bits(np.uint64(1234567), np.arange(3, dtype=np.uint64)).tolist() == reference
