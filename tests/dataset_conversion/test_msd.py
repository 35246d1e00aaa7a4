"""The Medical Segmentation Decathlon's layout, and everything a download in it can have wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from diffseg_nnunet import registry
from diffseg_nnunet.dataset_conversion.core import ConversionReport, convert
from diffseg_nnunet.dataset_conversion.msd import MSDConverter
from diffseg_nnunet.errors import EXIT_BAD_INPUT, BadInputError
from diffseg_nnunet.raw_dataset import RawDataset
from diffseg_nnunet.verification import verify_dataset
from diffseg_nnunet.workspace import Workspace

SIZE = (7, 8, 9)
SHARED_DATA = Path(os.environ.get("DIFFSEG_TEST_DATA") or Path(__file__).resolve().parents[2] / "../shared/data")
TREE = "Task04_Hippocampus/"


def place(volume: sitk.Image, seed: int) -> sitk.Image:
    """Put a 3D volume on a randomly rotated, shifted and scaled grid."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    volume.SetDirection((rotation * np.sign(np.linalg.det(rotation))).ravel().tolist())
    volume.SetSpacing(rng.uniform(0.5, 4, 3).tolist())
    volume.SetOrigin(rng.uniform(-300, 300, 3).tolist())
    return volume


def image(seed: int, channels: int) -> sitk.Image:
    voxels = np.random.default_rng(seed).integers(-1000, 1000, (channels, *SIZE)).astype(np.int16)
    volumes = [place(sitk.GetImageFromArray(channel), seed) for channel in voxels]
    return volumes[0] if channels == 1 else sitk.JoinSeries(volumes)


def label(seed: int) -> sitk.Image:
    voxels = np.zeros(SIZE, np.uint8)
    voxels[2:4], voxels[4:6] = 1, 2
    return place(sitk.GetImageFromArray(voxels), seed)


def task(root: Path, channels: int = 1, folder: str = "Task01_BrainTumour", **changes: object) -> Path:
    """A task with two training cases and one test case; None as a change removes an entry of dataset.json."""
    source = root / folder
    for sub in ("imagesTr", "labelsTr", "imagesTs"):
        (source / sub).mkdir(parents=True)
    for number in (1, 2):
        sitk.WriteImage(image(number, channels), str(source / f"imagesTr/brain_00{number}.nii.gz"), True)
        sitk.WriteImage(label(number), str(source / f"labelsTr/brain_00{number}.nii.gz"), True)
    sitk.WriteImage(image(3, channels), str(source / "imagesTs/brain_003.nii.gz"), True)
    content = {
        "name": "BrainTumour",
        "description": "Gliomas",
        "reference": "somebody",
        "licence": "CC-BY-SA 4.0",
        "release": "1.0",
        "tensorImageSize": "4D",
        "modality": {str(channel): f"MR{channel}" for channel in range(channels)},
        "labels": {"0": "background", "1": "edema", "2": "tumour"},
        "numTraining": 2,
        "numTest": 1,
        "training": [
            {"image": f"./imagesTr/brain_00{n}.nii.gz", "label": f"./labelsTr/brain_00{n}.nii.gz"} for n in (1, 2)
        ],
        "test": ["./imagesTs/brain_003.nii.gz"],
        **changes,
    }
    content = {key: value for key, value in content.items() if value is not None}
    (source / "dataset.json").write_text(json.dumps(content))
    return source


def run(source: Path, workspace: Workspace, name: str | None = None, **engine: object) -> ConversionReport:
    plan = MSDConverter().plan(source, name=name)
    return convert(plan, **{"dataset_id": 1, "workspace": workspace, "workers": 2, **engine})


def refusal(source: Path, workspace: Workspace, name: str | None = None) -> str:
    """The message a user gets; nothing may be left behind."""
    with pytest.raises(BadInputError) as caught:
        run(source, workspace, name)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert caught.value.mend
    assert not workspace.raw.exists() or list(workspace.raw.iterdir()) == []
    return str(caught.value)


