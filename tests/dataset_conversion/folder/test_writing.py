"""The engine and the plain-folder format: voxels and positions are kept."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from diffseg_nnunet.dataset_conversion.core import convert
from diffseg_nnunet.dataset_conversion.folder import FolderConverter
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import RawDataset
from diffseg_nnunet.verification import verify_dataset
from diffseg_nnunet.workspace import Workspace

from .sources import SIZE, Run, assert_same_volume, organs, refusal, scan, write

SHARED_DATA = Path(os.environ.get("DIFFSEG_TEST_DATA") or Path(__file__).resolve().parents[3] / "../shared/data")


def test_voxels_positions_and_dataset_json(run: Run, source: Path, workspace: Workspace) -> None:
    seen: list[tuple[int, int]] = []
    report = run(progress=lambda done, total: seen.append((done, total)))
    assert report.folder == workspace.raw / "Dataset005_Liver"
    assert report.cases == {"training": 2, "unlabelled": 0, "test": 0}
    assert (report.warnings, report.notes, seen) == ((), (), [(1, 2), (2, 2)])
    for number in (1, 2):
        image = sitk.ReadImage(str(source / f"images/liver_{number}.nii.gz"))
        label = sitk.ReadImage(str(source / f"labels/liver_{number}.nii.gz"))
        assert_same_volume(report.folder / f"imagesTr/liver_{number}_0000.nii.gz", image)
        assert_same_volume(report.folder / f"labelsTr/liver_{number}.nii.gz", label)
    assert json.loads((report.folder / "dataset.json").read_text()) == {
        "name": "Liver",
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "tumour": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    assert verify_dataset(RawDataset.open(report.folder), workers=2) == []


def test_unchanged_volumes_are_linked_and_copied_on_request(run: Run, source: Path) -> None:
    linked = run()
    assert linked.files == {"linked": 4}
    assert (linked.folder / "imagesTr/liver_1_0000.nii.gz").samefile(source / "images/liver_1.nii.gz")
    copied = run(dataset_id=6, copy=True)
    assert copied.files == {"copied": 4}
    assert not (copied.folder / "imagesTr/liver_1_0000.nii.gz").samefile(source / "images/liver_1.nii.gz")


def test_links_in_the_source_are_followed(run: Run, source: Path, tmp_path: Path) -> None:
    store = (source / "images/liver_1.nii.gz").rename(tmp_path / "blob")
    (source / "images/liver_1.nii.gz").symlink_to(store)
    written = run().folder / "imagesTr/liver_1_0000.nii.gz"
    assert not written.is_symlink()
    assert written.samefile(store)


@pytest.mark.parametrize("ending", [".nii", ".mha", ".nrrd"])
def test_other_formats_are_encoded_anew(run: Run, source: Path, ending: str) -> None:
    for path in [*source.glob("images/*"), *source.glob("labels/*")]:
        sitk.WriteImage(sitk.ReadImage(str(path)), str(path).replace(".nii.gz", ending))
        path.unlink()
    report = run()
    assert report.files == {"encoded": 4}
    for number in (1, 2):
        image = sitk.ReadImage(str(source / f"images/liver_{number}{ending}"))
        assert_same_volume(report.folder / f"imagesTr/liver_{number}_0000.nii.gz", image)


def test_channels_by_suffix_and_by_fourth_axis(run: Run, source: Path, tmp_path: Path) -> None:
    channels = {name: [scan(seed), scan(seed + 1)] for seed, name in ((10, "liver_1"), (20, "liver_2"))}
    for name, volumes in channels.items():
        for channel, voxels in enumerate(volumes):
            write(tmp_path / f"split/{name}_000{channel}.nii.gz", voxels, int(name[-1]))
        parts = [sitk.ReadImage(str(tmp_path / f"split/{name}_000{channel}.nii.gz")) for channel in (0, 1)]
        (tmp_path / "joined").mkdir(exist_ok=True)
        sitk.WriteImage(sitk.JoinSeries(parts), str(tmp_path / f"joined/{name}.nii.gz"))
    split = run(images=tmp_path / "split", modality="T1, FLAIR")
    joined = run(images=tmp_path / "joined", modality="T1,FLAIR", dataset_id=6)
    assert json.loads((split.folder / "dataset.json").read_text())["channel_names"] == {"0": "T1", "1": "FLAIR"}
    assert joined.files == {"encoded": 4, "linked": 2}
    for folder in (split.folder, joined.folder):
        for path in (tmp_path / "split").iterdir():
            assert_same_volume(folder / "imagesTr" / path.name, sitk.ReadImage(str(path)))


def test_without_labels_everything_is_a_pool(run: Run, source: Path) -> None:
    report = run(labels=None, label_names=None)
    assert report.cases == {"training": 0, "unlabelled": 2, "test": 0}
    content = json.loads((report.folder / "dataset.json").read_text())
    assert (content["numTraining"], content["labels"]) == (0, {"background": 0})
    assert [list((report.folder / name).iterdir()) for name in ("imagesTr", "labelsTr")] == [[], []]
    assert len(RawDataset.open(report.folder).unlabelled_cases()) == 2
    assert verify_dataset(RawDataset.open(report.folder), workers=1) == []


def test_the_rest_may_be_unlabelled(run: Run, source: Path) -> None:
    write(source / "images/pool_1.nii.gz", scan(9))
    report = run(rest_unlabelled=True)
    assert report.cases == {"training": 2, "unlabelled": 1, "test": 0}
    assert (report.folder / "imagesUn/pool_1_0000.nii.gz").exists()


def test_hidden_files_are_ignored(run: Run, source: Path) -> None:
    (source / "images/._liver_1.nii.gz").write_bytes(b"macOS")
    (source / "labels/.DS_Store").write_bytes(b"macOS")
    assert run().cases["training"] == 2


def test_warnings_do_not_stop(run: Run, source: Path) -> None:
    write(source / "labels/liver_2.nii.gz", np.zeros(SIZE, np.uint8), 2)
    (warning,) = run().warnings
    assert (warning.code, warning.case) == ("empty_label", "liver_2")
    assert str(source / "labels/liver_2.nii.gz") in warning.message


@pytest.mark.parametrize(
    ("images", "labels", "modality", "expected"),
    [
        (["amos_0001", "amos_0002"], ["amos_0001", "amos_0002"], "CT", {"amos_0001": 1, "amos_0002": 1}),
        (["amos_0001", "amos_0002"], [], "CT", {"amos_0001": 1, "amos_0002": 1}),
        (["Tr_0001_0000", "Tr_0002_0000"], ["Tr_0001", "Tr_0002"], "CT", {"Tr_0001": 1, "Tr_0002": 1}),
        (["Case_00001_0000", "Case_00002_0000"], [], "CT", {"Case_00001": 1, "Case_00002": 1}),
        (["a_0000", "a_0001", "b_0000", "b_0001"], [], "T1,T2", {"a": 2, "b": 2}),
        (["a_0000", "b_0000"], ["a"], "CT", {"a": 1, "b": 1}),
    ],
)
def test_what_a_number_at_the_end_of_a_name_means(
    tmp_path: Path, images: list[str], labels: list[str], modality: str, expected: dict[str, int]
) -> None:
    for folder, names in (("images", images), ("labels", labels)):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.nii.gz").touch()
    (tmp_path / "labels.json").write_text('{"background": 0, "liver": 1}')
    plan = FolderConverter().plan(
        tmp_path / "images",
        tmp_path / "labels" if labels else None,
        tmp_path / "labels.json" if labels else None,
        modality,
        "Name",
        rest_unlabelled=True,
    )
    assert {case.identifier: len(case.images) for case in plan.cases} == expected
    assert sum(case.role == "training" for case in plan.cases) == len(labels)


def patterned(folder: Path) -> Path:
    """Two labelled cases and one without a label, each in a folder of its own and in a format of its own."""
    for number, ending in ((1, ".nii.gz"), (2, ".mha"), (3, ".nrrd")):
        for channel, name in enumerate(("t1", "flair")):
            write(folder / f"case_{number}/{name}{ending}", scan(10 * number + channel), number)
        write(folder / f"case_{number}/._t1{ending}", scan(0), number)
    for number, ending in ((1, ".nrrd"), (2, ".nii")):
        write(folder / f"case_{number}/seg{ending}", organs(), number)
    return folder


def test_pairing_by_patterns(run: Run, source: Path, tmp_path: Path) -> None:
    folder = patterned(tmp_path / "download")
    changes = {"images": folder, "labels": None, "label_pattern": "{case}/seg", "rest_unlabelled": True}
    report = run(**changes, image_pattern="{case}/t1, {case}/flair", modality="T1,FLAIR")
    assert report.cases == {"training": 2, "unlabelled": 1, "test": 0}
    for number, ending in ((1, ".nii.gz"), (2, ".mha"), (3, ".nrrd")):
        role = "Un" if number == 3 else "Tr"
        for channel, name in enumerate(("t1", "flair")):
            image = sitk.ReadImage(str(folder / f"case_{number}/{name}{ending}"))
            assert_same_volume(report.folder / f"images{role}/case_{number}_{channel:04d}.nii.gz", image)
    for number, ending in ((1, ".nrrd"), (2, ".nii")):
        label = sitk.ReadImage(str(folder / f"case_{number}/seg{ending}"))
        assert_same_volume(report.folder / f"labelsTr/case_{number}.nii.gz", label)


def test_patterns_below_two_folders_and_with_an_ending(run: Run, source: Path) -> None:
    report = run(image_pattern="liver_{case}.nii.gz", label_pattern="liver_{case}")
    assert sorted(path.name for path in (report.folder / "labelsTr").iterdir()) == ["1.nii.gz", "2.nii.gz"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_pattern": "ct"}, "'ct' is no pattern"),
        ({"image_pattern": "../{case}"}, "'../{case}' is no pattern"),
        ({"image_pattern": "/{case}"}, "'/{case}' is no pattern"),
        ({"image_pattern": "{case}/ct"}, "fits '{case}/ct'"),
        ({"image_pattern": "{case}/t1,{case}/flair"}, "2 image patterns for 1 channel(s)"),
        ({"image_pattern": "{case}/t1,{case}/seg", "modality": "T1,SEG"}, "lack one of their 2 channels: case_3"),
        ({"image_pattern": "{case}/t1"}, "1 image(s) in"),
        ({"image_pattern": "{case}/t1", "label_pattern": "{case}/mask"}, "fits '{case}/mask'"),
    ],
)
def test_patterns_that_cannot_be(
    run: Run, workspace: Workspace, source: Path, tmp_path: Path, changes: dict, words: str
) -> None:
    folder = patterned(tmp_path / "download")
    changes = {"images": folder, "labels": None, "label_pattern": "{case}/seg", **changes}
    assert words in refusal(run, workspace, **changes)


def test_one_case_twice_by_a_pattern(run: Run, workspace: Workspace, source: Path) -> None:
    write(source / "images/liver_1.mha", scan(1), 1)
    assert "one case twice" in refusal(run, workspace, image_pattern="{case}")


@pytest.mark.parametrize(
    "table",
    [
        "0,background\n1,liver\n2,tumour\n",
        "background,0\nliver,1\ntumour,2",
        "\ufeffvalue;name\r\n0;background\r\n2;tumour\r\n\r\n1;liver\r\n",
        'name,value\nBackground, 0\n"liver", 1\ntumour,2\n',
        "name\tvalue\nbackground\t0\nliver\t1\ntumour\t2\n",
    ],
)
def test_label_names_in_a_table(run: Run, source: Path, table: str) -> None:
    (source / "labels.csv").write_text(table, encoding="utf-8", newline="")
    report = run(label_names=source / "labels.csv")
    assert RawDataset.open(report.folder).labels == {"background": 0, "liver": 1, "tumour": 2}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("", "is no table of label names"),
        ("name,value\n", "is no table of label names"),
        ("0,background\n1,liver,red\n", "is no table of label names"),
        ("0,background\nliver,1\n", "is no table of label names"),
        ("0,1\n1,2\n", "is no table of label names"),
        ("0,background\n1,liver\n2,liver\n", "two labels are called 'liver'"),
        ("1,liver\n1,tumour\n", "several labels have the value 1"),
    ],
)
def test_tables_that_cannot_be(run: Run, workspace: Workspace, source: Path, table: str, words: str) -> None:
    (source / "labels.csv").write_text(table)
    message = refusal(run, workspace, label_names=source / "labels.csv")
    assert words in message
    assert "labels.csv" in message


def test_what_the_command_hands_over(source: Path) -> None:
    """The command may have SRC or not; each declared option is a keyword of `plan`."""
    assert not FolderConverter.needs_source
    given = {option.name: None for option in FolderConverter.options} | {"images": source / "images", "modality": "CT"}
    plan = FolderConverter().plan(None, name="Pool", **given)
    assert [case.role for case in plan.cases] == ["unlabelled"] * 2
    with pytest.raises(BadInputError, match="needs --modality"):
        FolderConverter().plan(None, images=source / "images")
    with pytest.raises(BadInputError, match="needs SRC or --images"):
        FolderConverter().plan(None, modality="CT")


def test_a_source_that_holds_all(source: Path, tmp_path: Path) -> None:
    """Images, labels and their names are found below SRC, and the data set is called as it is."""
    plan = FolderConverter().plan(source, modality="CT")
    assert (plan.name, [case.role for case in plan.cases]) == ("source", ["training"] * 2)
    assert plan.labels == {"background": 0, "liver": 1, "tumour": 2}
    assert FolderConverter().plan(None, images=source / "images", modality="CT").name == "source"
    # what is given counts, and images may lie right there
    (source / "other.json").write_text('{"liver": 2, "tumour": 1}')
    assert FolderConverter().plan(source, modality="CT", label_names=source / "other.json").labels["liver"] == 2
    pool = FolderConverter().plan(source / "images", modality="CT", name="Pool")
    assert (pool.name, [case.role for case in pool.cases]) == ("Pool", ["unlabelled"] * 2)


def test_gaps_between_label_values_are_closed(run: Run, source: Path) -> None:
    """By name; nnU-Net's ignore label becomes the last one, whatever its value was."""
    label = organs()
    label[6:] = 255
    write(source / "labels/liver_1.nii.gz", np.where(label == 2, 7, label), 1)
    write(source / "labels/liver_2.nii.gz", np.where(label == 255, 0, label * 7 // 2 * (label == 2)), 2)
    (source / "labels.json").write_text('{"ignore": 255, "tumour": 7, "liver": 1}')
    report = run()
    assert RawDataset.open(report.folder).labels == {"background": 0, "liver": 1, "tumour": 2, "ignore": 3}
    assert report.notes == ("The label values 0, 1, 7, 255 became 0 to 3, by their names.",)
    written = sitk.GetArrayFromImage(sitk.ReadImage(str(report.folder / "labelsTr/liver_1.nii.gz")))
    np.testing.assert_array_equal(written, np.where(label == 255, 3, label))
    other = sitk.GetArrayFromImage(sitk.ReadImage(str(report.folder / "labelsTr/liver_2.nii.gz")))
    np.testing.assert_array_equal(other, np.where(label == 2, 2, 0))


def test_recognised_weakly(source: Path, tmp_path: Path) -> None:
    found = FolderConverter().recognise(source)
    assert found.certainty < 0.5
    assert found.options == {}
    assert FolderConverter().recognise(source / "labels").reason.startswith("2 image(s)")
    assert FolderConverter().recognise(tmp_path) is None


@pytest.mark.skipif(not (SHARED_DATA / "OpenKBP").is_dir(), reason=f"no OpenKBP in {SHARED_DATA} (DIFFSEG_TEST_DATA)")
def test_a_part_of_openkbp(tmp_path: Path, workspace: Workspace) -> None:
    kbp = SHARED_DATA / "OpenKBP"
    labels = sorted(path.name for path in (kbp / "labels").glob("*.nii.gz"))[:4]
    rest = sorted({path.name for path in (kbp / "images").glob("*.nii.gz")} - set(os.listdir(kbp / "labels")))[:4]
    for folder, names in (("images", labels + rest), ("labels", labels)):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).symlink_to((kbp / folder / name).resolve())
    plan = FolderConverter().plan(
        tmp_path / "images", tmp_path / "labels", kbp / "labels.json", "CT", "OpenKBP", rest_unlabelled=True
    )
    report = convert(plan, dataset_id=11, workspace=workspace, copy=True, workers=2)
    assert report.cases == {"training": 4, "unlabelled": 4, "test": 0}
    for name in labels:
        written = report.folder / "imagesTr" / name.replace(".nii.gz", "_0000.nii.gz")
        assert_same_volume(written, sitk.ReadImage(str(kbp / "images" / name)))
    found = verify_dataset(RawDataset.open(report.folder), workers=2)
    assert [str(finding) for finding in found if finding.severity == "error"] == []
