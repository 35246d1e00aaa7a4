"""Series of images as volumes, against SimpleITK's GDCM, and the ones that are no volume."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import (
    MPEG2MPML,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from diffseg_nnunet.dataset_conversion.dicom.planes import Plane
from diffseg_nnunet.dataset_conversion.dicom.series import DicomSeries
from diffseg_nnunet.dataset_conversion.dicom.stack import NoStackError, stack
from diffseg_nnunet.verification import UnreadableVolumeError

from .written import (
    ORIGIN,
    SIZE,
    SPACING,
    assert_same_volume,
    by_gdcm,
    rotation,
    save,
    stored_values,
    write_series,
)

SHUFFLED = [4, 0, 5, 2, 1, 3]


def read(paths: list[Path]) -> sitk.Image:
    return DicomSeries(tuple(paths)).read(lambda source: source.read(None))


def refusal(paths: list[Path]) -> str:
    with pytest.raises(UnreadableVolumeError) as caught:
        read(paths)
    assert caught.value.mend
    return str(caught.value)


# --- the right volume -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [range(6), range(5, -1, -1), SHUFFLED], ids=["in order", "reversed", "shuffled"])
@pytest.mark.parametrize("oblique", [None, 1, 2])
def test_position_orders_the_slices(tmp_path: Path, numbers: list[int], oblique: int | None) -> None:
    direction = np.eye(3) if oblique is None else rotation(oblique)
    paths = write_series(tmp_path, stored_values(), direction=direction, numbers=numbers)
    volume = read(paths[::-1])
    assert_same_volume(volume, by_gdcm(tmp_path))
    assert volume.GetPixelID() == sitk.sitkInt16
    np.testing.assert_array_equal(sitk.GetArrayFromImage(volume), stored_values() - 1024)
    np.testing.assert_allclose(volume.GetDirection(), direction.ravel(), atol=1e-6)
    np.testing.assert_allclose(volume.GetSpacing(), SPACING, atol=1e-6)
    np.testing.assert_allclose(volume.GetOrigin(), ORIGIN, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(5)), st.floats(0.3, 8))
def test_any_grid_is_found_again(seed: int, order: list[int], between: float) -> None:
    axes = rotation(seed)
    origin = np.random.default_rng(seed).uniform(-500, 500, 3)
    orientation = tuple(np.round([*axes[:, 0], *axes[:, 1]], 6))
    found = stack(
        [
            Plane(
                Path(f"{place}"),
                None,
                tuple(np.round(origin + place * between * axes[:, 2], 3)),
                orientation,
                (0.9, 0.7),
                (4, 4),
                (1, 0),
                (),
                "",
                "",
                "",
            )
            for place in order
        ]
    )
    assert [plane.path.name for plane in found.planes] == [str(place) for place in range(5)]
    np.testing.assert_allclose(found.spacing, (0.7, 0.9, between), atol=2e-3)
    np.testing.assert_allclose(found.origin, origin, atol=1e-3)
    np.testing.assert_allclose(found.direction, axes, atol=1e-5)
    np.testing.assert_allclose(found.direction.T @ found.direction, np.eye(3), atol=1e-12)


@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEG2000Lossless,
        JPEGLSLossless,
    ],
)
@pytest.mark.parametrize("signed", [False, True])
def test_every_coding_gives_the_same_values(tmp_path: Path, syntax: str, signed: bool) -> None:
    # OpenJPEG wants 32 voxels a side
    stored = stored_values(low=-2000 if signed else 0, high=2000, size=(3, 40, 36))
    volume = read(write_series(tmp_path, stored, syntax=syntax, signed=signed))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(volume), stored - 1024)
    assert_same_volume(volume, by_gdcm(tmp_path))


def test_what_pydicom_cannot_decode_gdcm_does(tmp_path: Path) -> None:
    """JPEG Lossless, which many archives use; SimpleITK encodes it as well."""
    stored = stored_values()
    paths = write_series(tmp_path, stored)
    for path, pixels in zip(paths, stored, strict=True):
        writer = sitk.ImageFileWriter()
        writer.SetFileName(str(tmp_path / "coded"))
        writer.SetImageIO("GDCMImageIO")
        writer.UseCompressionOn()
        writer.SetCompressor("JPEG")
        writer.Execute(sitk.GetImageFromArray(pixels.astype(np.uint16)))
        coded, image = dcmread(tmp_path / "coded"), dcmread(path)
        assert coded.file_meta.TransferSyntaxUID.name.startswith("JPEG Lossless")
        image.file_meta.TransferSyntaxUID = coded.file_meta.TransferSyntaxUID
        image["PixelData"] = coded["PixelData"]
        image.save_as(path)
    volume = read(paths)
    assert volume.GetPixelID() == sitk.sitkInt16
    np.testing.assert_array_equal(sitk.GetArrayFromImage(volume), stored - 1024)


@pytest.mark.parametrize(("signed", "bits"), [(False, 12), (True, 12), (True, 16), (False, 16)])
def test_signs_and_bits(tmp_path: Path, signed: bool, bits: int) -> None:
    half = 1 << (bits - 1)
    stored = stored_values(low=-half if signed else 0, high=half if signed else 2 * half)
    stored[0, 0, :2] = stored.min(), stored.max()
    volume = read(write_series(tmp_path, stored, signed=signed, bits=bits, rescale=(1, 0)))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(volume), stored)
    fits = stored.max() <= np.iinfo(np.int16).max
    assert volume.GetPixelID() == (sitk.sitkInt16 if fits else sitk.sitkFloat32)
    assert_same_volume(volume, by_gdcm(tmp_path))


def test_what_is_in_the_unused_bits_is_no_value(tmp_path: Path) -> None:
    stored = stored_values(high=4096)
    paths = write_series(tmp_path, stored, bits=12, rescale=(1, 0))
    for path in paths:
        image = dcmread(path)
        image.PixelData = (np.frombuffer(image.PixelData, "<u2") | 0xA000).astype("<u2").tobytes()
        save(image, path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read(paths)), stored)


def test_each_slice_has_its_own_slope_and_intercept(tmp_path: Path) -> None:
    stored = stored_values()
    rescale = [(0.5 + place, -place) for place in range(SIZE[0])]
    volume = read(write_series(tmp_path, stored, rescale=rescale, modality="MR"))
    assert volume.GetPixelID() == sitk.sitkFloat32
    slopes, intercepts = (np.array(column)[:, None, None] for column in zip(*rescale, strict=True))
    np.testing.assert_allclose(sitk.GetArrayFromImage(volume), stored * slopes + intercepts, rtol=1e-6)


def test_whole_values_of_a_broken_slope_stay_integers(tmp_path: Path) -> None:
    stored = stored_values(high=1000) * 2
    volume = read(write_series(tmp_path, stored, rescale=(0.5, 0)))
    assert volume.GetPixelID() == sitk.sitkInt16
    np.testing.assert_array_equal(sitk.GetArrayFromImage(volume), stored // 2)


def test_values_without_rescaling_are_what_is_stored(tmp_path: Path) -> None:
    paths = write_series(tmp_path, stored_values(), modality="MR", RescaleSlope=None, RescaleIntercept=None)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read(paths)), stored_values())


def test_files_without_a_preamble(tmp_path: Path) -> None:
    paths = write_series(tmp_path, stored_values(), name="{:d}")
    for path in paths:
        image = dcmread(path)
        del image.file_meta
        image.preamble = None
        image.save_as(path, enforce_file_format=False, implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read(paths)), stored_values() - 1024)


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_enhanced_multi_frame_images(tmp_path: Path, modality: str) -> None:
    import highdicom as hd

    rescale = [(1, -place) for place in range(SIZE[0])]
    paths = write_series(
        tmp_path / "classic",
        stored_values(),
        direction=rotation(3),
        numbers=SHUFFLED,
        modality=modality,
        rescale=rescale,
        AcquisitionDate="20200102",
        AcquisitionTime="101500",
        ImageType=["ORIGINAL", "PRIMARY", "AXIAL", "NONE"],
        BurnedInAnnotation="NO",
    )
    converted = {"CT": hd.legacy.LegacyConvertedEnhancedCTImage, "MR": hd.legacy.LegacyConvertedEnhancedMRImage}
    enhanced = converted[modality]([dcmread(path) for path in paths], generate_uid(), 1, generate_uid(), 1)
    enhanced.save_as(tmp_path / "enhanced.dcm")
    assert_same_volume(read([tmp_path / "enhanced.dcm"]), read(paths))


def test_positions_rounded_to_a_tenth_of_a_millimetre_are_even(tmp_path: Path) -> None:
    positions = np.array(ORIGIN) + np.arange(6)[:, None] * [0, 0, 1.25]
    paths = write_series(tmp_path, stored_values(), positions=np.round(positions, 1))
    assert read(paths).GetSpacing()[2] == pytest.approx(1.25, abs=0.02)


# --- what is no volume ----------------------------------------------------------------------------------------------


def along(places: list[float]) -> np.ndarray:
    return np.array(ORIGIN) + np.array(places)[:, None] * [0.0, 0, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positions": along([0, 2, 4, 8, 10, 12])}, "lacks 1 slice(s), after IM0002.dcm: 2 mm apart, once 4 mm"),
        ({"positions": along([0, 2, 4, 10, 12, 14])}, "lacks 2 slice(s), after IM0002.dcm"),
        ({"positions": along([0, 2, 4, 6.9, 9, 11])}, "unevenly spaced: neighbours are 2 to 2.9 mm apart"),
        ({"positions": along([0, 2, 4, 4, 6, 8])}, "1 position(s) with more than one image, such as IM0002.dcm"),
        ({"positions": along([0, 2, 4, 0, 2, 4])}, "3 position(s) with more than one image"),
        ({"positions": along([1] * 6)}, "position(s) with more than one image"),
        ({"PixelSpacing": lambda place: [0.9, 0.8 if place else 0.9]}, "mixes pixel spacings from 0.8 to 0.9 mm"),
        (
            {"ImagePositionPatient": lambda place: None if place == 2 else [0, 0, place]},
            "no valid ImagePositionPatient",
        ),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "no unit vectors at right angles"),
        ({"ImageOrientationPatient": lambda place: [1, 0, 0, 0, 0, -1] if place > 3 else [1, 0, 0, 0, 1, 0]}, "orient"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "inverted (MONOCHROME1)"),
        ({"HighBit": 13}, "laid out as DICOM forbids"),
        ({"PixelSpacing": None}, "no valid PixelSpacing in 6 of 6 images"),
    ],
)
def test_series_that_are_no_volume(tmp_path: Path, changes: dict, words: str) -> None:
    assert words in refusal(write_series(tmp_path, stored_values(), **changes))


@pytest.mark.parametrize("degrees", [3, 12, -20])
def test_a_tilted_gantry_is_refused_with_its_angle(tmp_path: Path, degrees: float) -> None:
    shear = np.array([0, np.sin(np.radians(degrees)), np.cos(np.radians(degrees))])
    positions = np.array(ORIGIN) + np.arange(6)[:, None] * 5 * shear
    message = refusal(write_series(tmp_path, stored_values(), positions=positions))
    assert f"gantry tilt): its slices follow each other at {abs(degrees):.1f}°" in message


def test_slices_shifted_in_plane(tmp_path: Path) -> None:
    positions = along([0, 2, 4, 6, 8, 10])
    positions[3, 0] += 5
    assert "shifted against each other, by up to 5 mm" in refusal(
        write_series(tmp_path, stored_values(), positions=positions)
    )


def test_slices_of_different_sizes(tmp_path: Path) -> None:
    uid = generate_uid()
    paths = write_series(tmp_path, stored_values(), series=uid)
    other = write_series(tmp_path, stored_values(size=(2, 10, 10)), series=uid, name="b{}.dcm")
    assert "mixes images of different sizes (10×10, 14×11)" in refusal(paths + other)


@pytest.mark.parametrize(
    ("syntax", "change", "words"),
    [
        (ExplicitVRLittleEndian, lambda data: data[:-50], "cannot be decoded"),
        (JPEG2000Lossless, lambda data: data[:-60] + b"\0" * 60, "IM0003.dcm"),
        (ExplicitVRLittleEndian, lambda data: data[:60], "cannot be read"),
        (ExplicitVRLittleEndian, lambda data: b"no DICOM" * 50, "cannot be read"),
        (ExplicitVRLittleEndian, lambda data: b"", "cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, syntax: str, change: Callable, words: str) -> None:
    paths = write_series(tmp_path, stored_values(size=(4, 40, 36)), syntax=syntax)
    paths[3].write_bytes(change(paths[3].read_bytes()))
    message = refusal(paths)
    assert words in message
    assert "IM0003.dcm" in message


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(128, 1500), st.integers(0, 255)), min_size=1, max_size=5))
@example([(139, 0)])
def test_damaged_headers_are_read_or_refused(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    paths = sorted(tmp_path.glob("*.dcm")) or write_series(tmp_path, stored_values(size=(3, 14, 11)))
    whole = paths[1].read_bytes()
    damaged = bytearray(whole)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    paths[1].write_bytes(damaged)
    # anything but this error would end the conversion of all cases
    with contextlib.suppress(UnreadableVolumeError):
        read(paths)
    paths[1].write_bytes(whole)


def test_a_missing_file(tmp_path: Path) -> None:
    paths = write_series(tmp_path, stored_values())
    paths[3].unlink()
    assert "IM0003.dcm" in refusal(paths)


def test_a_coding_without_a_decoder_names_the_package(tmp_path: Path) -> None:
    paths = write_series(tmp_path, stored_values())
    for path in paths:
        image = dcmread(path)
        image.file_meta.TransferSyntaxUID = MPEG2MPML
        image.PixelData = encapsulate([bytes(40)])
        image["PixelData"].is_undefined_length = True
        image.save_as(path)
    with pytest.raises(UnreadableVolumeError, match="no decoder of its transfer syntax, MPEG2") as caught:
        read(paths)
    assert "pip install python-gdcm" in caught.value.mend


def test_no_stack_error_says_what_to_do() -> None:
    with pytest.raises(NoStackError, match="single image"):
        stack([])
