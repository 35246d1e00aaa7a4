"""DICOM series, RTSTRUCT and SEG objects for the tests: small, valid, and wrong where a test wants them to be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import SimpleITK as sitk
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, RTStructureSetStorage, generate_uid
from skimage.measure import find_contours

SIZE = (6, 14, 11)  # no whole number of bytes as bits
SPACING = (0.8, 0.9, 2.5)
ORIGIN = (-40.0, -55.5, 120.25)


def rotation(seed: int) -> np.ndarray:
    """A random right-handed frame, its columns the axes x, y, z."""
    matrix, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return matrix * np.sign(np.linalg.det(matrix))


def stored_values(seed: int = 0, low: int = 0, high: int = 4000, size: tuple[int, ...] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, size)


def write_series(
    folder: Path,
    stored: np.ndarray,
    *,
    direction: np.ndarray | None = None,
    spacing: Sequence[float] = SPACING,
    origin: Sequence[float] = ORIGIN,
    positions: np.ndarray | None = None,
    numbers: Sequence[int] | None = None,
    signed: bool = False,
    bits: int = 16,
    rescale: Any = (1, -1024),
    syntax: str = ExplicitVRLittleEndian,
    modality: str = "CT",
    series: str | None = None,
    frame_of_reference: str | None = None,
    name: str = "IM{:04d}.dcm",
    **tags: Any,
) -> list[Path]:
    """Write one file a slice and return them in the order of the slices.

    Args:
        stored: (z, y, x).
        positions: of the slices, (z, 3), instead of an even stack.
        numbers: InstanceNumber and number in the file name of each slice.
        rescale: (slope, intercept), or one pair a slice.
        tags: further attributes; a function gets the slice's index; None removes the attribute.
    """
    direction = np.eye(3) if direction is None else direction
    if positions is None:
        positions = np.array(origin) + np.arange(len(stored))[:, None] * spacing[2] * direction[:, 2]
    rescale = np.broadcast_to(rescale, (len(stored), 2))
    series, frame_of_reference = series or generate_uid(), frame_of_reference or generate_uid()
    folder.mkdir(parents=True, exist_ok=True)
    study = generate_uid()
    paths = []
    for index, pixels in enumerate(stored):
        number = index if numbers is None else numbers[index]
        image = _empty(CTImageStorage if modality == "CT" else MRImageStorage)
        image.update(_patient())
        image.StudyInstanceUID, image.SeriesInstanceUID = study, series
        image.FrameOfReferenceUID, image.Modality = frame_of_reference, modality
        image.SeriesNumber, image.InstanceNumber, image.AcquisitionNumber = 3, number + 1, 1
        image.SeriesDescription = "Abdomen"
        image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        image.PixelSpacing = [spacing[1], spacing[0]]
        image.SliceThickness = spacing[2]
        image.ImageOrientationPatient = [round(float(each), 8) for each in (*direction[:, 0], *direction[:, 1])]
        image.ImagePositionPatient = [round(float(each), 6) for each in positions[index]]
        image.Rows, image.Columns = pixels.shape
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit = 16, bits, bits - 1
        image.PixelRepresentation = int(signed)
        image.RescaleSlope, image.RescaleIntercept = (f"{value:g}" for value in rescale[index])
        for keyword, value in tags.items():
            value = value(index) if callable(value) else value
            if value is None:
                delattr(image, keyword)
            else:
                setattr(image, keyword, value)
        _store(image, pixels, bits, syntax)
        paths.append(folder / name.format(number))
        save(image, paths[-1], syntax)
    return paths


def _store(image: Dataset, pixels: np.ndarray, bits: int, syntax: str) -> None:
    big = syntax == "1.2.840.10008.1.2.2"
    raw = pixels.astype(np.int64) & ((1 << bits) - 1)
    image.PixelData = raw.astype(">u2" if big else "<u2").tobytes()
    image["PixelData"].VR = "OW"


def save(image: Dataset, path: Path, syntax: str = ExplicitVRLittleEndian) -> None:
    uid = UID(syntax)
    if uid.is_compressed and not uid.is_deflated:
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.compress(uid, generate_instance_uid=False)
    image.file_meta.TransferSyntaxUID = uid
    image.save_as(path, enforce_file_format=True)


def _empty(sop_class: str) -> Dataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    return dataset


def _patient() -> Dataset:
    dataset = Dataset()
    dataset.PatientID, dataset.PatientName = "P 01", "Nobody^Known"
    dataset.PatientBirthDate, dataset.PatientSex = "", ""
    dataset.StudyDate, dataset.StudyTime, dataset.StudyID, dataset.AccessionNumber = "20200102", "101500", "1", ""
    dataset.ReferringPhysicianName = dataset.Manufacturer = ""
    dataset.PositionReferenceIndicator = ""
    return dataset


def by_gdcm(folder: Path) -> sitk.Image:
    """The series as SimpleITK's GDCM reads it: the independent reference."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def assert_same_grid(one: sitk.Image, other: sitk.Image, places: float = 1e-3) -> None:
    """Equal extents, and every corner at the same place in the patient (mm)."""
    assert one.GetSize() == other.GetSize()
    for corner in np.ndindex(2, 2, 2):
        index = [int(side * (extent - 1)) for side, extent in zip(corner, one.GetSize(), strict=True)]
        np.testing.assert_allclose(
            one.TransformIndexToPhysicalPoint(index), other.TransformIndexToPhysicalPoint(index), atol=places
        )


