"""RTSTRUCT: closed planar contours, rasterised on the grid of the images they were drawn on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .annotations import Annotation, continuous_index, outside
from .series import read_dataset

if TYPE_CHECKING:
    import SimpleITK as sitk
    from pydicom import Dataset

CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
# of the slice spacing: how far a contour may lie off the slice it is snapped to
SNAP_TOLERANCE = 0.25


@dataclass(frozen=True)
class RtStruct:
    """Structures of one RTSTRUCT object.

    A voxel belongs to a structure where its centre lies inside its contours. By the even-odd rule a contour within
    another is a hole, as is the inside of a keyhole. A centre on a contour is inside where that is the upper or left
    one (first rows, first columns), so that touching contours share no voxel. Slices without contours stay empty:
    nothing is interpolated.

    Attributes:
        path: the object.
        structures: (ROI number, label value).
    """

    path: Path
    structures: tuple[tuple[int, int], ...]

    def masks(self, image: sitk.Image) -> Iterator[tuple[int, np.ndarray]]:
        dataset = read_dataset(self.path)
        names = _names(dataset)
        contours = dict(_contours(dataset))
        for number, value in self.structures:
            try:
                mask = rasterised([_points(contour) for contour in contours.get(number, [])], image)
            except ValueError as error:
                raise outside(self.path, names.get(number, str(number)), [str(error)]) from error
            yield value, mask


def describe(path: Path) -> Annotation:
    """An RTSTRUCT's references and structures.

    Raises:
        UnreadableVolumeError: it is damaged.
    """
    dataset = read_dataset(path)
    contours = dict(_contours(dataset))
    names = _names(dataset)
    series, instances = set(), set()
    frames = [str(dataset.get("FrameOfReferenceUID") or "")]
    for frame in dataset.get("ReferencedFrameOfReferenceSequence") or []:
        frames.append(str(frame.get("FrameOfReferenceUID") or ""))
        for study in frame.get("RTReferencedStudySequence") or []:
            for each in study.get("RTReferencedSeriesSequence") or []:
                series.add(str(each.get("SeriesInstanceUID") or ""))
                images = each.get("ContourImageSequence") or []
                instances |= {str(image.get("ReferencedSOPInstanceUID") or "") for image in images}
    undrawn = [name for number, name in names.items() if number not in contours]
    return Annotation(
        path=path,
        description=" ".join(str(dataset.get(key) or "") for key in ("SeriesDescription", "StructureSetLabel")),
        series=frozenset(series - {""}),
        instances=frozenset(instances - {""}),
        frame_of_reference=next(filter(None, reversed(frames)), ""),
        structures=tuple((number, name) for number, name in names.items() if number in contours),
        notes=tuple(f"'{name}' has no closed contour" for name in undrawn),
    )


def rasterised(contours: list[np.ndarray], image: sitk.Image) -> np.ndarray:
    """The voxels inside contours.

    Args:
        contours: (n, 3) each, positions in the patient, mm.
        image: the grid.

    Returns:
        bool, (z, y, x).

    Raises:
        ValueError: a contour lies in no slice of the image, or across slices.
    """
    columns, rows, slices = image.GetSize()
    crossings: dict[int, np.ndarray] = {}
    for points in contours:
        # decimals of the file and of the inverse are no reason to leave a voxel out
        x, y, z = np.round(continuous_index(points, image), 6).T
        place = round(float(z.mean()))
        if np.ptp(z) > 2 * SNAP_TOLERANCE:
            raise ValueError("a contour runs across slices; expected are contours in the plane of the images")
        if np.abs(z - place).max() > SNAP_TOLERANCE:
            between = f"{int(np.floor(z.mean()))} and {int(np.ceil(z.mean()))}"
            raise ValueError(f"a contour lies between the slices {between}")
        if not 0 <= place < slices:
            raise ValueError(f"a contour lies {-place if place < 0 else place - slices + 1} slice(s) outside")
        of_slice = crossings.setdefault(place, np.zeros((rows, columns + 1), np.int32))
        _count_crossings(np.stack([x, y], axis=1), of_slice)
    mask = np.zeros((slices, rows, columns), bool)
    for place, of_slice in crossings.items():
        mask[place] = np.cumsum(of_slice[:, :-1], axis=1) % 2 == 1
    return mask


def _count_crossings(polygon: np.ndarray, crossings: np.ndarray) -> None:
    """Add, to the first voxel right of them, the crossings of a polygon's edges with the lines of voxel centres.

    The parity of their running sum is the even-odd fill. Written out here because scikit-image's polygon fill takes
    time by voxels × points: minutes a structure set.

    Args:
        polygon: (n, 2), x and y in voxels.
        crossings: (rows, columns + 1), changed in place.
    """
    rows, columns = crossings.shape
    (x0, y0), (x1, y1) = polygon.T, np.roll(polygon, -1, axis=0).T
    first = np.clip(np.ceil(np.minimum(y0, y1)), 0, rows).astype(int)
    counts = np.clip(np.ceil(np.maximum(y0, y1)), 0, rows).astype(int) - first
    edge = np.repeat(np.arange(len(polygon)), counts)
    row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    x = x0[edge] + (row - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
    np.add.at(crossings, (row, np.clip(np.ceil(x), 0, columns - 1).astype(int)), 1)


def _names(dataset: Dataset) -> dict[int, str]:
    rois = dataset.get("StructureSetROISequence") or []
    return {int(roi.ROINumber): str(roi.get("ROIName") or "").strip() for roi in rois}


def _contours(dataset: Dataset) -> Iterator[tuple[int, list[Dataset]]]:
    """ROI number -> its closed contours, where there are any; points and open lines have no area."""
    for roi in dataset.get("ROIContourSequence") or []:
        contours = roi.get("ContourSequence") or []
        closed = [contour for contour in contours if str(contour.get("ContourGeometricType") or "") in CLOSED]
        closed = [contour for contour in closed if len(_coordinates(contour)) >= 9]
        if closed:
            yield int(roi.ReferencedROINumber), closed


def _coordinates(contour: Dataset) -> list[bytes]:
    """ContourData as it is stored: pydicom's decimal strings take minutes for a structure set."""
    data = contour.get_item("ContourData")
    if data is None or not data.value:
        return []
    return data.value.split(b"\\") if isinstance(data.value, bytes) else [str(each).encode() for each in data.value]


def _points(contour: Dataset) -> np.ndarray:
    values = np.array(_coordinates(contour), float)
    if len(values) % 3 or not np.isfinite(values).all():
        raise ValueError("a contour's data are no points")
    return values.reshape(-1, 3)
