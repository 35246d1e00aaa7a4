"""RTSTRUCT and DICOM SEG objects as label maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian, RLELossless
from skimage.draw import polygon

from diffseg_nnunet.dataset_conversion.dicom import rtstruct, segmentation
from diffseg_nnunet.dataset_conversion.dicom.annotations import DrawnLabel
from diffseg_nnunet.dataset_conversion.dicom.rtstruct import RtStruct, rasterised
from diffseg_nnunet.dataset_conversion.dicom.segmentation import DicomSeg
from diffseg_nnunet.dataset_conversion.dicom.series import DicomSeries
from diffseg_nnunet.verification import UnreadableVolumeError

from .written import (
    SIZE,
    assert_same_grid,
    contours_of,
    rotation,
    stored_values,
    two_organs,
    write_rtstruct,
    write_seg,
    write_series,
)

BIG = (6, 40, 36)


def read(source: object) -> sitk.Image:
    return source.read(lambda each: each.read(None))


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * np.sum(one & other) / (one.sum() + other.sum())


class Case:
    """A series on an oblique grid, and a label map on it."""

    def __init__(self, folder: Path, size: tuple[int, ...] = SIZE, oblique: bool = True):
        axes = rotation(5) if oblique else None
        self.paths = write_series(
            folder / "images", stored_values(size=size), direction=axes, numbers=[4, 0, 5, 2, 1, 3]
        )
        self.series = DicomSeries(tuple(self.paths))
        self.image = read(self.series)
        self.mask = two_organs(size)

    def label(self, drawn: object) -> np.ndarray:
        label = read(DrawnLabel(self.series, (drawn,)))
        assert_same_grid(label, self.image)
        return sitk.GetArrayFromImage(label)

    def rtstruct(self, path: Path, **changes: object) -> Path:
        rois = {name: contours_of(self.mask == value, self.image) for value, name in ((1, "Ring"), (2, "Block"))}
        return write_rtstruct(path, self.paths, rois, **changes)

    def refusal(self, drawn: object) -> str:
        with pytest.raises(UnreadableVolumeError) as caught:
            self.label(drawn)
        return str(caught.value)


@pytest.fixture(params=[False, True], ids=["axial", "oblique"])
def case(tmp_path: Path, request: pytest.FixtureRequest) -> Case:
    return Case(tmp_path, BIG, request.param)


# --- RTSTRUCT -------------------------------------------------------------------------------------------------------


def test_contours_of_a_mask_give_the_mask_again(tmp_path: Path, case: Case) -> None:
    path = case.rtstruct(tmp_path / "struct.dcm")
    label = case.label(RtStruct(path, ((1, 1), (2, 2))))
    assert set(np.unique(label)) == {0, 1, 2}
    for value in (1, 2):
        assert dice(label == value, case.mask == value) >= 0.98
    described = rtstruct.describe(path)
    assert described.structures == ((1, "Ring"), (2, "Block"))
    assert described.series == {dcmread(case.paths[0]).SeriesInstanceUID}
    assert described.instances == {dcmread(each).SOPInstanceUID for each in case.paths}


def circle(radius: float, centre: tuple[float, float], place: float, reverse: bool = False) -> list[list[float]]:
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)[:: -1 if reverse else 1]
    return [[centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle), place] for angle in angles]


def grid(size: tuple[int, int, int] = (30, 30, 3)) -> sitk.Image:
    """Voxel centres at whole millimetres."""
    return sitk.Image(*size, sitk.sitkUInt8)


def disc(radius: float, hole: float = 0.0) -> np.ndarray:
    y, x = np.indices((30, 30))
    distance = np.hypot(x - 15.3, y - 14.8)
    return (distance < radius) & (distance >= hole)


def test_a_contour_within_a_contour_is_a_hole() -> None:
    contours = [np.array(circle(radius, (15.3, 14.8), 1)) for radius in (11, 5)]
    mask = rasterised(contours, grid())
    assert not mask[[0, 2]].any()
    assert dice(mask[1], disc(11, 5)) > 0.98
    assert not mask[1, 15, 15]


def test_a_keyhole_is_a_hole() -> None:
    outer, inner = circle(11, (15.3, 14.8), 1), circle(5, (15.3, 14.8), 1, reverse=True)
    keyhole = np.array([*outer, outer[0], inner[-1], *inner, outer[0]])
    assert dice(rasterised([keyhole], grid())[1], disc(11, 5)) > 0.98


def test_a_voxel_is_inside_where_its_centre_is() -> None:
    square = np.array([[4.4, 6.4, 0], [9.6, 6.4, 0], [9.6, 8.6, 0], [4.4, 8.6, 0]])
    mask = rasterised([square], grid())
    expected = np.zeros_like(mask)
    expected[0, 7:9, 5:10] = True
    np.testing.assert_array_equal(mask, expected)


@settings(max_examples=30, deadline=None)
@given(arrays(float, (12, 2), elements=st.floats(-5, 35).map(lambda value: value + 0.013)))
def test_any_polygon_is_filled_as_scikit_image_does(points: np.ndarray) -> None:
    """Polygons that cross themselves, leave the image, or have no area."""
    filled = rasterised([np.column_stack([points, np.ones(len(points))])], grid())[1]
    expected = np.zeros_like(filled)
    expected[polygon(points[:, 1], points[:, 0], expected.shape)] = True
    # centres within rounding of an edge may go either way
    starts, ends = points, np.roll(points, -1, axis=0)
    centres = np.stack(np.indices(filled.shape)[::-1], axis=-1).reshape(-1, 1, 2)
    along = ends - starts
    part = np.clip(((centres - starts) * along).sum(-1) / np.maximum((along**2).sum(-1), 1e-12), 0, 1)
    distance = np.linalg.norm(centres - starts - part[..., None] * along, axis=-1).min(1).reshape(filled.shape)
    np.testing.assert_array_equal(filled[distance > 1e-5], expected[distance > 1e-5])


def test_touching_contours_share_no_voxel() -> None:
    left = np.array([[4, 6, 0], [9, 6, 0], [9, 12, 0], [4, 12, 0]], float)
    masks = [rasterised([left + np.array([shift, 0, 0])], grid()) for shift in (0, 5)]
    assert [mask.sum() for mask in masks] == [30, 30]
    assert not (masks[0] & masks[1]).any()


def test_what_lies_beside_the_image_is_cut_off() -> None:
    mask = rasterised([np.array(circle(8, (0, 15), 2))], grid())
    assert mask[2, 15, :8].all()
    assert not mask[2, :, 9:].any()


@pytest.mark.parametrize("place", [0.8, 1.2])
def test_contours_are_snapped_to_the_nearest_slice(place: float) -> None:
    assert rasterised([np.array(circle(8, (15, 15), place))], grid())[1].any()


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (circle(8, (15, 15), 1.5), "between the slices 1 and 2"),
        (circle(8, (15, 15), 4), "2 slice"),
        (circle(8, (15, 15), -1), "1 slice"),
        ([[1, 1, 0], [5, 1, 1], [5, 5, 2]], "across slices"),
    ],
)
def test_contours_that_lie_in_no_slice(points: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rasterised([np.array(points)], grid())


def test_an_rtstruct_of_other_images_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path)
    shifted = sitk.Image(case.image)
    shifted.SetOrigin(np.add(case.image.GetOrigin(), 1.2 * case.series.stack().direction[:, 2]).tolist())
    rois = {"Ring": contours_of(case.mask == 1, shifted)}
    message = case.refusal(RtStruct(write_rtstruct(tmp_path / "s.dcm", case.paths, rois), ((1, 1),)))
    assert "s.dcm cannot be used: 'Ring' does not fit the images it refers to: a contour lies between" in message


def test_points_and_open_lines_are_no_structures(tmp_path: Path) -> None:
    case = Case(tmp_path)
    path = case.rtstruct(tmp_path / "points.dcm", kind="POINT")
    assert rtstruct.describe(path).structures == ()
    assert rtstruct.describe(path).notes == ("'Ring' has no closed contour", "'Block' has no closed contour")


def test_the_smaller_structure_wins_where_two_overlap(tmp_path: Path) -> None:
    case = Case(tmp_path, BIG)
    organ, tumour = np.zeros(BIG, bool), np.zeros(BIG, bool)
    organ[1:5, 5:30, 5:30], tumour[2:4, 10:15, 10:15] = True, True
    rois = {"Tumour": contours_of(tumour, case.image), "Organ": contours_of(organ, case.image)}
    path = write_rtstruct(tmp_path / "struct.dcm", case.paths, rois)
    for values in (((1, 1), (2, 2)), ((2, 1), (1, 2))):
        label = case.label(RtStruct(path, values))
        value = dict(values)
        assert (label[tumour] == value[1]).all()
        assert (label[organ & ~tumour] == value[2]).all()


def test_two_structures_of_one_value_are_united(tmp_path: Path) -> None:
    case = Case(tmp_path)
    label = case.label(RtStruct(case.rtstruct(tmp_path / "struct.dcm"), ((1, 1), (2, 1))))
    assert set(np.unique(label)) == {0, 1}
    assert dice(label == 1, case.mask > 0) > 0.95


def test_two_objects_with_one_structure_are_refused(tmp_path: Path) -> None:
    case = Case(tmp_path)
    objects = tuple(RtStruct(case.rtstruct(tmp_path / name), ((1, 1),)) for name in ("a.dcm", "b.dcm"))
    with pytest.raises(
        UnreadableVolumeError, match=r"b.dcm cannot be used: it draws a structure that .*a.dcm"
    ) as caught:
        read(DrawnLabel(case.series, objects))
    assert "--annotation" in caught.value.mend


# --- DICOM SEG ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
@pytest.mark.parametrize("omit", [True, False])
def test_segments_are_exact(tmp_path: Path, case: Case, kind: str, omit: bool) -> None:
    ordered = [plane.path for plane in case.series.stack().planes]
    path = write_seg(tmp_path / "seg.dcm", ordered, case.mask, ["Ring", "Block"], kind, omit_empty_frames=omit)
    np.testing.assert_array_equal(case.label(DicomSeg(path, ((1, 1), (2, 2)))), case.mask)
    described = segmentation.describe(path)
    assert described.structures == ((1, "Ring"), (2, "Block"))
    assert described.series == {dcmread(case.paths[0]).SeriesInstanceUID}
    assert bool(described.notes) == (kind == "FRACTIONAL")


def test_frames_are_placed_by_position(tmp_path: Path) -> None:
    """Not by their order, nor by that of the images."""
    case = Case(tmp_path)
    ordered = [plane.path for plane in case.series.stack().planes]
    order = [3, 1, 5, 0, 4, 2]
    path = write_seg(tmp_path / "seg.dcm", [ordered[place] for place in order], case.mask[order], ["Ring", "Block"])
    np.testing.assert_array_equal(case.label(DicomSeg(path, ((1, 1), (2, 2)))), case.mask)


def test_frames_may_be_mirrored(tmp_path: Path) -> None:
    """A segmentation in another orientation, as toolkits write it that turn volumes around first."""
    case = Case(tmp_path)
    ordered = [plane.path for plane in case.series.stack().planes]
    path = write_seg(tmp_path / "seg.dcm", ordered, case.mask[:, ::-1, :], ["Ring", "Block"])
    dataset = dcmread(path)
    axes = case.series.stack().direction
    turned = [float(f"{value:.8f}") for value in (*axes[:, 0], *-axes[:, 1])]
    dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = turned
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        position = frame.PlanePositionSequence[0]
        last = np.array(position.ImagePositionPatient, float) + axes[:, 1] * case.image.GetSpacing()[1] * (SIZE[1] - 1)
        position.ImagePositionPatient = [float(f"{value:.6f}") for value in last]
    dataset.save_as(path)
    np.testing.assert_array_equal(case.label(DicomSeg(path, ((1, 1), (2, 2)))), case.mask)


def test_compressed_segments(tmp_path: Path) -> None:
    case = Case(tmp_path)
    ordered = [plane.path for plane in case.series.stack().planes]
    for syntax in (RLELossless, ExplicitVRLittleEndian):
        path = write_seg(
            tmp_path / "seg.dcm", ordered, case.mask, ["Ring", "Block"], "LABELMAP", transfer_syntax_uid=syntax
        )
        np.testing.assert_array_equal(case.label(DicomSeg(path, ((1, 1), (2, 2)))), case.mask)


def test_a_segmentation_of_another_grid_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path)
    ordered = [plane.path for plane in case.series.stack().planes]
    path = write_seg(tmp_path / "seg.dcm", ordered, case.mask, ["Ring", "Block"])
    dataset = dcmread(path)
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        position = frame.PlanePositionSequence[0]
        position.ImagePositionPatient = [float(f"{value + 0.4:.6f}") for value in position.ImagePositionPatient]
    dataset.save_as(path)
    assert "'Ring' does not fit the images it refers to: a frame's pixels are not" in case.refusal(
        DicomSeg(path, ((1, 1),))
    )


def test_no_segmentation_at_all(tmp_path: Path) -> None:
    case = Case(tmp_path)
    assert "no valid DICOM SEG" in case.refusal(DicomSeg(case.paths[0], ((1, 1),)))
    (tmp_path / "seg.dcm").write_bytes(b"nothing")
    assert "seg.dcm cannot be used" in case.refusal(DicomSeg(tmp_path / "seg.dcm", ((1, 1),)))