def assert_same_volume(written: Path, source: sitk.Image) -> None:
    """Equal voxels, and every corner at the same place in the patient (mm)."""
    volume = sitk.ReadImage(str(written))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(volume), sitk.GetArrayFromImage(source))
    for corner in np.ndindex(2, 2, 2):
        index = [int(side * (extent - 1)) for side, extent in zip(corner, source.GetSize(), strict=True)]
        places = [each.TransformIndexToPhysicalPoint(index) for each in (volume, source)]
        np.testing.assert_allclose(*places, atol=1e-4)


# --- what is written ------------------------------------------------------------------------------------------------


def test_the_format_is_registered_and_describes_itself() -> None:
    assert registry.load("converters", "msd") is MSDConverter
    assert MSDConverter.format_name == "msd"
    assert MSDConverter.title
    assert MSDConverter.expects.startswith(TREE)


def test_a_3d_task_is_linked_and_described(tmp_path: Path, workspace: Workspace) -> None:
    report = run(task(tmp_path), workspace)
    assert report.folder.name == "Dataset001_BrainTumour"
    assert report.cases == {"training": 2, "unlabelled": 0, "test": 1}
    assert report.files == {"linked": 5}
    assert report.notes == ()
    assert not (report.folder / "labelsTs").exists()
    assert_same_volume(report.folder / "imagesTr/brain_002_0000.nii.gz", image(2, 1))
    assert_same_volume(report.folder / "labelsTr/brain_002.nii.gz", label(2))
    assert_same_volume(report.folder / "imagesTs/brain_003_0000.nii.gz", image(3, 1))
    assert json.loads((report.folder / "dataset.json").read_text()) == {
        "description": "Gliomas",
        "reference": "somebody",
        "licence": "CC-BY-SA 4.0",
        "release": "1.0",
        "converted_from": "msd",
        "name": "BrainTumour",
        "channel_names": {"0": "MR0"},
        "labels": {"background": 0, "edema": 1, "tumour": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    assert verify_dataset(RawDataset.open(report.folder), workers=2) == []


def test_4d_becomes_one_file_a_channel_at_the_same_place(tmp_path: Path, workspace: Workspace) -> None:
    source = task(tmp_path, channels=3)
    report = run(source, workspace)
    assert report.files == {"encoded": 9, "linked": 2}
    for number in (1, 2):
        whole = sitk.ReadImage(str(source / f"imagesTr/brain_00{number}.nii.gz"))
        for channel in range(3):
            written = report.folder / f"imagesTr/brain_00{number}_000{channel}.nii.gz"
            assert_same_volume(written, whole[:, :, :, channel])
    assert sitk.ReadImage(str(written)).GetPixelID() == sitk.sitkInt16
    assert verify_dataset(RawDataset.open(report.folder), workers=2) == []


@pytest.mark.parametrize(
    ("folder", "in_json", "given", "expected"),
    [
        ("brain_tumour_of_2018", "Brain", None, "Brain"),
        ("Brain-2018", None, None, "Brain-2018"),
        ("Task01_BrainTumour", "  ", None, "Task01_BrainTumour"),
        ("x", "has spaces", "Mine", "Mine"),
        ("Task02_Heart", "LEFT ATRIUM", None, "LEFT_ATRIUM"),
        ("x", "../_hepatic  vessel!", None, "hepatic_vessel"),
        ("x", "肝", None, "msd"),
    ],
)
def test_any_folder_name_will_do(
    tmp_path: Path, workspace: Workspace, folder: str, in_json: str | None, given: str | None, expected: str
) -> None:
    report = run(task(tmp_path, folder=folder, name=in_json), workspace, given)
    assert report.folder.name == f"Dataset001_{expected}"


def test_the_folder_may_be_the_current_one(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(task(tmp_path, name=None))
    assert run(Path("."), workspace).folder.name == "Dataset001_Task01_BrainTumour"


def test_a_missing_imagests_is_fine_and_noted(tmp_path: Path, workspace: Workspace) -> None:
    source = task(tmp_path)
    shutil.rmtree(source / "imagesTs")
    report = run(source, workspace)
    assert report.cases["test"] == 0
    assert "no imagesTs" in report.notes[0]


def test_no_test_case_is_fine(tmp_path: Path, workspace: Workspace) -> None:
    source = task(tmp_path, test=[], numTest=0)
    shutil.rmtree(source / "imagesTs")
    report = run(source, workspace)
    assert (report.cases["test"], report.notes) == (0, ())


def test_hidden_files_are_ignored(tmp_path: Path, workspace: Workspace) -> None:
    source = task(tmp_path, training=None, test=None)
    for sub in ("imagesTr", "labelsTr", "imagesTs"):
        (source / sub / "._brain_001.nii.gz").write_bytes(b"macOS")
    assert run(source, workspace).cases == {"training": 2, "unlabelled": 0, "test": 1}


def test_images_that_are_not_listed_are_noted(tmp_path: Path, workspace: Workspace) -> None:
    source = task(tmp_path)
    sitk.WriteImage(image(4, 1), str(source / "imagesTr/brain_004.nii.gz"))
    report = run(source, workspace)
    assert report.cases["training"] == 2
    assert "brain_004.nii.gz" in report.notes[0]


def test_background_of_any_spelling_gets_the_name_nnunet_knows(tmp_path: Path, workspace: Workspace) -> None:
    report = run(task(tmp_path, labels={"0": "Background", "1": "edema", "2": "tumour"}), workspace)
    assert RawDataset.open(report.folder).labels == {"background": 0, "edema": 1, "tumour": 2}


# the headers of the ten tasks: modality and labels as in their dataset.json, and how their files are called
TASKS = {
    "BRATS": (("FLAIR", "T1w", "t1gd", "T2w"), ("edema", "non-enhancing tumor", "enhancing tumour")),
    "la": (("MRI",), ("left atrium",)),
    "liver": (("CT",), ("liver", "cancer")),
    "hippocampus": (("MRI",), ("Anterior", "Posterior")),
    "prostate": (("T2", "ADC"), ("PZ", "TZ")),
    "lung": (("CT",), ("cancer",)),
    "pancreas": (("CT",), ("pancreas", "cancer")),
    "hepaticvessel": (("CT",), ("Vessel", "Tumour")),
    "spleen": (("CT",), ("spleen",)),
    "colon": (("CT",), ("colon cancer primaries",)),
}


@pytest.mark.parametrize("prefix", TASKS)
def test_each_of_the_ten_tasks(tmp_path: Path, workspace: Workspace, prefix: str) -> None:
    modality, names = TASKS[prefix]
    source = tmp_path / "renamed"
    rng = np.random.default_rng(len(prefix))
    affine = np.diag([*rng.uniform(0.5, 3, 3), 1])
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    scan = rng.integers(-1000, 1000, (*SIZE, len(modality))).astype(np.int16)
    organs = rng.integers(0, len(names) + 1, SIZE).astype(np.uint8)
    organs.flat[: len(names) + 1] = range(len(names) + 1)
    for sub, voxels in (("imagesTr", scan if len(modality) > 1 else scan[..., 0]), ("labelsTr", organs)):
        (source / sub).mkdir(parents=True)
        nib.save(nib.Nifti1Image(voxels, affine), source / sub / f"{prefix}_001.nii.gz")
        (source / sub / f"._{prefix}_001.nii.gz").write_bytes(b"macOS")
    content = {
        "name": "LEFT ATRIUM",
        "tensorImageSize": "4D" if len(modality) > 1 else "3D",
        "modality": {str(channel): name for channel, name in enumerate(modality)},
        "labels": {str(value): name for value, name in enumerate(("background", *names))},
        "training": [{"image": f"./imagesTr/{prefix}_001.nii.gz", "label": f"./labelsTr/{prefix}_001.nii.gz"}],
        "test": [f"./imagesTs/{prefix}_002.nii.gz"],
    }
    (source / "dataset.json").write_text(json.dumps(content))
    folder = run(source, workspace).folder
    written = json.loads((folder / "dataset.json").read_text())
    assert written["channel_names"] == content["modality"]
    assert written["labels"] == {"background": 0} | {name: value for value, name in enumerate(names, start=1)}
    for channel in range(len(modality)):
        image = nib.load(folder / f"imagesTr/{prefix}_001_{channel:04d}.nii.gz")
        np.testing.assert_array_equal(np.asanyarray(image.dataobj), scan[..., channel])
        np.testing.assert_allclose(image.affine, affine, atol=1e-4)
    np.testing.assert_array_equal(np.asanyarray(nib.load(folder / f"labelsTr/{prefix}_001.nii.gz").dataobj), organs)
    assert MSDConverter().recognise(source).certainty == 1.0


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_missing_folder_and_an_empty_one(tmp_path: Path, workspace: Workspace) -> None:
    message = refusal(tmp_path / "nowhere", workspace)
    assert f"no folder {tmp_path / 'nowhere'}" in message
    assert TREE in message
    (tmp_path / "empty").mkdir()
    assert "is empty" in refusal(tmp_path / "empty", workspace)


def test_an_archive(tmp_path: Path, workspace: Workspace) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "Task01"), "tar", task(tmp_path)))
    assert "is an archive; extract it first" in refusal(archive, workspace)


