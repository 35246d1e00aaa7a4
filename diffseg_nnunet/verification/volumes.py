"""Reading a volume whole, or not at all.

SimpleITK alone is not enough. It reads a truncated ``.nii`` or ``.nii.gz`` without an error and leaves the rest of the
voxels empty, it reads NaN in them as 0, and it reports success when the disk is full: `read_volume` and `walk_nifti`
look at the whole file instead. As most of the time goes into decompressing it, `read_volume` does so once: the voxels
are those it has looked at, the geometry is SimpleITK's.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from diffseg_nnunet.verification.findings import Finding

NOT_FINITE = "NaN or infinite (one is enough to turn a network's weights into NaN)"
MEND_NOT_FINITE = "Replace them, for example by the value of air."
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 20
_NIFTI_HEADER_BYTES = 348
_NIFTI_MAGIC = b"n+1\0"
# data types of NIfTI-1 that are one number a voxel -> numpy's, and SimpleITK's
_NIFTI_TYPES = {
    2: ("u1", sitk.sitkUInt8),
    4: ("i2", sitk.sitkInt16),
    8: ("i4", sitk.sitkInt32),
    16: ("f4", sitk.sitkFloat32),
    64: ("f8", sitk.sitkFloat64),
    256: ("i1", sitk.sitkInt8),
    512: ("u2", sitk.sitkUInt16),
    768: ("u4", sitk.sitkUInt32),
    1024: ("i8", sitk.sitkInt64),
    1280: ("u8", sitk.sitkUInt64),
}


class UnreadableVolumeError(Exception):
    """A file is missing, damaged, no volume, or would be read wrongly.

    Attributes:
        path: the file.
        reason: why, without the file's name.
        code: as in `Finding`.
        mend: as in `Finding`.
    """

    def __init__(self, path: Path, reason: str, code: str = "unreadable", mend: str = "Download or export it again."):
        super().__init__(f"{path} cannot be used: {reason}.")
        self.path, self.reason, self.code, self.mend = path, reason, code, mend

    def as_finding(self, case: str) -> Finding:
        """The same as a finding about `case`."""
        return Finding(self.code, case, f"{self.path} cannot be used: {self.reason}.", self.mend)


def read_volume(path: Path) -> sitk.Image:
    """Read a volume, voxels and geometry, after making sure that SimpleITK will read what the file says.

    Raises:
        UnreadableVolumeError: the file is missing, truncated, damaged, or no image that SimpleITK knows; or it is a
            NIfTI file with NaN or infinite voxels, which SimpleITK would turn into 0 without a word.
    """
    if not path.is_file():
        reason = "the link leads nowhere" if path.is_symlink() else "there is no such file"
        raise UnreadableVolumeError(path, reason, "missing_file")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    if not path.name.endswith((".nii", ".nii.gz")):
        return _executed(reader, path)
    header, voxels, not_finite = _looked_at(path, keep=True)
    if not_finite:
        raise UnreadableVolumeError(path, f"{not_finite} of its voxels are {NOT_FINITE}", "not_finite", MEND_NOT_FINITE)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise UnreadableVolumeError(path, _last_words(error)) from error
    if voxels is None or not header.is_read_by(reader):
        return _executed(reader, path)
    return _assembled(reader, header, voxels)


def walk_nifti(path: Path) -> int:
    """Read a NIfTI file to its end and count its NaN and infinite voxels.

    Raises:
        UnreadableVolumeError: the file cannot be read, is truncated or damaged (gzip must find its checksum right, and
            there must be as many voxels as the header promises), or is no NIfTI-1 file.
    """
    return _looked_at(path, keep=False)[2]


@dataclass(frozen=True)
class _Header:
    """What a NIfTI-1 header says of the voxels.

    Attributes:
        promised: bytes of all voxels.
        offset: where they begin, bytes.
        dtype: as they are stored; None where a voxel is not one number (a colour, a complex number, a bit, ...).
        pixel_id: SimpleITK's for `dtype`.
        plain: they are the values meant, without a scale or an intercept, and in this very file.
    """

    promised: int
    offset: int
    dtype: np.dtype | None
    pixel_id: int
    plain: bool

    @classmethod
    def of(cls, path: Path, header: bytes) -> _Header:
        """Of the first bytes of a file.

        Raises:
            UnreadableVolumeError: they are no header of NIfTI-1.
        """
        order = next((order for order in "<>" if header[:4] == struct.pack(f"{order}i", _NIFTI_HEADER_BYTES)), None)
        if order is None or len(header) < _NIFTI_HEADER_BYTES:
            two = header[4:7] in (b"n+2", b"ni2")
            reason = "it is a NIfTI-2 file, which ITK does not know" if two else "it has no NIfTI header"
            mend = "Save it as NIfTI-1." if two else "Download or export it again."
            raise UnreadableVolumeError(path, reason, mend=mend)
        count, *extents = struct.unpack_from(f"{order}8h", header, 40)
        kind, bits = struct.unpack_from(f"{order}2h", header, 70)
        offset, slope, intercept = struct.unpack_from(f"{order}3f", header, 108)
        stored, pixel_id = _NIFTI_TYPES.get(kind, (None, sitk.sitkUnknown))
        # a slope of 0 or NaN is none
        plain = (slope in (0, 1) or math.isnan(slope)) and (intercept == 0 or math.isnan(intercept))
        return cls(
            promised=math.prod(max(1, extent) for extent in extents[: max(0, count)]) * bits // 8,
            offset=int(offset) if math.isfinite(offset) else 0,
            dtype=None if stored is None else np.dtype(order + stored),
            pixel_id=pixel_id,
            plain=plain and header[344:348] == _NIFTI_MAGIC,
        )

    def is_read_by(self, reader: sitk.ImageFileReader) -> bool:
        """Whether SimpleITK would read the stored voxels as they are and in their order."""
        return (
            self.plain
            and self.dtype is not None
            and reader.GetNumberOfComponents() == 1
            and reader.GetPixelID() == self.pixel_id
            and math.prod(reader.GetSize()) * self.dtype.itemsize == self.promised
        )


def _looked_at(path: Path, *, keep: bool) -> tuple[_Header, NDArray[np.uint8] | None, int]:
    """A NIfTI file read to its end: header, voxels as bytes (None unless wanted), number of those not finite.

    Raises:
        UnreadableVolumeError: as in :func:`walk_nifti`.
    """
    with _opened(path) as stream:
        header = _Header.of(path, stream.read(_NIFTI_HEADER_BYTES))
        stream.read(max(0, header.offset - _NIFTI_HEADER_BYTES))
        voxels = _empty(header.promised) if keep and header.plain and header.dtype is not None else None
        floats = header.dtype is not None and header.dtype.kind == "f"
        missing, not_finite = header.promised, 0
        while missing > 0 and (chunk := stream.read(min(_CHUNK_BYTES, missing))):
            if voxels is not None:
                start = header.promised - missing
                voxels[start : start + len(chunk)] = np.frombuffer(chunk, np.uint8)
            missing -= len(chunk)
            if floats and len(chunk) % header.dtype.itemsize == 0:
                not_finite += int(np.count_nonzero(~np.isfinite(np.frombuffer(chunk, header.dtype))))
        if missing:
            reason = f"it is truncated, {missing} of {header.promised} bytes of its voxels are missing"
            raise UnreadableVolumeError(path, reason)
        # gzip's checksum comes after the last byte
        while stream.read(_CHUNK_BYTES):
            pass
    return header, voxels, not_finite


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO | gzip.GzipFile]:
    """The file's content, decompressed where it is compressed, whatever its name says."""
    try:
        with path.open("rb") as raw:
            compressed = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
            raw.seek(0)
            if compressed and not path.name.endswith(".gz"):
                reason = "it is compressed, but its name does not end with .gz, by which programs tell"
                raise UnreadableVolumeError(path, reason, mend=f"Rename it {path.name}.gz.")
            yield gzip.GzipFile(fileobj=raw) if compressed else raw
    except EOFError as error:
        raise UnreadableVolumeError(path, "it is truncated, its compressed stream has no end") from error
    except (OSError, zlib.error) as error:
        raise UnreadableVolumeError(path, f"it is damaged or may not be read ({error})") from error


