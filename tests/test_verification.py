"""Every defect is found, named with its file, and told apart from the others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from diffseg_nnunet.raw_dataset import Case, RawDataset
from diffseg_nnunet.verification import (
    Finding,
    UnreadableVolumeError,
    check_case,
    in_threads,
    listed,
    read_volume,
    verify_dataset,
)

SIZE = (9, 8, 7)


def oblique(seed: int) -> tuple[list[float], list[float], list[float]]:
    """Spacing, origin (mm) and direction cosines of a randomly rotated grid."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    return rng.uniform(0.5, 4, 3).tolist(), rng.uniform(-300, 300, 3).tolist(), rotation.ravel().tolist()


def write(path: Path, voxels: np.ndarray, seed: int = 0, **geometry: list[float]) -> Path:
    """Write `voxels` (z, y, x) with the geometry of `seed`, single properties of it replaced."""
    volume = sitk.GetImageFromArray(voxels)
    spacing, origin, direction = oblique(seed)
    volume.SetSpacing(geometry.get("spacing", spacing))
    volume.SetOrigin(geometry.get("origin", origin))
    volume.SetDirection(geometry.get("direction", direction))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(volume, str(path), True)
    return path


def noise(seed: int = 0, size: tuple[int, ...] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def organs(dtype: type = np.uint8) -> np.ndarray:
    label = np.zeros(SIZE, dtype)
    label[2:4], label[4:6] = 1, 2
    return label


def truncate(path: Path, fraction: float = 0.6) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])


@pytest.fixture
def case(tmp_path: Path) -> Case:
    image = write(tmp_path / "imagesTr/liver_1_0000.nii.gz", noise())
    return Case("liver_1", (image,), write(tmp_path / "labelsTr/liver_1.nii.gz", organs()))


def findings(case: Case, channel_count: int = 1, label_values: frozenset[int] | None = frozenset({0, 1, 2})) -> dict:
    allowed = None if label_values is None else set(label_values)
    return {finding.code: finding for finding in check_case(case, channel_count=channel_count, label_values=allowed)}


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
    assert [finding.code for finding in found] == ["missing_label"]


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
    assert "does not name: 7, 255 (named are 0, 1, 2)" in finding.message
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


def test_integers_saved_as_floats_are_accepted(case: Case) -> None:
    write(case.label, organs(np.float64))
    assert findings(case) == {}


def test_image_and_label_of_different_size(case: Case) -> None:
    write(case.label, organs()[:-1])
    message = only(findings(case), "label_size").message
    assert "(7, 8, 8) voxels" in message
    assert "(7, 8, 9)" in message
    assert str(case.label) in message


@pytest.mark.parametrize("name", ["spacing", "origin", "direction"])
def test_image_and_label_of_different_geometry(case: Case, name: str) -> None:
    values = dict(zip(("spacing", "origin", "direction"), oblique(0), strict=True))[name]
    changed = oblique(1)[2] if name == "direction" else [values[0] + 0.01, *values[1:]]
    write(case.label, organs(), **{name: changed})
    message = only(findings(case), f"label_{name}").message
    assert f"{changed[0]:.4f}"[:5] in message
    assert f"{values[0]:.4f}"[:5] in message
    assert ("5.1e-06" if name == "spacing" else "0.001") + " is tolerated" in message


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
    changed = [spacing[0] * 1.0002, *spacing[1:]]
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


# --- a whole data set -----------------------------------------------------------------------------------------------


def make_dataset(root: Path, **changes: object) -> Path:
    folder = root / "Dataset003_Liver"
    for number in (1, 2):
        write(folder / f"imagesTr/liver_{number}_0000.nii.gz", noise(number), seed=number)
        write(folder / f"labelsTr/liver_{number}.nii.gz", organs(), seed=number)
    write(folder / "imagesUn/pool_1_0000.nii.gz", noise(3))
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "tumour": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
        **changes,
    }
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def verify(folder: Path, workers: int = 2) -> list[Finding]:
    return verify_dataset(RawDataset.open(folder), workers=workers)


def test_a_sound_dataset_and_its_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    dataset = RawDataset.open(make_dataset(tmp_path))
    assert verify_dataset(dataset, workers=2, progress=lambda done, total: seen.append((done, total))) == []
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_one_bad_case_does_not_hide_another(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path)
    truncate(folder / "imagesTr/liver_1_0000.nii.gz")
    truncate(folder / "imagesUn/pool_1_0000.nii.gz")
    assert [(finding.case, finding.code) for finding in verify(folder)] == [
        ("liver_1", "unreadable"),
        ("pool_1", "unreadable"),
    ]


def test_a_pool_without_labels_is_sound(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path, numTraining=0, labels={"background": 0})
    for path in [*folder.glob("imagesTr/*"), *folder.glob("labelsTr/*")]:
        path.unlink()
    assert verify(folder) == []
    (folder / "imagesUn/pool_1_0000.nii.gz").unlink()
    assert [finding.code for finding in verify(folder)] == ["no_cases"]