def test_one_level_too_high_or_too_low(tmp_path: Path, workspace: Workspace) -> None:
    source = task(tmp_path / "download")
    high = refusal(tmp_path / "download", workspace)
    assert f"one level too high: convert {source}" in high
    assert TREE in high
    assert f"one level too low: convert {source}" in refusal(source / "imagesTr", workspace)


def test_a_folder_that_is_something_else(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/readme.txt").touch()
    message = refusal(tmp_path / "other", workspace)
    assert "has no dataset.json" in message
    assert TREE in message


def test_listed_files_that_are_missing_are_named(tmp_path: Path, workspace: Workspace) -> None:
    source = task(tmp_path)
    (source / "imagesTr/brain_001.nii.gz").unlink()
    (source / "labelsTr/brain_002.nii.gz").unlink()
    message = refusal(source, workspace)
    assert "2 file(s)" in message
    assert "imagesTr/brain_001.nii.gz, labelsTr/brain_002.nii.gz" in message


def test_nnunet_v1_names_are_recognised(tmp_path: Path, workspace: Workspace) -> None:
    source = task(tmp_path)
    for path in list((source / "imagesTr").iterdir()):
        path.rename(path.with_name(path.name.replace(".nii.gz", "_0000.nii.gz")))
    assert "format 'nnunet'" in refusal(source, workspace)


@pytest.mark.parametrize("gone", ["imagesTr/brain_001.nii.gz", "labelsTr/brain_001.nii.gz"])
def test_unlisted_pairs_without_counterpart(tmp_path: Path, workspace: Workspace, gone: str) -> None:
    source = task(tmp_path, training=None)
    (source / gone).unlink()
    message = refusal(source, workspace)
    assert "have no counterpart" in message
    assert "brain_001.nii.gz" in message


@pytest.mark.parametrize(
    "entry",
    ["../../etc/passwd", "./imagesTr/../../x.nii.gz", "/etc/passwd", "..\\x.nii.gz", "C:\\x.nii.gz", "..", "", None, 3],
)
@pytest.mark.parametrize("kind", ["image", "label"])
def test_entries_that_escape_the_folder(tmp_path: Path, workspace: Workspace, entry: object, kind: str) -> None:
    source = task(tmp_path)
    content = json.loads((source / "dataset.json").read_text())
    content["training"][1][kind] = entry
    (source / "dataset.json").write_text(json.dumps(content))
    message = refusal(source, workspace)
    assert repr(entry) in message
    assert "leads out of that folder" in message or "is no path" in message


def test_test_entries_may_not_escape_either(tmp_path: Path, workspace: Workspace) -> None:
    assert "leads out of that folder" in refusal(task(tmp_path, test=["../../etc/passwd"]), workspace)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": None}, "has no 'labels'"),
        ({"modality": None}, "has no 'channel_names'"),
        ({"labels": {"0": "background", "1": "a", "01": "b"}}, "several labels have the value 1"),
        ({"modality": {"1": "MR"}}, "channels of"),
        ({"training": ["./imagesTr/brain_001.nii.gz"]}, "'training' in"),
        ({"training": {"a": 1}}, "'training' in"),
        ({"training": [{"image": "imagesTr/notes.txt", "label": "imagesTr/notes.txt"}]}, "no NIfTI"),
    ],
)
def test_a_dataset_json_that_is_wrong(tmp_path: Path, workspace: Workspace, changes: dict, words: str) -> None:
    source = task(tmp_path, **changes)
    (source / "imagesTr/notes.txt").touch()
    assert words in refusal(source, workspace)


