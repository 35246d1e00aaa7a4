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

    A voxel belongs to a structure where its centre lies inside its contours: points on a contour are inside, and by the
    even-odd rule a contour within another is a hole, as is the inside of a keyhole. Slices without contours stay
    empty: nothing is interpolated.

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
    from skimage.draw import polygon

    columns, rows, slices = image.GetSize()
    mask = np.zeros((slices, rows, columns), bool)
    for points in contours:
        x, y, z = continuous_index(points, image).T
        place = round(float(z.mean()))
        if np.ptp(z) > 2 * SNAP_TOLERANCE:
            raise ValueError("a contour runs across slices; expected are contours in the plane of the images")
        if np.abs(z - place).max() > SNAP_TOLERANCE:
            raise ValueError(
                f"a contour lies between the slices {int(np.floor(z.mean()))} and {int(np.ceil(z.mean()))}"
            )
        if not 0 <= place < slices:
            raise ValueError(f"a contour lies {-place if place < 0 else place - slices + 1} slice(s) outside")
        inside = polygon(y, x, (rows, columns))
        mask[place][inside] ^= True
    return mask


def _names(dataset: Dataset) -> dict[int, str]:
    rois = dataset.get("StructureSetROISequence") or []
    return {int(roi.ROINumber): str(roi.get("ROIName") or "").strip() for roi in rois}


def _contours(dataset: Dataset) -> Iterator[tuple[int, list[Dataset]]]:
    """ROI number -> its closed contours, where there are any; points and open lines have no area."""
    for roi in dataset.get("ROIContourSequence") or []:
        contours = roi.get("ContourSequence") or []
        closed = [contour for contour in contours if str(contour.get("ContourGeometricType") or "") in CLOSED]
        closed = [contour for contour in closed if len(contour.get("ContourData") or []) >= 9]
        if closed:
            yield int(roi.ReferencedROINumber), closed


def _points(contour: Dataset) -> np.ndarray:
    values = np.array(contour.ContourData, float)
    if len(values) % 3 or not np.isfinite(values).all():
        raise ValueError("a contour's data are no points")
    return values.reshape(-1, 3)
