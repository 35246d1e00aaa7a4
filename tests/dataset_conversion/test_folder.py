"""The engine and the plain-folder format: voxels and positions are kept, what is wrong is told and never written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from diffseg_nnunet.dataset_conversion.core import ConversionReport, convert
from diffseg_nnunet.dataset_conversion.folder import FolderConverter
from diffseg_nnunet.dataset_conversion.label_names import named_values
from diffseg_nnunet.errors import EXIT_BAD_INPUT, BadInputError
from diffseg_nnunet.raw_dataset import RawDataset
from diffseg_nnunet.verification import verify_dataset
from diffseg_nnunet.workspace import Workspace

SIZE = (7, 8, 9)
SHARED_DATA = Path(os.environ.get("DIFFSEG_TEST_DATA") or Path(__file__).resolve().parents[2] / "../shared/data")


def write(path: Path, voxels: np.ndarray, seed: int = 0) -> Path:
    """Write `voxels` (z, y, x) on a randomly rotated, shifted and scaled grid, the same for the same seed."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    volume = sitk.GetImageFromArray(voxels)
    volume.SetDirection((rotation * np.sign(np.linalg.det(rotation))).ravel().tolist())
    volume.SetSpacing(rng.uniform(0.5, 4, 3).tolist())
    volume.SetOrigin(rng.uniform(-300, 300, 3).tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(volume, str(path), True)
    return path


def scan(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(40, 100, SIZE).astype(np.float32)


def organs(dtype: type = np.uint8) -> np.ndarray:
    label = np.zeros(SIZE, dtype)
    label[2:4], label[4:6] = 1, 2
    return label


def assert_same_volume(written: Path, source: sitk.Image) -> None:
    """Equal voxels, and every corner at the same place in the patient (mm)."""
    volume = sitk.ReadImage(str(written))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(volume), sitk.GetArrayFromImage(source))
    for corner in np.ndindex(2, 2, 2):
        index = [int(side * (extent - 1)) for side, extent in zip(corner, source.GetSize(), strict=True)]
        places = [each.TransformIndexToPhysicalPoint(index) for each in (volume, source)]
        np.testing.assert_allclose(*places, atol=1e-4)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two labelled cases."""
    for number in (1, 2):
        write(tmp_path / f"source/images/liver_{number}.nii.gz", scan(number), number)
        write(tmp_path / f"source/labels/liver_{number}.nii.gz", organs(), number)
    (tmp_path / "source/labels.json").write_text('{"background": 0, "liver": 1, "tumour": 2}')
    return tmp_path / "source"


Run = Callable[..., ConversionReport]


@pytest.fixture
def run(source: Path, workspace: Workspace) -> Run:
    """Plan and convert the source with defaults that a test changes one by one."""

    def run(**changes: object) -> ConversionReport:
        engine = {"dataset_id": 5, "workspace": workspace, "workers": 2}
        engine |= {key: changes.pop(key) for key in ("dataset_id", "copy", "workers", "progress") if key in changes}
        arguments = {
            "images": source / "images",
            "labels": source / "labels",
            "label_names": source / "labels.json",
            "modality": "CT",
            "name": "Liver",
            **changes,
        }
        return convert(FolderConverter().plan(**arguments), **engine)

    return run


def refusal(run: Run, workspace: Workspace, **changes: object) -> str:
    """The message a user gets; nothing may be left behind."""
    before = sorted(workspace.raw.rglob("*")) if workspace.raw.exists() else []
    with pytest.raises(BadInputError) as caught:
        run(**changes)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert caught.value.mend
    assert (sorted(workspace.raw.rglob("*")) if workspace.raw.exists() else []) == before
    return str(caught.value)


# --- what is written ------------------------------------------------------------------------------------------------


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


# --- what is refused: names -----------------------------------------------------------------------------------------


def test_a_missing_folder(run: Run, workspace: Workspace, source: Path) -> None:
    message = refusal(run, workspace, images=source / "nowhere")
    assert f"no folder {source / 'nowhere'}" in message
    assert "images/liver_01.nii.gz" in message


def test_an_empty_folder(run: Run, workspace: Workspace, source: Path) -> None:
    (source / "empty").mkdir()
    (source / "empty/.DS_Store").touch()
    assert "empty is empty" in refusal(run, workspace, images=source / "empty")
    assert "empty is empty" in refusal(run, workspace, labels=source / "empty")


def test_an_archive_and_a_folder_too_high(run: Run, workspace: Workspace, source: Path) -> None:
    archive = Path(shutil.make_archive(str(source / "data"), "zip", source / "images"))
    assert "is an archive; extract it first" in refusal(run, workspace, images=archive)
    message = refusal(run, workspace, images=source)
    assert "holds no image" in message
    assert "subfolders images, labels do" in message


def test_an_image_without_its_label(run: Run, workspace: Workspace, source: Path) -> None:
    (source / "labels/liver_2.nii.gz").unlink()
    message = refusal(run, workspace)
    assert f"1 image(s) in {source / 'images'} have no label: liver_2.nii.gz" in message
    assert "--rest-unlabelled" in message


@pytest.mark.parametrize("rest", [False, True])
def test_a_label_without_its_image(run: Run, workspace: Workspace, source: Path, rest: bool) -> None:
    (source / "images/liver_2.nii.gz").unlink()
    message = refusal(run, workspace, rest_unlabelled=rest)
    assert f"1 label(s) in {source / 'labels'} have no image: liver_2.nii.gz" in message


def test_names_that_do_not_fit_at_all(run: Run, workspace: Workspace, source: Path) -> None:
    for path in list((source / "labels").iterdir()):
        path.rename(path.with_name(path.name.replace("liver", "label")))
    assert "an image and its label must be called the same" in refusal(run, workspace)


def test_one_case_in_two_formats(run: Run, workspace: Workspace, source: Path) -> None:
    write(source / "images/liver_1.nrrd", scan(1))
    assert "one case twice" in refusal(run, workspace)


def test_a_missing_channel(run: Run, workspace: Workspace, tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001", "b_0001"):
        write(tmp_path / f"channels/{name}.nii.gz", scan(1))
    message = refusal(run, workspace, images=tmp_path / "channels", labels=None, label_names=None, modality="T1,T2")
    assert "'b' in" in message
    assert "has the channels 1" in message


@pytest.mark.parametrize("identifier", ["liver 3", "liver(3)", "liver_seg"])
def test_identifiers_that_would_break_later(run: Run, workspace: Workspace, source: Path, identifier: str) -> None:
    write(source / f"images/{identifier}.nii.gz", scan(3))
    message = refusal(run, workspace, rest_unlabelled=True)
    assert f"{identifier}.nii.gz) cannot be a case identifier" in message


def test_all_names_that_would_break_later_are_told(run: Run, workspace: Workspace, source: Path) -> None:
    for name in ("é 1", "é 2", "é 3"):
        for part in ("images", "labels"):
            shutil.copy(source / part / "liver_1.nii.gz", source / part / f"{name}.nii.gz")
    message = refusal(run, workspace)
    assert "'é 1'" in message
    assert "Nor can 2 more: é 2, é 3." in message


@pytest.mark.parametrize("name", ["my liver", "../Liver", "/tmp/Liver", "a__b", ""])
def test_names_that_cannot_be(run: Run, workspace: Workspace, tmp_path: Path, name: str) -> None:
    assert "--name" in refusal(run, workspace, name=name)
    assert not (tmp_path / "Liver").exists()


def test_a_taken_id_and_a_free_one(run: Run, workspace: Workspace) -> None:
    run()
    (workspace.raw / "Dataset006_Other").mkdir()
    message = refusal(run, workspace, name="Another")
    assert "id 5 is taken by" in message
    assert "Dataset005_Liver" in message
    assert "--id 7" in message


def test_an_id_that_another_data_set_left_results_under(run: Run, workspace: Workspace) -> None:
    (workspace.results / "Dataset005_Old").mkdir(parents=True)
    assert "Dataset005_Old" in refusal(run, workspace)
    (workspace.results / "Dataset005_Old").rename(workspace.results / "Dataset005_Liver")
    assert run().folder.name == "Dataset005_Liver"


def test_ids_out_of_range(run: Run, workspace: Workspace) -> None:
    assert "1..999" in refusal(run, workspace, dataset_id=1000)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"background": 0, "liver": 1, "tumour": 1}, "several labels have the value 1"),
        ({"background": 0, "liver": 1.5}, "does not pair a name with a whole number"),
        ({"background": 0, "liver": [1, 2]}, "does not pair a name with a whole number"),
        ({"0": "background", "1": "liver", "2": "liver"}, "two labels are called 'liver'"),
        ({}, "names no label"),
    ],
)
def test_label_names_that_nnunet_cannot_use(
    run: Run, workspace: Workspace, source: Path, content: dict, words: str
) -> None:
    (source / "labels.json").write_text(json.dumps(content))
    message = refusal(run, workspace)
    assert words in message
    assert "labels.json" in message


def test_label_names_of_either_direction() -> None:
    expected = {"background": 0, "liver": 1, "tumour": 2}
    assert named_values({"tumour": 2, "background": 0, "liver": 1}, "x") == expected
    assert named_values({"0": "Background", "2": "tumour", "1": "liver"}, "x") == expected
    assert named_values({"background": "0", "liver": "1", "tumour": "2"}, "x") == expected
    assert named_values({"liver": 1, "tumour": 2}, "x") == expected


def test_label_names_that_are_missing_or_superfluous(run: Run, workspace: Workspace, source: Path) -> None:
    assert "--label-names" in refusal(run, workspace, label_names=None)
    assert "labels.json is missing" in refusal(run, workspace, label_names=source / "no/labels.json")
    assert "--labels" in refusal(run, workspace, labels=None)


# --- what is refused: contents --------------------------------------------------------------------------------------


def test_different_size(run: Run, workspace: Workspace, source: Path) -> None:
    write(source / "labels/liver_2.nii.gz", organs()[:-1], 2)
    message = refusal(run, workspace)
    assert f"The label {source / 'labels/liver_2.nii.gz'} has the size (9, 8, 6) voxels" in message
    assert "1 problem(s) in 1 case(s)" in message
    assert "(9, 8, 7)" in message


@pytest.mark.parametrize("name", ["Spacing", "Origin", "Direction"])
def test_different_geometry(run: Run, workspace: Workspace, source: Path, name: str) -> None:
    path = source / "labels/liver_2.nii.gz"
    label = sitk.ReadImage(str(path))
    values = list(getattr(label, f"Get{name}")())
    changed = [-value for value in values] if name == "Direction" else [values[0] + 2.0, *values[1:]]
    getattr(label, f"Set{name}")(changed)
    sitk.WriteImage(label, str(path))
    message = refusal(run, workspace)
    assert f"{path} has the {name.lower()}" in message
    assert f"{changed[0]:.4f}"[:5] in message
    assert f"{values[0]:.4f}"[:5] in message


def test_label_values_that_have_no_name(run: Run, workspace: Workspace, source: Path) -> None:
    (source / "labels.json").write_text('{"background": 0, "liver": 1}')
    message = refusal(run, workspace)
    assert message.count("that have no name: 2 (named are 0, 1)") == 2


def test_labels_that_are_no_integers(run: Run, workspace: Workspace, source: Path) -> None:
    write(source / "labels/liver_1.nii.gz", organs(np.float32) * 0.5, 1)
    assert "liver_1.nii.gz holds values that are no integers: 0.5" in refusal(run, workspace)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_a_truncated_file(run: Run, workspace: Workspace, source: Path, ending: str) -> None:
    path = source / f"images/liver_1{ending}"
    volume = sitk.ReadImage(str(source / "images/liver_1.nii.gz"))
    (source / "images/liver_1.nii.gz").unlink()
    sitk.WriteImage(volume, str(path))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"{path} cannot be used: " in refusal(run, workspace)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha"])
def test_nan_in_an_image(run: Run, workspace: Workspace, source: Path, ending: str) -> None:
    (source / "images/liver_1.nii.gz").unlink()
    voxels = scan(1)
    voxels[0, 0, 0] = np.nan
    path = write(source / f"images/liver_1{ending}", voxels, 1)
    message = refusal(run, workspace)
    assert str(path) in message
    assert "NaN" in message


@pytest.mark.parametrize("size", [(8, 9), (3, 7, 8, 9)])
def test_a_file_that_is_not_3d(run: Run, workspace: Workspace, source: Path, size: tuple[int, ...]) -> None:
    volume = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=size), isVector=False)
    sitk.WriteImage(volume, str(source / "images/liver_1.nii.gz"))
    message = refusal(run, workspace)
    assert f"{source / 'images/liver_1.nii.gz'} is {len(size)}D" in message


def test_a_4d_file_with_another_number_of_channels(run: Run, workspace: Workspace, source: Path) -> None:
    message = refusal(run, workspace, modality="T1,T2,FLAIR")
    assert "expected is 4D with 3 channels" in message


def test_many_problems_are_counted(run: Run, workspace: Workspace, source: Path) -> None:
    for number in range(1, 16):
        write(source / f"images/liver_{number}.nii.gz", scan(number), number)
        write(source / f"labels/liver_{number}.nii.gz", organs() + 5, number)
    message = refusal(run, workspace)
    assert message.startswith("15 problem(s) in 15 case(s)")
    assert message.count("\n- liver_") == 10
    assert "- and 5 more" in message


def test_a_link_that_leads_nowhere(run: Run, workspace: Workspace, source: Path) -> None:
    (source / "images/liver_1.nii.gz").unlink()
    (source / "images/liver_1.nii.gz").symlink_to(source / "not_fetched")
    assert "liver_1.nii.gz cannot be used: the link leads nowhere" in refusal(run, workspace)


def test_an_interruption_publishes_nothing_and_is_gone_on_with(run: Run, workspace: Workspace) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=interrupt)
    assert [path.name for path in workspace.raw.iterdir()] == [".converting-Dataset005"]
    assert run().notes[0].startswith("Went on with an interrupted conversion")
    assert [path.name for path in workspace.raw.iterdir()] == ["Dataset005_Liver"]


# --- a full disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system can be mounted by root only, and not in every container")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def big_source(folder: Path, ending: str, count: int) -> Path:
    """Incompressible images of about 0.5 MB each."""
    for number in range(count):
        voxels = np.random.default_rng(number).normal(size=(50, 50, 50)).astype(np.float32)
        write(folder / f"noise_{number}{ending}", voxels)
    return folder


def test_a_disk_that_is_too_small_is_seen_before_writing(tmp_path: Path, small_disk: Path) -> None:
    images = big_source(tmp_path / "big", ".nii.gz", 20)
    plan = FolderConverter().plan(images, None, None, "CT", "Noise")
    progress: list[int] = []
    with pytest.raises(
        BadInputError, match=r"disk of .* is full: Dataset001_Noise needs about .* MiB, 8\.0 MiB are free"
    ):
        convert(
            plan,
            dataset_id=1,
            workspace=Workspace.locate(small_disk),
            workers=1,
            progress=lambda done, total: progress.append(done),
        )
    assert progress == []
    assert [path for path in small_disk.rglob("*") if path.name != "nnUNet_raw"] == []


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
def test_a_disk_that_fills_up_while_writing(tmp_path: Path, small_disk: Path, ending: str) -> None:
    images = big_source(tmp_path / "big", ending, 12)
    plan = FolderConverter().plan(images, None, None, "CT", "Noise")

    def somebody_else_writes(done: int, total: int) -> None:
        if done == 1:
            with (small_disk / "somebody_elses").open("wb", buffering=0) as file:
                while file.write(bytes(4096)) == 4096:
                    pass

    def fill(done: int, total: int) -> None:
        try:
            somebody_else_writes(done, total)
        except OSError:
            return

    with pytest.raises(BadInputError, match=r"disk of .* is full.* Nothing was written\."):
        convert(plan, dataset_id=1, workspace=Workspace.locate(small_disk), workers=1, progress=fill)
    assert sorted(path.name for path in small_disk.rglob("*")) == ["nnUNet_raw", "somebody_elses"]


def test_a_data_set_on_another_file_system_is_copied(run: Run, source: Path, small_disk: Path) -> None:
    plan = FolderConverter().plan(source / "images", source / "labels", source / "labels.json", "CT", "Liver")
    report = convert(plan, dataset_id=1, workspace=Workspace.locate(small_disk), workers=2)
    assert report.files == {"copied": 4}


# --- real data ------------------------------------------------------------------------------------------------------


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
