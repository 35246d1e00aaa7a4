"""The raw data set's listing: names and JSON only, so empty files do."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import Case, RawDataset, split_channel, split_ending, visible_files, why_unusable

DATASET_JSON = {
    "channel_names": {"0": "T1", "1": "FLAIR"},
    "labels": {"background": 0, "lesion": 1},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def build(root: Path, files: list[str], content: dict | None = None) -> Path:
    folder = root / "Dataset007_Brain"
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON if content is None else content))
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cases = [f"imagesTr/{case}_000{channel}.nii.gz" for case in ("b_2", "a_1") for channel in (1, 0)]
    labels = ["labelsTr/b_2.nii.gz", "labelsTr/a_1.nii.gz"]
    hidden = ["imagesTr/._a_1_0000.nii.gz", "labelsTr/.DS_Store", "imagesUn/._u_0000.nii.gz"]
    rest = ["imagesUn/u_0000.nii.gz", "imagesUn/u_0001.nii.gz", "imagesTs/t_0000.nii.gz", "imagesTs/readme.txt"]
    return build(tmp_path, cases + labels + hidden + rest)


def test_cases_are_sorted_paired_and_complete(folder: Path) -> None:
    dataset = RawDataset.open(folder)
    names = [f"imagesTr/a_1_000{channel}.nii.gz" for channel in (0, 1)]
    first = Case("a_1", tuple(folder / name for name in names), folder / "labelsTr/a_1.nii.gz")
    assert dataset.labelled_cases()[0] == first
    assert [case.identifier for case in dataset.labelled_cases()] == ["a_1", "b_2"]
    assert [(case.identifier, len(case.images), case.label) for case in dataset.unlabelled_cases()] == [("u", 2, None)]
    assert [case.identifier for case in dataset.test_cases()] == ["t"]


def test_properties_come_from_dataset_json(folder: Path) -> None:
    dataset = RawDataset.open(folder)
    assert dataset.name == "Dataset007_Brain"
    assert dataset.file_ending == ".nii.gz"
    assert dataset.channel_names == {"0": "T1", "1": "FLAIR"}
    assert dataset.labels == {"background": 0, "lesion": 1}
    assert dataset.label_values == {0, 1}


def test_regions_and_ignore_are_kept_and_their_values_known(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    dataset = RawDataset.open(build(tmp_path, [], {**DATASET_JSON, "labels": labels}))
    assert dataset.labels == labels
    assert dataset.label_values == {0, 1, 2, 3}


def test_a_dataset_without_any_label_is_valid(tmp_path: Path) -> None:
    dataset = RawDataset.open(build(tmp_path, ["imagesUn/u_0000.nii.gz"]))
    assert dataset.labelled_cases() == []
    assert len(dataset.unlabelled_cases()) == 1


def test_an_image_without_label_is_no_labelled_case(folder: Path) -> None:
    (folder / "labelsTr/b_2.nii.gz").unlink()
    assert [case.identifier for case in RawDataset.open(folder).labelled_cases()] == ["a_1"]


def test_the_optional_dataset_key_wins_and_expands_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSEG_TEST_IMAGES", str(tmp_path / "elsewhere"))
    entry = {"images": ["$DIFFSEG_TEST_IMAGES/x_0000.nii.gz", "more/x_0001.nii.gz"], "label": "../x.nii.gz"}
    folder = build(tmp_path, ["imagesTr/a_0000.nii.gz"], {**DATASET_JSON, "dataset": {"x": entry}})
    (case,) = RawDataset.open(folder).labelled_cases()
    assert case.images == (tmp_path / "elsewhere/x_0000.nii.gz", folder / "more/x_0001.nii.gz")
    assert case.label is not None
    assert case.label.resolve() == tmp_path / "x.nii.gz"


def test_the_dataset_key_needs_images_and_label(tmp_path: Path) -> None:
    folder = build(tmp_path, [], {**DATASET_JSON, "dataset": {"x": {"images": []}}})
    with pytest.raises(BadInputError, match="lists no images and label for 'x'"):
        RawDataset.open(folder).labelled_cases()


def test_a_missing_folder_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"no data set in .*Dataset009_None.*diffseg convert"):
        RawDataset.open(tmp_path / "Dataset009_None")


def test_a_missing_dataset_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"dataset\.json is missing"):
        RawDataset.open(tmp_path)


def test_invalid_json_is_located(folder: Path) -> None:
    (folder / "dataset.json").write_text('{"labels": {"background": 0},\n "numTraining": 3,}')
    with pytest.raises(BadInputError, match=r"dataset\.json is not valid JSON: .*line 2"):
        RawDataset.open(folder)


def test_json_that_is_no_object_is_refused(folder: Path) -> None:
    (folder / "dataset.json").write_text("[1, 2]")
    with pytest.raises(BadInputError, match="holds no JSON object"):
        RawDataset.open(folder)


@pytest.mark.parametrize("key", ["channel_names", "labels", "file_ending"])
def test_a_missing_key_is_named_when_it_is_needed(tmp_path: Path, key: str) -> None:
    content = {name: value for name, value in DATASET_JSON.items() if name != key}
    dataset = RawDataset.open(build(tmp_path, [], content))
    with pytest.raises(BadInputError, match=f"no valid '{key}'"):
        getattr(dataset, key)


def test_the_signature_follows_content_and_nothing_else(folder: Path) -> None:
    before = RawDataset.open(folder).content_signature()
    assert RawDataset.open(folder).content_signature() == before
    (folder / "imagesTr/.DS_Store").touch()
    (folder / "imagesTs/t2_0000.nii.gz").touch()
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON, indent=4))
    assert RawDataset.open(folder).content_signature() == before


@pytest.mark.parametrize("change", ["content", "new", "gone", "renamed", "json"])
def test_the_signature_sees_every_change(folder: Path, change: str) -> None:
    before = RawDataset.open(folder).content_signature()
    label = folder / "labelsTr/a_1.nii.gz"
    if change == "content":
        label.write_text("more")
    elif change == "new":
        (folder / "imagesUn/v_0000.nii.gz").touch()
    elif change == "gone":
        label.unlink()
    elif change == "renamed":
        label.rename(label.with_name("a_3.nii.gz"))
    else:
        (folder / "dataset.json").write_text(json.dumps({**DATASET_JSON, "labels": {"background": 0, "tumour": 1}}))
    assert RawDataset.open(folder).content_signature() != before


@pytest.mark.parametrize("file_ending", [".nii.gz", ".nii"])
def test_of_what_is_compressed_the_signature_sees_content_and_not_time(tmp_path: Path, file_ending: str) -> None:
    """A copy has other times, and a label mended in place may have as many bytes."""
    folder = build(tmp_path, [], {**DATASET_JSON, "file_ending": file_ending})
    label = folder / "labelsTr" / f"a_1{file_ending}"
    label.parent.mkdir(exist_ok=True)

    def written(content: bytes, seconds: int) -> str:
        label.write_bytes(gzip.compress(content, compresslevel=0, mtime=0) if file_ending == ".nii.gz" else content)
        os.utime(label, (seconds, seconds))
        return RawDataset.open(folder).content_signature()

    before = written(b"0000000000", 100)
    assert written(b"0000000000", 100) == before
    assert (written(b"0000000000", 200) == before) == (file_ending == ".nii.gz")
    assert written(b"0000010000", 300) != before


def test_the_signature_is_the_same_in_another_place(folder: Path, tmp_path: Path) -> None:
    before = RawDataset.open(folder).content_signature()
    moved = folder.rename(tmp_path / "Dataset008_Brain")
    assert RawDataset.open(moved).content_signature() == before


def test_broken_links_are_listed_and_hidden_files_are_not(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").symlink_to(tmp_path / "not_fetched")
    (tmp_path / "._a.nii.gz").touch()
    assert [path.name for path in visible_files(tmp_path)] == ["a.nii.gz"]


def test_names_are_split() -> None:
    assert split_ending("case.1.nii.gz") == ("case.1", ".nii.gz")
    assert split_ending("notes.txt") == ("", "")
    assert split_channel("liver_01_0002") == ("liver_01", 2)
    assert split_channel("okbp_017") == ("okbp_017", None)


@pytest.mark.parametrize("identifier", ["a b", "-rf", "a;b", "a/b", "ü", ".hidden", "", "scan_seg", "a$HOME"])
def test_unusable_identifiers(identifier: str) -> None:
    assert why_unusable(identifier)


@pytest.mark.parametrize("identifier", ["liver_01", "FLARE22_Tr_0001", "img0001", "sub-01_ses-2.1", "scan_segment"])
def test_usable_identifiers(identifier: str) -> None:
    assert why_unusable(identifier) is None


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, diffseg_nnunet.raw_dataset; print({'numpy', 'torch', 'SimpleITK', 'nnunetv2'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
