"""DICOM SEG: segments on the grid of the images they label, through highdicom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffseg_nnunet.verification import UnreadableVolumeError

from .annotations import Annotation, continuous_index, outside
from .planes import Plane, framed_planes
from .series import read_dataset

if TYPE_CHECKING:
    import highdicom as hd
    import SimpleITK as sitk

# voxels: how far a segment's pixel may lie off the image's voxel
GRID_TOLERANCE = 0.1
LABELMAP, FRACTIONAL = "LABELMAP", "FRACTIONAL"


@dataclass(frozen=True)
class DicomSeg:
    """Segments of one DICOM SEG object (binary, fractional or label map).

    Each frame is placed by its position and orientation, so that order, missing empty frames and flipped or
    rotated planes do not matter, and nothing is resampled. Fractions count from one half on.

    Attributes:
        path: the object.
        structures: (segment number, label value).
    """

    path: Path
    structures: tuple[tuple[int, int], ...]

    def masks(self, image: sitk.Image) -> Iterator[tuple[int, np.ndarray]]:
        segmentation = _read(self.path)
        kind = str(segmentation.SegmentationType)
        threshold = int(segmentation.get("MaximumFractionalValue") or 1) / 2
        names = dict(describe(self.path).structures)
        numbers = [_segment(frame) for frame in segmentation.get("PerFrameFunctionalGroupsSequence") or []]
        frames = framed_planes(segmentation, self.path)
        for number, value in self.structures:
            mask = np.zeros(image.GetSize()[::-1], bool)
            for plane, of_frame in zip(frames, numbers, strict=True):
                if kind != LABELMAP and of_frame != number:
                    continue
                pixels = _frame(segmentation, plane)
                drawn = pixels == number if kind == LABELMAP else pixels >= threshold
                try:
                    _place(drawn, plane, image, mask)
                except ValueError as error:
                    raise outside(self.path, names.get(number, str(number)), [str(error)]) from error
            yield value, mask


def describe(path: Path) -> Annotation:
    """A DICOM SEG's references and segments.

    Raises:
        UnreadableVolumeError: it is damaged.
    """
    header = read_dataset(path, pixels=False)
    series = header.get("ReferencedSeriesSequence") or []
    instances = {
        str(instance.get("ReferencedSOPInstanceUID") or "")
        for each in series
        for instance in each.get("ReferencedInstanceSequence") or []
    }
    segments = [
        (int(segment.SegmentNumber), str(segment.get("SegmentLabel") or "").strip())
        for segment in header.get("SegmentSequence") or []
    ]
    fractional = str(header.get("SegmentationType")) == FRACTIONAL
    return Annotation(
        path=path,
        description=str(header.get("SeriesDescription") or ""),
        series=frozenset(str(each.get("SeriesInstanceUID") or "") for each in series) - {""},
        instances=frozenset(instances - {""}),
        frame_of_reference=str(header.get("FrameOfReferenceUID") or ""),
        # a label map may name its background, which is 0
        structures=tuple((number, name) for number, name in segments if number > 0),
        notes=("its fractions count from one half on",) if fractional else (),
    )


def _read(path: Path) -> hd.seg.Segmentation:
    from highdicom.seg import segread

    try:
        return segread(path)
    except Exception as error:  # highdicom checks the whole object, and says what is missing in many ways
        raise UnreadableVolumeError(path, f"it is no valid DICOM SEG object ({error})") from error


def _segment(frame: object) -> int | None:
    """The segment a frame belongs to; frames of label maps belong to none."""
    identification = frame.get("SegmentIdentificationSequence")
    return int(identification[0].ReferencedSegmentNumber) if identification else None


def _frame(segmentation: hd.seg.Segmentation, plane: Plane) -> np.ndarray:
    try:
        return segmentation.get_stored_frame(plane.frame + 1)
    except Exception as error:  # decoders raise whatever they like at damaged data
        raise UnreadableVolumeError(plane.path, f"its frame {plane.frame + 1} cannot be decoded ({error})") from error


def _place(drawn: np.ndarray, plane: Plane, image: sitk.Image, mask: np.ndarray) -> None:
    """Set the voxels of `mask` under the pixels of a frame.

    Raises:
        ValueError: its pixels are no voxels of the image.
    """
    if None in (plane.position, plane.orientation, plane.spacing):
        raise ValueError("a frame has no position, orientation or pixel spacing")
    rows, columns = np.nonzero(drawn)
    along_row, along_column = np.array(plane.orientation[:3]), np.array(plane.orientation[3:])
    row_spacing, column_spacing = plane.spacing
    corners = np.array([[0, 0], [0, drawn.shape[1] - 1], [drawn.shape[0] - 1, 0]])
    pixels = np.concatenate([corners, np.stack([rows, columns], axis=1)])
    points = np.array(plane.position) + (
        pixels[:, 1:] * column_spacing * along_row + pixels[:, :1] * row_spacing * along_column
    )
    places = continuous_index(points, image)
    voxels = np.round(places).astype(int)
    if np.abs(places - voxels).max() > GRID_TOLERANCE or not _one_to_one(voxels[:3], drawn.shape):
        raise ValueError("a frame's pixels are not the image's voxels")
    voxels = voxels[len(corners) :]
    if len(voxels) and (voxels.min() < 0 or (voxels >= image.GetSize()).any()):
        raise ValueError("it has voxels outside of the image")
    mask[tuple(voxels.T[::-1])] = True


def _one_to_one(corners: np.ndarray, shape: tuple[int, int]) -> bool:
    """Whether neighbours in the frame are neighbours in the image, seen at the frame's corners."""
    across, down = np.abs(corners[1] - corners[0]), np.abs(corners[2] - corners[0])
    return sorted(across) == [0, 0, shape[1] - 1] and sorted(down) == [0, 0, shape[0] - 1]
