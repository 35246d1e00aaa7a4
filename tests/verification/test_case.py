"""Every defect of a case is found, named with its file, and told apart from the others."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from diffseg_nnunet.raw_dataset import Case
from diffseg_nnunet.verification import Finding, UnreadableVolumeError, Volume, check_case, examine, read_volume
from tests.verification.conftest import SIZE, noise, oblique, organs, truncate, write


def findings(case: Case, channel_count: int = 1, label_values: frozenset[int] | None = frozenset({0, 1, 2})) -> dict:
    allowed = None if label_values is None else set(label_values)
    examination = check_case(case, channel_count=channel_count, label_values=allowed)
    return {finding.code: finding for finding in examination.findings}


def only(found: dict[str, Finding], code: str) -> Finding:
    assert list(found) == [code]
    assert found[code].mend
    return found[code]


def test_a_sound_case_has_no_finding(case: Case) -> None:
    assert findings(case) == {}


def test_an_unlabelled_case_is_sound_unless_a_label_is_required(case: Case) -> None:
    unlabelled = Case(case.identifier, case.images, None)
    assert findings(unlabelled) == {}
    found = check_case(unlabelled, channel_count=1, label_values={0}, label_required=True)
    assert [finding.code for finding in found.findings] == ["missing_label"]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_nii_gz_is_caught(case: Case, fraction: float) -> None:
    truncate(case.images[0], fraction)
    finding = only(findings(case), "unreadable")
    assert str(case.images[0]) in finding.message
    assert finding.case == "liver_1"
    if fraction > 0.2:
        assert "truncated" in finding.message


def test_a_nii_gz_without_its_last_bytes_is_caught(case: Case) -> None:
    case.images[0].write_bytes(case.images[0].read_bytes()[:-4])
    assert "truncated" in only(findings(case), "unreadable").message


def test_a_nii_gz_that_was_compressed_after_truncation_is_caught(case: Case) -> None:
    content = gzip.decompress(case.images[0].read_bytes())
    case.images[0].write_bytes(gzip.compress(content[:-100]))
    assert f"100 of {4 * 9 * 8 * 7} bytes of its voxels are missing" in only(findings(case), "unreadable").message


def test_a_flipped_byte_is_caught(case: Case) -> None:
    content = bytearray(case.images[0].read_bytes())
    content[len(content) // 2] ^= 0xFF
    case.images[0].write_bytes(bytes(content))
    assert "cannot be used" in only(findings(case), "unreadable").message


@pytest.mark.parametrize("ending", [".nii", ".mha", ".nrrd"])
def test_truncated_files_of_other_formats_are_caught(tmp_path: Path, ending: str) -> None:
    image = write(tmp_path / f"case_0000{ending}", noise())
    assert findings(Case("case", (image,), None)) == {}
    truncate(image)
    assert "cannot be used" in only(findings(Case("case", (image,), None)), "unreadable").message


def test_a_text_file_is_no_volume(case: Case) -> None:
    case.images[0].write_text("<html>Please log in</html>" * 50)
    assert "no NIfTI header" in only(findings(case), "unreadable").message


def test_a_missing_file_and_a_broken_link_are_told(case: Case) -> None:
    case.images[0].unlink()
    assert "there is no such file" in only(findings(case), "missing_file").message
    case.images[0].symlink_to("nowhere")
    assert "the link leads nowhere" in only(findings(case), "missing_file").message


def test_sheared_axes_are_explained(tmp_path: Path) -> None:
    affine = np.diag([1.0, 1, 2, 1])
    affine[0, 1] = 0.3
    path = tmp_path / "sheared.nii.gz"
    nibabel.save(nibabel.Nifti1Image(noise(), affine), path)
    with pytest.raises(UnreadableVolumeError, match="not orthonormal"):
        read_volume(path)


def test_a_big_endian_file_is_measured_correctly(tmp_path: Path) -> None:
    path = tmp_path / "big.nii.gz"
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.float32)
    nibabel.save(nibabel.Nifti1Image(noise(), np.eye(4), header=header), path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(path)), noise().T)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(UnreadableVolumeError, match="1 of 2016 bytes"):
        read_volume(path)


def test_nifti_2_is_named(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti2Image(noise(), np.eye(4)), tmp_path / "two.nii.gz")
    with pytest.raises(UnreadableVolumeError, match="NIfTI-2"):
        read_volume(tmp_path / "two.nii.gz")


def test_an_uncompressed_file_named_nii_gz_is_read(case: Case) -> None:
    case.images[0].write_bytes(gzip.decompress(case.images[0].read_bytes()))
    assert findings(case) == {}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_in_an_image(case: Case, value: float) -> None:
    voxels = noise()
    voxels[3, 4, 5] = value
    write(case.images[0], voxels)
    finding = only(findings(case), "not_finite")
    assert str(case.images[0]) in finding.message
    assert "NaN or infinite" in finding.message


@pytest.mark.parametrize("ending", [".nii", ".mha", ".nrrd"])
def test_nan_in_other_formats(tmp_path: Path, ending: str) -> None:
    voxels = noise()
    voxels[3, 4, 5] = np.nan
    image = write(tmp_path / f"case_0000{ending}", voxels)
    assert only(findings(Case("case", (image,), None)), "not_finite")


def test_a_constant_image_is_an_error(case: Case) -> None:
    write(case.images[0], np.full(SIZE, -1000, np.int16))
    finding = only(findings(case), "constant_image")
    assert finding.severity == "error"
    assert f"{case.images[0]} is constant, -1000 in every voxel: nothing can be learnt" in finding.message


def test_a_constant_channel_beside_another_is_a_warning(case: Case) -> None:
    empty = case.images[0].with_name("case_0001.nii.gz")
    write(empty, np.zeros(SIZE, np.int16))
    both = Case(case.identifier, (case.images[0], empty), case.label)
    finding = only(findings(both, channel_count=2), "constant_image")
    assert finding.severity == "warning"
    assert f"{empty} is constant, 0 in every voxel" in finding.message


def test_an_empty_label_is_a_warning(case: Case) -> None:
    write(case.label, np.zeros(SIZE, np.uint8))
    assert only(findings(case), "empty_label").severity == "warning"


@pytest.mark.parametrize("size", [(8, 9), (3, 9, 8, 7)])
def test_a_file_that_is_not_3d(tmp_path: Path, size: tuple[int, ...]) -> None:
    path = tmp_path / "case_0000.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(noise(size=size), isVector=False), str(path))
    finding = only(findings(Case("case", (path,), None)), "not_3d")
    assert f"is {len(size)}D" in finding.message


def test_colours_are_no_volume(tmp_path: Path) -> None:
    path = tmp_path / "case_0000.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(noise(size=(7, 8, 9, 3)), isVector=True), str(path))
    assert "vector" in only(findings(Case("case", (path,), None)), "not_scalar").message


def test_unknown_label_values_are_listed(case: Case) -> None:
    label = organs()
    label[0, 0, :2] = 7, 255
    write(case.label, label)
    finding = only(findings(case), "label_values")
    assert "that have no name: 7, 255 (named are 0, 1, 2)" in finding.message
    assert findings(case, label_values=None) == {}


def test_label_values_that_are_no_integers(case: Case) -> None:
    label = organs(np.float32)
    label[0, 0, :2] = 0.5, 1.25
    write(case.label, label)
    assert "0.5, 1.25" in only(findings(case), "label_not_integer").message


def test_nan_in_a_label(case: Case) -> None:
    label = organs(np.float32)
    label[0, 0, 0] = np.nan
    write(case.label, label)
    assert "NaN" in only(findings(case), "not_finite").message


def test_integers_saved_as_floats_are_a_warning(case: Case) -> None:
    write(case.label, organs(np.float64))
    finding = only(findings(case), "label_float")
    assert finding.severity == "warning"
    assert "64-bit float" in finding.message
    assert "diffseg convert" in finding.mend


def test_image_and_label_of_different_size(case: Case) -> None:
    write(case.label, organs()[:-1])
    message = only(findings(case), "label_size").message
    assert "(7, 8, 8) voxels" in message
    assert "(7, 8, 9)" in message
    assert str(case.label) in message


@pytest.mark.parametrize("name", ["spacing", "origin", "direction"])
def test_image_and_label_of_different_geometry(case: Case, name: str) -> None:
    values = dict(zip(("spacing", "origin", "direction"), oblique(0), strict=True))[name]
    changed = oblique(1)[2] if name == "direction" else [values[0] + 1.5, *values[1:]]
    write(case.label, organs(), **{name: changed})
    message = only(findings(case), f"label_{name}").message
    assert f"{changed[0]:.4f}"[:5] in message
    assert f"{values[0]:.4f}"[:5] in message
    assert ("5.6e-06" if name == "spacing" else "0.001") + " is tolerated" in message


@pytest.mark.parametrize(("name", "severity"), [("origin", "warning"), ("direction", "warning"), ("spacing", "error")])
def test_a_header_rounded_to_three_digits_is_jitter(case: Case, name: str, severity: str) -> None:
    values = dict(zip(("spacing", "origin", "direction"), oblique(0), strict=True))[name]
    turned = (
        Rotation.from_euler("z", 0.1, degrees=True).as_matrix() @ np.reshape(values, (3, 3)) if len(values) == 9 else 0
    )
    changed = turned.ravel().tolist() if len(values) == 9 else [value * 1.001 for value in values]
    write(case.label, organs(), **{name: changed})
    finding = only(findings(case), "label_jitter")
    assert finding.severity == severity
    assert f"differ in {name}" in finding.message
    assert "diffseg convert" in finding.mend
    assert ("nnU-Net stops" in finding.message) == (severity == "error")
    volumes = [Volume(path, read_volume(path)) for path in (*case.images, case.label)]
    (mended,) = examine("a", volumes[:1], volumes[1], channel_count=1, label_values={0, 1, 2}, repairs=True).findings
    assert (mended.code, mended.severity) == ("label_jitter", "warning")
    assert "the copy is mended" in mended.mend


def test_half_a_voxel_is_no_jitter(case: Case) -> None:
    spacing, origin, direction = oblique(0)
    half = np.reshape(direction, (3, 3)) @ np.array([spacing[0] / 2, 0, 0])
    write(case.label, organs(), origin=(np.array(origin) + half).tolist())
    assert only(findings(case), "label_origin").severity == "error"


def test_a_direction_that_the_header_does_not_state(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(noise(), None)
    image.header.set_sform(None, 0)
    image.header.set_qform(None, 0)
    nibabel.save(image, tmp_path / "case_0000.nii.gz")
    examination = check_case(Case("case", (tmp_path / "case_0000.nii.gz",), None), channel_count=1, label_values=None)
    (finding,) = examination.findings
    assert (finding.code, finding.severity) == ("direction_missing", "warning")
    assert "left and right are a guess" in finding.message
    assert not examination.record.direction_stated


@pytest.mark.parametrize(("name", "shift"), [("spacing", 1e-6), ("origin", 4e-4)])
def test_rounding_of_a_header_is_tolerated(case: Case, name: str, shift: float) -> None:
    values = dict(zip(("spacing", "origin"), oblique(0), strict=False))[name]
    write(case.label, organs(), **{name: [value + shift for value in values]})
    assert findings(case) == {}


def test_channels_of_different_geometry(case: Case, tmp_path: Path) -> None:
    second = write(tmp_path / "imagesTr/liver_1_0001.nii.gz", noise(1), origin=[0.0, 0, 0])
    both = Case("liver_1", (*case.images, second), case.label)
    finding = only(findings(both, channel_count=2), "channel_origin")
    assert str(second) in finding.message


def test_spacings_that_nnunet_would_stop_at(case: Case, tmp_path: Path) -> None:
    spacing = oblique(0)[0]
    changed = [spacing[0] * 1.1, *spacing[1:]]
    second = write(tmp_path / "imagesTr/liver_1_0001.nii.gz", noise(1), spacing=changed)
    both = Case("liver_1", (*case.images, second), case.label)
    assert only(findings(both, channel_count=2), "channel_spacing")
    write(case.label, organs(), spacing=changed)
    assert only(findings(case), "label_spacing")


def test_an_unreadable_first_channel_hides_no_other_finding(case: Case, tmp_path: Path) -> None:
    truncate(case.images[0])
    second = write(tmp_path / "imagesTr/liver_1_0001.nii.gz", noise(1), origin=[0.0, 0, 0])
    found = findings(Case("liver_1", (*case.images, second), case.label), channel_count=2)
    assert set(found) == {"unreadable", "label_origin"}


def test_wrong_number_of_channels_and_no_image_at_all(case: Case) -> None:
    assert "has 1 image(s), the data set 2" in only(findings(case, channel_count=2), "channel_count").message
    assert only(findings(Case("liver_1", (), case.label)), "missing_image")
