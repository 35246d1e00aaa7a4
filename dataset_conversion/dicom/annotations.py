"""RTSTRUCT and DICOM SEG objects: what they label, and the label maps they make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from diffseg_nnunet.verification import UnreadableVolumeError, listed

from ..sources import Read
from .series import DAMAGED, DicomSeries

if TYPE_CHECKING:
    import SimpleITK as sitk


@dataclass(frozen=True)
class Annotation:
    """What an object's header says.

    Attributes:
        path: its file.
        description: SeriesDescription and, of an RTSTRUCT, StructureSetLabel: what --annotation looks at.
        series: UIDs of the image series it refers to.
        instances: UIDs of the images it refers to.
        frame_of_reference: UID; tells the images where it names no series.
        structures: (ROI or segment number, name) of all that have an area.
        notes: what is special, one clause each.
    """

    path: Path
    description: str
    series: frozenset[str]
    instances: frozenset[str]
    frame_of_reference: str
    structures: tuple[tuple[int, str], ...]
    notes: tuple[str, ...] = ()


class Drawn(Protocol):
    """Structures that one object draws: (number, label value)."""

    path: Path
    structures: tuple[tuple[int, int], ...]

    def masks(self, image: sitk.Image) -> Iterator[tuple[int, np.ndarray]]:
        """(label value, mask of the image's shape (z, y, x)), one a structure."""
        ...


@dataclass(frozen=True)
class DrawnLabel:
    """A label map on the grid of its image series.

    Structures of one value are united. Where structures overlap, the smaller one (fewer voxels in this case) wins, so
    that a tumour is not hidden by its organ; of equal ones the higher value.

    Attributes:
        series: the images.
        objects: what is drawn on them; each value comes from one of them.
    """

    series: DicomSeries
    objects: tuple[Drawn, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(drawn.path for drawn in self.objects)

    def read(self, read: Read) -> sitk.Image:
        import SimpleITK as sitk

        self._refuse_versions()
        image = read(self.series)
        packed: dict[int, np.ndarray] = {}
        for drawn in self.objects:
            try:
                for value, mask in drawn.masks(image):
                    # an eighth of the memory: a structure set may hold dozens of structures
                    bits = np.packbits(mask)
                    packed[value] = packed[value] | bits if value in packed else bits
            except DAMAGED as error:
                raise UnreadableVolumeError(drawn.path, f"it is damaged ({error})") from error
        label = np.zeros(image.GetSize()[::-1], np.uint8 if max(packed, default=0) < 256 else np.uint16)
        sizes = {value: int(np.count_nonzero(np.unpackbits(bits))) for value, bits in packed.items()}
        for value in sorted(packed, key=lambda value: (-sizes[value], value)):
            mask = np.unpackbits(packed[value], count=label.size).reshape(label.shape)
            label[mask.astype(bool)] = value
        painted = sitk.GetImageFromArray(label)
        painted.CopyInformation(image)
        return painted

    def _refuse_versions(self) -> None:
        """Two readers' contours of one organ are no label; which of them counts only the user knows."""
        first: dict[int, Path] = {}
        for drawn in self.objects:
            for value in {value for _, value in drawn.structures}:
                if first.setdefault(value, drawn.path) != drawn.path:
                    reason = f"it draws a structure that {first[value]} draws as well, on the same images"
                    mend = "Choose one of them with --annotation, by its description, or move the other away."
                    raise UnreadableVolumeError(drawn.path, reason, "label_twice", mend)


def continuous_index(points: np.ndarray, image: sitk.Image) -> np.ndarray:
    """Positions in the patient, (n, 3), mm -> places on the grid, (n, 3), in voxels along x, y, z."""
    axes = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    return (np.asarray(points) - image.GetOrigin()) @ np.linalg.inv(axes).T


def outside(path: Path, name: str, details: list[str]) -> UnreadableVolumeError:
    """The refusal of an object that does not fit its images."""
    reason = f"'{name}' does not fit the images it refers to: {listed(details, 3)}"
    return UnreadableVolumeError(path, reason, "label_geometry", "Export images and labels together.")
