"""Where the voxels of a case come from: a file, a channel of a 4D file, one binary mask an organ, ...

A source is a small frozen (hence hashable) dataclass that names its files and reads them on demand. What one case needs
twice (the 4D file behind four channels, the DICOM series behind an image and its contours) is read once: a source reads
other sources through the `read` it is given, which remembers them for the time of the case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from diffseg_nnunet.verification.volumes import UnreadableVolumeError, read_volume

if TYPE_CHECKING:
    import SimpleITK as sitk

Read = Callable[["VolumeSource"], "sitk.Image"]


class VolumeSource(Protocol):
    """A volume that can be read."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files it is made of, the most telling one first: messages name that one."""
        ...

    def read(self, read: Read) -> sitk.Image:
        """The volume with its geometry.

        Args:
            read: reads another source, at most once a case.

        Raises:
            UnreadableVolumeError: a file is missing, damaged, or not what it should be.
        """
        ...


@dataclass(frozen=True)
class VolumeFile:
    """One file that is the volume; a .nii.gz whose voxels and header may stay as they are is linked, not rewritten."""

    path: Path

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self, read: Read) -> sitk.Image:
        return read_volume(self.path)


@dataclass(frozen=True)
class Channel:
    """One channel of a 4D file of `count` channels."""

    path: Path
    index: int
    count: int

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self, read: Read) -> sitk.Image:
        volume = read(VolumeFile(self.path))
        if volume.GetDimension() != 4 or volume.GetSize()[3] != self.count:
            size = "×".join(str(extent) for extent in volume.GetSize())
            reason = f"it is {volume.GetDimension()}D, {size} voxels; expected is 4D with {self.count} channels"
            raise UnreadableVolumeError(self.path, reason, "channel_count", "Mend the channel names, or the file.")
        # SimpleITK's slicing keeps spacing, origin and direction of the first three axes
        return volume[:, :, :, self.index]


@dataclass(frozen=True)
class MergedMasks:
    """A label map made of one binary mask a structure: voxels of a mask that are not 0 get its value.

    Where masks overlap, the later one wins. Memory: the merged map and one mask at a time.

    Attributes:
        masks: (file, value), in the order in which they are painted.
    """

    masks: tuple[tuple[Path, int], ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(path for path, _ in self.masks)

    def read(self, read: Read) -> sitk.Image:
        import SimpleITK as sitk

        merged, first = None, None
        for path, value in self.masks:
            mask = read_volume(path)
            if first is None:
                first, merged = mask, np.zeros(mask.GetSize()[::-1], np.uint16)
            if mask.GetSize() != first.GetSize():
                reason = f"it has {mask.GetSize()} voxels, {self.masks[0][0].name} has {first.GetSize()}"
                raise UnreadableVolumeError(path, reason, "label_size", "Export the masks again.")
            if (shift := _displacement(mask, first)) > min(first.GetSpacing()) / 2:
                reason = f"it lies up to {shift:.3g} mm away from {self.masks[0][0].name}"
                raise UnreadableVolumeError(path, reason, "label_origin", "Export the masks again.")
            merged[sitk.GetArrayViewFromImage(mask) != 0] = value
        image = sitk.GetImageFromArray(merged)
        image.CopyInformation(first)
        return image


def _displacement(volume: sitk.Image, reference: sitk.Image) -> float:
    """Largest distance (mm) between the same corners of two grids of equal size."""
    corners = [
        [int(side * (extent - 1)) for side, extent in zip(sides, volume.GetSize(), strict=True)]
        for sides in np.ndindex(*(2,) * volume.GetDimension())
    ]
    return max(
        float(np.linalg.norm(np.subtract(*(image.TransformIndexToPhysicalPoint(at) for image in (volume, reference)))))
        for at in corners
    )


def channels(files: Sequence[Path], count: int) -> tuple[VolumeSource, ...]:
    """One source a file; the channels of the one file, which then must be 4D, where `count` are wanted."""
    if len(files) == 1 < count:
        return tuple(Channel(files[0], index, count) for index in range(count))
    return tuple(VolumeFile(path) for path in files)
