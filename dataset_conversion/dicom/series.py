"""A stack of DICOM images as a volume."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydicom.errors import BytesLengthException

from diffseg_nnunet.verification import UnreadableVolumeError

from ..sources import Read
from .pixels import real_values
from .planes import Plane, planes
from .stack import NoStackError, Stack, stack

if TYPE_CHECKING:
    import SimpleITK as sitk
    from pydicom import Dataset

_INT16 = np.iinfo(np.int16)
# what pydicom raises where an attribute holds what it must not; values are parsed when they are asked for
DAMAGED = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    NotImplementedError,
    OSError,
    EOFError,
    struct.error,
    BytesLengthException,
)


@dataclass(frozen=True)
class DicomSeries:
    """One stack, ordered by position; file names and instance numbers do not matter.

    Voxels are int16 where all values are whole numbers that fit, else float32. PixelPaddingValue is kept.

    Attributes:
        paths: its files, in any order; a multi-frame file is one.
        frames: the frames of a multi-frame file that belong to the stack; None: all.
    """

    paths: tuple[Path, ...]
    frames: tuple[int, ...] | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return self.paths

    def read(self, read: Read) -> sitk.Image:
        import SimpleITK as sitk

        found = self.stack()
        volume = None
        places = {plane: place for place, plane in enumerate(found.planes)}
        for dataset, of_file in _opened(found.planes):
            for plane in of_file:
                values = _values(dataset, plane)
                if volume is None:
                    # not before there are pixels of the size that the header promises
                    volume = np.empty((len(found.planes), *values.shape), np.int16)
                if volume.dtype == np.int16 and not _fits(values):
                    volume = volume.astype(np.float32)
                volume[places[plane]] = values
        image = sitk.GetImageFromArray(volume)
        image.SetSpacing(found.spacing)
        image.SetOrigin(found.origin)
        image.SetDirection(found.direction.ravel().tolist())
        return image

    def stack(self) -> Stack:
        """Its planes, ordered and checked; reads headers only.

        Raises:
            UnreadableVolumeError: a file is missing or damaged, or the files are no volume.
        """
        found = [plane for path in self.paths for plane in read_planes(path)]
        if self.frames is not None:
            found = [plane for plane in found if plane.frame in self.frames]
        try:
            return stack(found)
        except NoStackError as error:
            where = self.paths[0] if len(self.paths) == 1 else self.paths[0].parent
            reason = f"the series of {self.paths[0].name} ({len(found)} images) {error.reason}"
            raise UnreadableVolumeError(where, reason, "geometry", error.mend) from error


def _values(dataset: Dataset, plane: Plane) -> np.ndarray:
    try:
        return real_values(dataset, plane)
    except DAMAGED as error:
        raise UnreadableVolumeError(plane.path, f"its header is damaged ({error})") from error


def read_dataset(path: Path, *, pixels: bool = True) -> Dataset:
    """A DICOM file, with or without its preamble.

    Raises:
        UnreadableVolumeError: it is missing, truncated in its header, or no DICOM file.
    """
    from pydicom import dcmread

    _without_warnings()
    try:
        # files of old archives lack the preamble; what is no DICOM at all has no SOPClassUID either
        dataset = dcmread(path, stop_before_pixels=not pixels, force=True)
        if "SOPClassUID" not in dataset:
            raise ValueError("it is no DICOM file")
    except Exception as error:  # at damaged files pydicom raises whatever comes
        raise UnreadableVolumeError(path, f"it cannot be read ({error})") from error
    if getattr(dataset, "file_meta", None) is None or "TransferSyntaxUID" not in dataset.file_meta:
        _assume_syntax(dataset)
    return dataset


@cache
def _without_warnings() -> None:
    """Spare the user a line for every value that is not to the letter of the standard: archives are full of them.

    What matters here is checked here.
    """
    from pydicom import config

    config.settings.reading_validation_mode = config.IGNORE


def read_planes(path: Path) -> tuple[Plane, ...]:
    """The planes of an image file; reads its header only.

    Raises:
        UnreadableVolumeError: as :func:`read_dataset`, or its attributes are damaged.
    """
    dataset = read_dataset(path, pixels=False)
    try:
        return planes(dataset, path)
    except DAMAGED as error:
        raise UnreadableVolumeError(path, f"its header is damaged ({error})") from error


def _assume_syntax(dataset: Dataset) -> None:
    """Without file meta information the encoding that was found in reading is all there is."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    implicit, little = dataset.original_encoding
    dataset.file_meta = FileMetaDataset()
    explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def _opened(ordered: tuple[Plane, ...]) -> Iterator[tuple[Dataset, list[Plane]]]:
    """Each file once, with its planes."""
    by_file = sorted(ordered, key=lambda plane: (str(plane.path), plane.frame or 0))
    for path, of_file in groupby(by_file, key=lambda plane: plane.path):
        yield read_dataset(path), list(of_file)


def _fits(values: np.ndarray) -> bool:
    if values.min() < _INT16.min or values.max() > _INT16.max:
        return False
    return np.issubdtype(values.dtype, np.integer) or bool((values == np.round(values)).all())
