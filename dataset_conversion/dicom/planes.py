"""Image planes as DICOM headers describe them, one a file (CT, MR) or one a frame (Enhanced CT, Enhanced MR)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydicom import Dataset

CLASSIC_IMAGES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
}
ENHANCED_IMAGES = {
    "1.2.840.10008.5.1.4.1.1.2.1": "CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "CT",  # legacy converted
    "1.2.840.10008.5.1.4.1.1.4.1": "MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "MR",  # legacy converted
}


@dataclass(frozen=True)
class Plane:
    """One image plane; what its header lacks, or has in a form that is no number, is None.

    Attributes:
        path: its file.
        frame: its index in a multi-frame file; None where the file is one plane.
        position: of the centre of the first voxel, mm, in the patient's left-posterior-superior frame.
        orientation: direction cosines of a row, then of a column.
        spacing: between rows, then between columns, mm.
        size: rows, columns.
        rescale: slope and intercept from stored to real values.
        image_type: DICOM's ImageType or FrameType.
        acquisition, echo, time: what tells apart several images at one position in one series.
    """

    path: Path
    frame: int | None
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    size: tuple[int, int]
    rescale: tuple[float, float] | None
    image_type: tuple[str, ...]
    acquisition: str
    echo: str
    time: str


def planes(dataset: Dataset, path: Path) -> tuple[Plane, ...]:
    """The planes of an image: a header is enough, pixels are not touched."""
    if str(dataset.get("SOPClassUID", "")) in ENHANCED_IMAGES:
        return framed_planes(dataset, path)
    return (_plane(_Groups([dataset]), path, None, dataset),)


def framed_planes(dataset: Dataset, path: Path) -> tuple[Plane, ...]:
    """The planes of a multi-frame object, from its functional groups: a frame's own ones come before shared ones."""
    shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])[:1]
    found = []
    for frame, own in enumerate(dataset.get("PerFrameFunctionalGroupsSequence") or []):
        macros = [item for group in (own, *shared) for element in group if element.VR == "SQ" for item in element.value]
        found.append(_plane(_Groups(macros), path, frame, dataset))
    return tuple(found)


def words(value: Any) -> tuple[str, ...]:
    """A value of one or many strings, empty or missing, as strings."""
    if value is None or value == "":
        return ()
    return (str(value),) if isinstance(value, str) or not hasattr(value, "__iter__") else tuple(map(str, value))


class _Groups:
    """The first of several data sets that has an attribute gives it."""

    def __init__(self, datasets: list[Dataset]):
        self._datasets = datasets

    def __call__(self, *keywords: str) -> Any:
        for keyword in keywords:
            for dataset in self._datasets:
                if (value := dataset.get(keyword)) is not None:
                    return value
        return None


def _plane(get: _Groups, path: Path, frame: int | None, dataset: Dataset) -> Plane:
    slope, intercept = get("RescaleSlope"), get("RescaleIntercept")
    rescale = _numbers((1 if slope is None else slope, 0 if intercept is None else intercept), 2)
    return Plane(
        path=path,
        frame=frame,
        position=_numbers(get("ImagePositionPatient"), 3),
        orientation=_numbers(get("ImageOrientationPatient"), 6),
        spacing=_numbers(get("PixelSpacing"), 2),
        size=(int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)),
        rescale=rescale,
        image_type=tuple(word.upper() for word in words(get("FrameType", "ImageType"))),
        acquisition=str(get("FrameAcquisitionNumber", "AcquisitionNumber")),
        echo=str(get("EffectiveEchoTime", "EchoNumbers", "EchoTime")),
        time=str(get("TemporalPositionIndex", "TemporalPositionIdentifier")),
    )


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    try:
        numbers = tuple(float(entry) for entry in value)
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None
