"""Reading a volume whole, or not at all.

SimpleITK alone is not enough. It reads a truncated ``.nii`` or ``.nii.gz`` without an error and leaves the rest of the
voxels empty, it reads NaN in them as 0, and it reports success when the disk is full: `read_volume` and `walk_nifti`
look at the whole file instead.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import SimpleITK as sitk

from diffseg_nnunet.verification.findings import Finding

NOT_FINITE = "NaN or infinite (one is enough to turn a network's weights into NaN)"
MEND_NOT_FINITE = "Replace them, for example by the value of air."
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 20
_NIFTI_HEADER_BYTES = 348
_NIFTI_FLOATS = {16: "f4", 64: "f8"}


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
    if path.name.endswith((".nii", ".nii.gz")) and (count := walk_nifti(path)):
        raise UnreadableVolumeError(path, f"{count} of its voxels are {NOT_FINITE}", "not_finite", MEND_NOT_FINITE)
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise UnreadableVolumeError(path, _last_words(error)) from error


def walk_nifti(path: Path) -> int:
    """Read a NIfTI file to its end and count its NaN and infinite voxels.

    Raises:
        UnreadableVolumeError: the file cannot be read, is truncated or damaged (gzip must find its checksum right, and
            there must be as many voxels as the header promises), or is no NIfTI-1 file.
    """
    try:
        with path.open("rb") as raw:
            compressed = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
            raw.seek(0)
            return _walk(path, gzip.GzipFile(fileobj=raw) if compressed else raw)
    except EOFError as error:
        raise UnreadableVolumeError(path, "it is truncated, its compressed stream has no end") from error
    except (OSError, zlib.error) as error:
        raise UnreadableVolumeError(path, f"it is damaged or may not be read ({error})") from error


def _walk(path: Path, stream: BinaryIO | gzip.GzipFile) -> int:
    header = stream.read(_NIFTI_HEADER_BYTES)
    order = next((order for order in "<>" if header[:4] == struct.pack(f"{order}i", _NIFTI_HEADER_BYTES)), None)
    if order is None or len(header) < _NIFTI_HEADER_BYTES:
        two = header[4:7] in (b"n+2", b"ni2")
        reason = "it is a NIfTI-2 file, which ITK does not know" if two else "it has no NIfTI header"
        raise UnreadableVolumeError(path, reason, mend="Save it as NIfTI-1." if two else "Download or export it again.")
    count, *extents = struct.unpack_from(f"{order}8h", header, 40)
    kind, bits = struct.unpack_from(f"{order}2h", header, 70)
    (offset,) = struct.unpack_from(f"{order}f", header, 108)
    promised = math.prod(max(1, extent) for extent in extents[: max(0, count)]) * bits // 8
    dtype = np.dtype(order + _NIFTI_FLOATS[kind]) if kind in _NIFTI_FLOATS else None
    stream.read(max(0, int(offset) - _NIFTI_HEADER_BYTES))
    missing, not_finite = promised, 0
    while missing > 0 and (chunk := stream.read(min(_CHUNK_BYTES, missing))):
        missing -= len(chunk)
        if dtype is not None and len(chunk) % dtype.itemsize == 0:
            not_finite += int(np.count_nonzero(~np.isfinite(np.frombuffer(chunk, dtype))))
    if missing:
        raise UnreadableVolumeError(path, f"it is truncated, {missing} of {promised} bytes of its voxels are missing")
    # gzip's checksum comes after the last byte
    while stream.read(_CHUNK_BYTES):
        pass
    return not_finite


def _last_words(error: RuntimeError) -> str:
    """The part of a SimpleITK error that says what happened, without its source files."""
    if "orthonormal" in str(error):
        return "its axes are not orthonormal (sheared, or rounded in the header), a geometry that ITK does not read"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("sitk::ERROR: ").rstrip(".") if lines else "SimpleITK gives no reason"