def test_a_dataset_json_that_is_no_json(tmp_path: Path, workspace: Workspace) -> None:
    source = task(tmp_path)
    (source / "dataset.json").write_text('{"name": "x",}')
    assert "not valid JSON" in refusal(source, workspace)


def test_names_that_cannot_be(tmp_path: Path, workspace: Workspace) -> None:
    source = task(tmp_path)
    assert "'Brain Tumour' cannot be the name" in refusal(source, workspace, name="Brain Tumour")
    assert "'../x' cannot be the name" in refusal(source, workspace, name="../x")


def test_a_case_that_is_listed_twice(tmp_path: Path, workspace: Workspace) -> None:
    entry = {"image": "imagesTr/brain_001.nii.gz", "label": "labelsTr/brain_001.nii.gz"}
    assert "Two cases are called 'brain_001'" in refusal(task(tmp_path, training=[entry, entry]), workspace)


def test_the_wrong_number_of_channels_in_one_file(tmp_path: Path, workspace: Workspace) -> None:
    source = task(tmp_path, channels=3)
    sitk.WriteImage(image(1, 2), str(source / "imagesTr/brain_001.nii.gz"))
    message = refusal(source, workspace)
    assert "it is 4D, 9×8×7×2 voxels; expected is 4D with 3 channels" in message