def assert_same_volume(one: sitk.Image, other: sitk.Image) -> None:
    assert_same_grid(one, other)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(one), sitk.GetArrayFromImage(other))


def two_organs(size: tuple[int, ...] = SIZE) -> np.ndarray:
    """1: a ring (a hole in it) over all but the outer slices; 2: a block beside it."""
    z, y, x = np.indices(size)
    radius = np.hypot(y - size[1] * 0.35, x - size[2] * 0.4)
    mask = np.zeros(size, np.uint8)
    inner = (z > 0) & (z < size[0] - 1)
    mask[inner & (radius < 0.33 * size[2]) & (radius > 0.12 * size[2])] = 1
    mask[inner & (y > size[1] * 0.75) & (x > 2) & (x < size[2] - 2)] = 2
    return mask


def contours_of(mask: np.ndarray, image: sitk.Image) -> list[list[float]]:
    """Closed contours around a mask, slice by slice, as ContourData."""
    found = []
    for place, plane in enumerate(mask):
        for contour in find_contours(np.pad(plane.astype(float), 1), 0.5):
            points = [
                image.TransformContinuousIndexToPhysicalPoint((float(x - 1), float(y - 1), float(place)))
                for y, x in contour[:-1]
            ]
            found.append(np.round(points, 4).ravel().tolist())
    return found


def write_rtstruct(
    path: Path, images: Sequence[Path], rois: dict[str, list[list[float]]], kind: str = "CLOSED_PLANAR", **tags: Any
) -> Path:
    """An RTSTRUCT that refers to the series of `images`; ROI name -> its contours."""
    first = dcmread(images[0], stop_before_pixels=True)
    struct = _empty(RTStructureSetStorage)
    struct.update(_patient())
    struct.Modality, struct.StructureSetLabel = "RTSTRUCT", "RTSTRUCT"
    struct.StudyInstanceUID, struct.SeriesInstanceUID = first.StudyInstanceUID, generate_uid()
    series, study, frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID, series.ContourImageSequence = first.SeriesInstanceUID, []
    for image in images:
        reference = Dataset()
        reference.ReferencedSOPClassUID = first.SOPClassUID
        reference.ReferencedSOPInstanceUID = dcmread(image, stop_before_pixels=True).SOPInstanceUID
        series.ContourImageSequence.append(reference)
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = first.FrameOfReferenceUID, [study]
    struct.ReferencedFrameOfReferenceSequence = [frame]
    struct.StructureSetROISequence, struct.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(rois.items(), start=1):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName = number, name
        roi.ReferencedFrameOfReferenceUID = first.FrameOfReferenceUID
        drawn.ReferencedROINumber, drawn.ContourSequence = number, []
        for points in contours:
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(points) // 3
            contour.ContourData = [f"{value:.4f}" for value in points]
            drawn.ContourSequence.append(contour)
        struct.StructureSetROISequence.append(roi)
        struct.ROIContourSequence.append(drawn)
    for keyword, value in tags.items():
        setattr(struct, keyword, value)
    save(struct, path)
    return path


def write_seg(
    path: Path, images: Sequence[Path], masks: np.ndarray, names: Sequence[str], kind: str = "BINARY", **options: Any
) -> Path:
    """A DICOM SEG by highdicom of a label map (z, y, x) whose values 1, 2, ... have these names."""
    segments = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.Organ,
            segmented_property_type=codes.SCT.Liver,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, name in enumerate(names, start=1)
    ]
    pixels = masks.astype(np.uint8)
    if kind == "FRACTIONAL":
        pixels = np.stack([masks == number for number in range(1, len(names) + 1)], axis=-1) * 0.8
    segmentation = hd.seg.Segmentation(
        source_images=[dcmread(image) for image in images],
        pixel_array=pixels,
        segmentation_type=kind,
        segment_descriptions=segments,
        series_instance_uid=generate_uid(),
        series_number=9,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="Nobody",
        manufacturer_model_name="None",
        software_versions="0",
        device_serial_number="0",
        **options,
    )
    segmentation.save_as(path)
    return path
