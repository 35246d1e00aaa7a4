"""What is wrong with dataset.json, with the listing, or with several cases."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from diffseg_nnunet.raw_dataset import RawDataset
from diffseg_nnunet.verification import Finding, examine_dataset, in_threads, listed, of_severity, verify_dataset
from tests.verification.conftest import make_dataset, noise, organs, truncate, write


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
    (finding,) = of_severity(verify(make_dataset(tmp_path, labels=labels)), "error")
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
    ("groups", "severity", "words"),
    [
        ([["liver_1", "pool_1"], ["liver_2"]], None, ""),
        ([["liver_1", "gone"]], "warning", "'same_patient' in dataset.json names 1 case(s) that are not here: gone."),
        ([["liver_1", "test_1"]], "warning", "1 case(s) show patients of test images, which therefore are no unseen"),
        ([["liver_1"], ["liver_1"]], "error", "is no list of groups, or names a case twice"),
    ],
)
def test_patients(tmp_path: Path, groups: list, severity: str | None, words: str) -> None:
    folder = make_dataset(tmp_path, same_patient=groups)
    (folder / "imagesTs").mkdir(exist_ok=True)
    shutil.copy(folder / "imagesUn/pool_1_0000.nii.gz", folder / "imagesTs/test_1_0000.nii.gz")
    found = [finding for finding in verify(folder) if finding.code == "same_patient"]
    assert [finding.severity for finding in found] == ([] if severity is None else [severity])
    assert all(words in finding.message for finding in found)


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
    write(folder / "imagesTs/liver_1_0000.nii.gz", noise(8))
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
    write(folder / "imagesUn/gap_0001.nii.gz", noise(8))
    write(folder / "imagesUn/scan_seg_0000.nii.gz", noise())
    assert {finding.code: finding.case for finding in verify(folder)} == {
        "channel_numbers": "gap",
        "bad_identifier": "scan_seg",
    }


def test_a_broken_test_case_is_a_warning_and_its_label_is_looked_at(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path)
    truncate(write(folder / "imagesTs/t_1_0000.nii.gz", noise(8)))
    write(folder / "imagesTs/t_2_0000.nii.gz", noise(9))
    write(folder / "labelsTs/t_2.nii.gz", organs() * 7)
    found = [(finding.case, finding.code, finding.severity) for finding in verify(folder)]
    assert found == [("t_1", "unreadable", "warning"), ("t_2", "label_values", "warning")]


def test_records_of_all_roles_and_what_is_known_is_not_read(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path)
    write(folder / "imagesTs/t_1_0000.nii.gz", noise(8))
    first = examine_dataset(RawDataset.open(folder), workers=1)
    assert [(record.case, record.role) for record in first.records] == [
        *(("liver_1", "training"), ("liver_2", "training"), ("pool_1", "unlabelled"), ("t_1", "test")),
    ]
    for path in folder.glob("images*/*"):
        truncate(path)
    again = examine_dataset(RawDataset.open(folder), workers=1, known=first.cases.get)
    assert again == first
    assert len(of_severity(examine_dataset(RawDataset.open(folder), workers=1).findings, "error")) == 3


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