@pytest.mark.parametrize("channels", [1, 3])
def test_a_truncated_file(tmp_path: Path, workspace: Workspace, channels: int) -> None:
    source = task(tmp_path, channels=channels)
    path = source / "imagesTr/brain_001.nii.gz"
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} cannot be used: it is truncated" in refusal(source, workspace)


def test_nan_in_one_channel(tmp_path: Path, workspace: Workspace) -> None:
    source = task(tmp_path, channels=3)
    voxels = np.ones((3, *SIZE), np.float32)
    voxels[2, 0, 0, 0] = np.nan
    volume = sitk.GetImageFromArray(voxels, isVector=False)
    sitk.WriteImage(volume, str(source / "imagesTr/brain_001.nii.gz"))
    assert "brain_001.nii.gz cannot be used: 1 of its voxels are NaN" in refusal(source, workspace)


# --- real data ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (SHARED_DATA / "Task04_Hippocampus").is_dir(),
    reason=f"no Task04_Hippocampus in {SHARED_DATA} (DIFFSEG_TEST_DATA)",
)
def test_the_hippocampus_task(workspace: Workspace) -> None:
    source = SHARED_DATA / "Task04_Hippocampus"
    report = run(source, workspace, dataset_id=4, copy=True)
    listed = json.loads((source / "dataset.json").read_text())["training"]
    assert report.folder.name == "Dataset004_Hippocampus"
    assert report.cases["training"] == len(listed)
    # some of its labels are stored as floats, which the copy is not
    types = [sitk.ReadImage(str(source / entry["label"])).GetPixelIDTypeAsString() for entry in listed]
    floats = sum("float" in kind for kind in types)
    assert report.files == {"copied": 2 * len(listed) - floats, "encoded": floats}
    assert [finding.code for finding in report.findings] == ["label_float"] * floats
    dataset = RawDataset.open(report.folder)
    assert dataset.labels == {"background": 0, "Anterior": 1, "Posterior": 2}
    assert len(dataset.labelled_cases()) == len(listed)
    first = dataset.labelled_cases()[0]
    assert_same_volume(first.images[0], sitk.ReadImage(str(source / f"imagesTr/{first.identifier}.nii.gz")))