def _empty(size: int) -> NDArray[np.uint8] | None:
    """Room for so many bytes; None where there is not so much: a damaged header may promise anything."""
    try:
        return np.empty(size, np.uint8)
    except (MemoryError, ValueError):
        return None


def _assembled(reader: sitk.ImageFileReader, header: _Header, voxels: NDArray[np.uint8]) -> sitk.Image:
    """What the reader would read, of voxels that were read already."""
    array = voxels.view(header.dtype).reshape(reader.GetSize()[::-1])
    image = sitk.GetImageFromArray(array.astype(header.dtype.newbyteorder("="), copy=False), isVector=False)
    image.SetSpacing(reader.GetSpacing())
    image.SetOrigin(reader.GetOrigin())
    image.SetDirection(reader.GetDirection())
    for key in reader.GetMetaDataKeys():
        image.SetMetaData(key, reader.GetMetaData(key))
    return image


def _executed(reader: sitk.ImageFileReader, path: Path) -> sitk.Image:
    try:
        return reader.Execute()
    except RuntimeError as error:
        raise UnreadableVolumeError(path, _last_words(error)) from error


def _last_words(error: RuntimeError) -> str:
    """The part of a SimpleITK error that says what happened, without its source files."""
    if "orthonormal" in str(error):
        return "its axes are not orthonormal (sheared, or rounded in the header), a geometry that ITK does not read"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("sitk::ERROR: ").rstrip(".") if lines else "SimpleITK gives no reason"
