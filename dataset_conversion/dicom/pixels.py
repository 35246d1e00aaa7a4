"""Stored pixels of DICOM files, and the real values they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diffseg_nnunet.verification import UnreadableVolumeError

if TYPE_CHECKING:
    from pathlib import Path

    from pydicom import Dataset

    from .planes import Plane

# pydicom's only decoder of it here, Pillow's, knows no 12 bits
_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"


def real_values(dataset: Dataset, plane: Plane) -> np.ndarray:
    """What a plane shows (Hounsfield units in CT): slope × stored + intercept.

    Returns:
        (rows, columns); int64 where slope and intercept are whole, else float64.

    Raises:
        UnreadableVolumeError: no grey image, a coding without a decoder, or damaged.
    """
    refuse_odd_coding(dataset, plane.path)
    if _needs_gdcm(dataset):
        return _by_gdcm(plane)
    stored = _stored(dataset, plane)
    slope, intercept = plane.rescale
    if slope.is_integer() and intercept.is_integer():
        return stored * int(slope) + int(intercept)
    return stored * slope + intercept


def refuse_odd_coding(dataset: Dataset, path: Path) -> None:
    """Stop at what would be read wrongly."""

    def refuse(reason: str, mend: str = "Export the series again as plain grey images.") -> None:
        raise UnreadableVolumeError(path, reason, "coding", mend)

    if "PixelData" not in dataset:
        refuse("it has no pixel data", "Export the series again, with its pixels.")
    if dataset.get("SamplesPerPixel", 1) != 1:
        refuse("it is a colour image")
    photometric = str(dataset.get("PhotometricInterpretation", ""))
    if photometric == "MONOCHROME1":
        refuse("its grey values are inverted (MONOCHROME1), which means different things to different writers")
    if photometric != "MONOCHROME2":
        refuse(f"its PhotometricInterpretation is '{photometric}', expected is MONOCHROME2")
    if dataset.get("ModalityLUTSequence"):
        refuse("its values go through a Modality LUT, a table instead of slope and intercept")
    allocated, stored, high = (dataset.get(key) for key in ("BitsAllocated", "BitsStored", "HighBit"))
    if allocated not in (8, 16, 32) or not stored or not 1 <= stored <= allocated or high != stored - 1:
        refuse(f"its bits are laid out as DICOM forbids (allocated {allocated}, stored {stored}, high bit {high})")


def _needs_gdcm(dataset: Dataset) -> bool:
    """Whether SimpleITK's GDCM has to decode: of JPEG Lossless, for one, pydicom has no decoder of its own."""
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        return syntax == _JPEG_EXTENDED or not get_decoder(syntax).is_available
    except NotImplementedError:
        return True


def _by_gdcm(plane: Plane) -> np.ndarray:
    import SimpleITK as sitk
    from pydicom import dcmread

    try:
        if plane.frame is not None:
            raise RuntimeError
        values = sitk.GetArrayFromImage(sitk.ReadImage(str(plane.path), imageIO="GDCMImageIO"))
    except RuntimeError as error:
        name = dcmread(plane.path, specific_tags=[]).file_meta.TransferSyntaxUID.name
        raise UnreadableVolumeError(
            plane.path,
            f"there is no decoder of its transfer syntax, {name}",
            "coding",
            "Install one (pip install python-gdcm, or pylibjpeg-libjpeg), or export it uncompressed.",
        ) from error
    whole = np.issubdtype(values.dtype, np.integer)
    return values.reshape(plane.size).astype(np.int64 if whole else np.float64)


def _stored(dataset: Dataset, plane: Plane) -> np.ndarray:
    """Stored values as int64, sign and unused high bits taken care of."""
    from pydicom.pixels import pixel_array

    try:
        pixels = pixel_array(dataset, index=plane.frame or 0)
    except Exception as error:  # decoders raise whatever they like at damaged data
        name = dataset.file_meta.TransferSyntaxUID.name
        reason = f"its pixels ({name}) cannot be decoded ({str(error).splitlines()[0] if str(error) else error!r})"
        raise UnreadableVolumeError(plane.path, reason) from error
    if pixels.shape != plane.size:
        raise UnreadableVolumeError(plane.path, f"it has {pixels.shape} pixels, its header says {plane.size}")
    bits = int(dataset.BitsStored)
    values = pixels.astype(np.int64) & ((1 << bits) - 1)
    if dataset.get("PixelRepresentation") == 1:
        values -= (values >> (bits - 1)) << bits
    return values