@pytest.mark.parametrize("key", ["channel_names", "labels", "numTraining", "file_ending"])
def test_a_missing_key(tmp_path: Path, key: str) -> None:
    (finding,) = verify(make_dataset(tmp_path, **{key: None}))
    assert finding.code == "missing_key"
    assert f"'{key}'" in finding.message


@pytest.mark.parametrize(
    ("labels", "code", "words"),
    [
        ({"background": 0, "a": 1, "b": 3, "c": 2, "d": 5}, "labels_not_consecutive", "0, 1, 2, 3, 5"),
        ({"liver": 0, "a": 1, "b": 2}, "labels_background", "background"),
        ({"background": 0, "a": "one", "b": 2}, "label_definition", "one"),
        ({"background": 0, "ignore": 1, "b": 2}, "ignore_not_highest", "must be the highest"),
        ({"background": 0, "all": [1, 2], "b": 2}, "missing_key", "regions_class_order"),
    ],
)
def test_labels_that_nnunet_refuses(tmp_path: Path, labels: dict, code: str, words: str) -> None:
    (finding,) = verify(make_dataset(tmp_path, labels=labels))
    assert finding.code == code
    assert words in finding.message


def test_regions_and_ignore_are_fine(tmp_path: Path) -> None:
    labels = {"background": 0, "all": [1, 2], "b": 2, "ignore": 3}
    assert verify(make_dataset(tmp_path, labels=labels, regions_class_order=[1, 2])) == []


def test_numtraining_that_does_not_fit(tmp_path: Path) -> None:
    (finding,) = verify(make_dataset(tmp_path, numTraining=5))
    assert finding.code == "num_training"
    assert "has 2 training cases" in finding.message
    assert "numTraining is 5" in finding.message


@pytest.mark.parametrize(
    ("gone", "code", "words"),
    [
        ("labelsTr/liver_2.nii.gz", "missing_label", "has no label liver_2.nii.gz in labelsTr"),
        ("imagesTr/liver_2_0000.nii.gz", "missing_image", "has no image liver_2_0000.nii.gz in imagesTr"),
    ],
)
def test_files_without_counterpart(tmp_path: Path, gone: str, code: str, words: str) -> None:
    folder = make_dataset(tmp_path)
    (folder / gone).unlink()
    found = {finding.code: finding for finding in verify(folder)}
    assert words in found[code].message
    assert found[code].case == "liver_2"


def test_an_identifier_both_labelled_and_unlabelled(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path)
    (folder / "imagesUn/pool_1_0000.nii.gz").rename(folder / "imagesUn/liver_1_0000.nii.gz")
    (finding,) = verify(folder)
    assert (finding.code, finding.case, finding.severity) == ("duplicate_identifier", "liver_1", "error")


def test_a_test_case_seen_in_training_and_names_that_differ_by_case_are_warnings(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path)
    write(folder / "imagesTs/liver_1_0000.nii.gz", noise())
    write(folder / "imagesUn/Liver_2_0000.nii.gz", noise())
    found = verify(folder)
    assert [(finding.code, finding.severity) for finding in found] == [("duplicate_identifier", "warning")] * 2
    assert "imagesTs" in found[0].message
    assert "Liver_2, liver_2" in found[1].message


def test_names_that_nnunet_would_cut_or_overlook(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path)
    write(folder / "imagesUn/plain.nii.gz", noise())
    write(folder / "imagesUn/pool_1_0000.nrrd", noise())
    write(folder / "imagesUn/other_0000.mha", noise())
    messages = [finding.message for finding in verify(folder) if finding.code == "bad_name"]
    assert len(messages) == 3
    assert "other_0000.mha does not end in .nii.gz" in messages[0]
    assert "plain.nii.gz has no channel number" in messages[1]
    assert "pool_1_0000.nrrd and pool_1_0000.nii.gz are the same case twice" in messages[2]


def test_a_gap_in_the_channels_and_an_unsafe_identifier(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path)
    write(folder / "imagesUn/gap_0001.nii.gz", noise())
    write(folder / "imagesUn/scan_seg_0000.nii.gz", noise())
    assert {finding.code: finding.case for finding in verify(folder)} == {
        "channel_numbers": "gap",
        "bad_identifier": "scan_seg",
    }


def test_the_dataset_key_is_honoured(tmp_path: Path) -> None:
    entry = {"images": ["imagesTr/liver_1_0000.nii.gz"], "label": "labelsTr/gone.nii.gz"}
    folder = make_dataset(tmp_path, dataset={"x": entry}, numTraining=1)
    (finding,) = verify(folder)
    assert (finding.code, finding.case) == ("missing_file", "x")


def test_threads_keep_the_order_and_raise_the_first_error() -> None:
    assert in_threads(lambda number: number**2, range(20), workers=4) == [number**2 for number in range(20)]
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda number: 1 / number, [1, 0, 2], workers=1)


def test_long_lists_are_cut() -> None:
    assert listed(range(3)) == "0, 1, 2"
    assert listed(range(13)).endswith("9, and 3 more")
