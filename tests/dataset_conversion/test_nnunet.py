"""nnU-Net raw data sets (v2, v1): what is kept, what is remapped, what is refused; the truth is read with nibabel."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffseg_nnunet import registry
from diffseg_nnunet.dataset_conversion.core import ConversionReport
from diffseg_nnunet.dataset_conversion.nnunet import NNUNetConverter
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import RawDataset
from diffseg_nnunet.verification import verify_dataset
from diffseg_nnunet.workspace import Workspace

SIZE = (6, 7, 8)
LABELS = {"background": 0, "left kidney": 1, "right kidney": 2, "liver": 3, "cyst": 4}


def affine(case: str) -> np.ndarray:
    rng = np.random.default_rng(sum(case.encode()))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * rng.uniform(0.5, 4, 3)
    matrix[:3, 3] = rng.uniform(-300, 300, 3)
    return matrix


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def write(path: Path, case: str, values: np.ndarray | None = None) -> Path:
    rng = np.random.default_rng(list(path.name.encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    values = rng.integers(-1000, 1000, SIZE).astype(np.int16) if values is None else values
    nib.save(nib.Nifti1Image(values, affine(case)), path)
    path.with_name(f"._{path.name}").write_bytes(b"macOS")
    return path


def label(path: Path, case: str, values: tuple[int, ...] = (0, 1, 2, 3, 4)) -> Path:
    drawn = np.random.default_rng(len(case)).choice(values, SIZE).astype(np.uint8)
    drawn.flat[: len(values)] = values
    return write(path, case, drawn)


def raw(root: Path, folder: str = "Dataset123_Kidneys", channels: int = 1, **changes: Any) -> Path:
    """Two training cases, one unlabelled, two test cases of which one has a label."""
    source = root / "nnUNet_raw" / folder
    for channel in range(channels):
        for sub, cases in (("imagesTr", ("a_01", "a_02")), ("imagesUn", ("u_01",)), ("imagesTs", ("t_01", "t_02"))):
            for case in cases:
                write(source / sub / f"{case}_{channel:04d}.nii.gz", case)
    for case in ("a_01", "a_02"):
        label(source / f"labelsTr/{case}.nii.gz", case)
    label(source / "labelsTs/t_01.nii.gz", "t_01")
    content = {
        "channel_names": {str(channel): f"MR{channel}" for channel in range(channels)},
        "labels": LABELS,
        "numTraining": 2,
        "file_ending": ".nii.gz",
        "reference": "somebody",
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
        "regions_class_order": [1],
        **changes,
    }
    content = {key: value for key, value in content.items() if value is not None}
    (source / "dataset.json").write_text(json.dumps(content))
    return source


Run = Callable[..., ConversionReport]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    workspace = Workspace.locate(tmp_path / "workspace")

    def run(source: Path, **options: object) -> ConversionReport:
        return NNUNetConverter().plan(source, **options).execute(dataset_id=7, workspace=workspace, workers=2)

    return run


def refusal(source: Path, **options: object) -> str:
    with pytest.raises(BadInputError) as caught:
        NNUNetConverter().plan(source, **options)
    assert caught.value.mend
    return str(caught.value)


def assert_same(written: Path, source: Path) -> None:
    np.testing.assert_array_equal(voxels(written), voxels(source))
    np.testing.assert_allclose(nib.load(written).affine, nib.load(source).affine, atol=1e-4)


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
def test_everything_is_kept(tmp_path: Path, run: Run, channels: int) -> None:
    source = raw(tmp_path, channels=channels)
    report = run(source)
    assert report.folder.name == "Dataset007_Kidneys"
    assert report.cases == {"training": 2, "unlabelled": 1, "test": 2}
    assert set(report.files) == {"linked"}
    files = {path.relative_to(source).as_posix() for path in source.rglob("[!.]*.nii.gz")}
    assert {path.relative_to(report.folder).as_posix() for path in report.folder.rglob("*.nii.gz")} == files
    for path in files:
        assert_same(report.folder / path, source / path)
    assert json.loads((report.folder / "dataset.json").read_text()) == {
        "reference": "somebody",
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
        "converted_from": "nnunet",
        "name": "Kidneys",
        "channel_names": {str(channel): f"MR{channel}" for channel in range(channels)},
        "labels": LABELS,
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    findings = verify_dataset(RawDataset.open(report.folder), workers=1)
    assert [finding for finding in findings if finding.severity == "error"] == []


def test_labels_are_renamed_merged_and_dropped(tmp_path: Path, run: Run) -> None:
    source = raw(tmp_path)
    report = run(source, map="left kidney=kidney, right kidney=kidney,cyst=background")
    written = json.loads((report.folder / "dataset.json").read_text())["labels"]
    assert written == {"background": 0, "kidney": 1, "liver": 2}
    for path in ("labelsTr/a_01.nii.gz", "labelsTr/a_02.nii.gz", "labelsTs/t_01.nii.gz"):
        before, after = voxels(source / path), voxels(report.folder / path)
        np.testing.assert_array_equal(after == written["kidney"], (before == 1) | (before == 2))
        np.testing.assert_array_equal(after == written["liver"], before == 3)
        np.testing.assert_array_equal(after == 0, (before == 0) | (before == 4))
    assert_same(report.folder / "imagesTr/a_01_0000.nii.gz", source / "imagesTr/a_01_0000.nii.gz")


NAMES = st.sampled_from(["background", "ignore", "kidney", "liver", "cyst", "spleen"])


@given(st.dictionaries(st.sampled_from([name for name in LABELS if name != "background"]), NAMES))
@settings(max_examples=40, deadline=None)
def test_any_map_gives_numbers_that_nnunet_takes(renamed: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        for sub in ("imagesTr/a_0000", "labelsTr/a"):
            (source / sub).parent.mkdir()
            (source / f"{sub}.nii.gz").touch()
        content = {"channel_names": {"0": "CT"}, "labels": LABELS, "file_ending": ".nii.gz"}
        (source / "dataset.json").write_text(json.dumps(content))
        text = ",".join(f"{old}={new}" for old, new in renamed.items())
        plan = NNUNetConverter().plan(source, name="Any", map=text)
    assert sorted(plan.labels.values()) == list(range(len(plan.labels)))
    assert plan.labels["background"] == 0
    assert plan.labels.get("ignore", len(plan.labels) - 1) == len(plan.labels) - 1
    new = {old: renamed.get(old, old) for old in LABELS}
    assert set(plan.labels) == {"background", *new.values()}
    values = plan.values(plan.cases[0])
    assert values == {LABELS[old]: plan.labels[new[old]] for old in LABELS}


def test_a_label_may_join_one_that_stays_or_be_ignored(tmp_path: Path, run: Run) -> None:
    source = raw(tmp_path)
    report = run(source, map="cyst=ignore,left kidney=liver")
    written = json.loads((report.folder / "dataset.json").read_text())["labels"]
    assert written == {"background": 0, "liver": 1, "right kidney": 2, "ignore": 3}
    before, after = (voxels(folder / "labelsTr/a_01.nii.gz") for folder in (source, report.folder))
    expected = np.choose(before, [0, 1, 2, 1, 3])
    np.testing.assert_array_equal(after, expected)


def test_unlabelled_images_are_added(tmp_path: Path, run: Run) -> None:
    source = raw(tmp_path)
    write(tmp_path / "pool/p_01.nii.gz", "p_01")
    write(tmp_path / "more/p_02_0000.nii.gz", "p_02")
    report = run(source, unlabelled=(tmp_path / "pool", tmp_path / "more"), name="Bigger")
    assert report.folder.name == "Dataset007_Bigger"
    names = sorted(path.name for path in (report.folder / "imagesUn").iterdir())
    assert names == ["p_01_0000.nii.gz", "p_02_0000.nii.gz", "u_01_0000.nii.gz"]
    assert_same(report.folder / "imagesUn/p_01_0000.nii.gz", tmp_path / "pool/p_01.nii.gz")


def test_gaps_between_values_are_closed(tmp_path: Path, run: Run) -> None:
    source = raw(tmp_path, labels={"background": 0, "liver": 2, "cyst": 5})
    for path in ("labelsTr/a_01", "labelsTr/a_02", "labelsTs/t_01"):
        label(source / f"{path}.nii.gz", path.split("/")[1], (0, 2, 5))
    report = run(source)
    assert json.loads((report.folder / "dataset.json").read_text())["labels"] == {
        "background": 0,
        "liver": 1,
        "cyst": 2,
    }
    assert "0, 2, 5 became 0 to 2" in " ".join(report.notes)
    before, after = (voxels(folder / "labelsTr/a_02.nii.gz") for folder in (source, report.folder))
    np.testing.assert_array_equal((after == 1, after == 2), (before == 2, before == 5))


def test_version_1(tmp_path: Path, run: Run) -> None:
    source = raw(
        tmp_path,
        "Task017_AbdominalOrgans",
        channel_names=None,
        file_ending=None,
        modality={"0": "CT"},
        labels={str(value): name for name, value in LABELS.items()},
        tensorImageSize="4D",
        numTest=2,
        training=[{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in ("a_01",)],
        test=["./imagesTs/t_01.nii.gz"],
    )
    report = run(source)
    assert report.folder.name == "Dataset007_AbdominalOrgans"
    written = json.loads((report.folder / "dataset.json").read_text())
    assert (written["labels"], written["channel_names"]) == (LABELS, {"0": "CT"})
    assert_same(report.folder / "labelsTr/a_02.nii.gz", source / "labelsTr/a_02.nii.gz")


def test_cases_that_dataset_json_lists(tmp_path: Path, run: Run) -> None:
    elsewhere = raw(tmp_path / "elsewhere")
    source = raw(
        tmp_path,
        dataset={
            "x": {
                "images": [str(elsewhere / "imagesTr/a_01_0000.nii.gz")],
                "label": "../../elsewhere/nnUNet_raw/Dataset123_Kidneys/labelsTr/a_01.nii.gz",
            }
        },
    )
    report = run(source)
    assert report.cases == {"training": 1, "unlabelled": 1, "test": 2}
    assert_same(report.folder / "imagesTr/x_0000.nii.gz", elsewhere / "imagesTr/a_01_0000.nii.gz")
    assert_same(report.folder / "labelsTr/x.nii.gz", elsewhere / "labelsTr/a_01.nii.gz")
    (elsewhere / "labelsTr/a_01.nii.gz").unlink()
    assert "1 file(s) that" in refusal(source)


@pytest.mark.parametrize("where", ["nnUNet_preprocessed/Dataset123_Kidneys", "nnUNet_raw/Dataset123_Kidneys"])
def test_splits_are_kept(tmp_path: Path, where: str) -> None:
    source = raw(tmp_path)
    path = tmp_path / where / "splits_final.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('[{"train": ["a_01"], "val": ["a_02"]}, {"train": ["a_02"], "val": ["a_01"]}]')
    plan = NNUNetConverter().plan(source)
    (own,) = plan.splits
    assert own.folds == ({"train": ("a_01",), "val": ("a_02",)}, {"train": ("a_02",), "val": ("a_01",)})
    path.write_text('[{"train": ["a_01"], "val": ["b_02"]}]')
    plan = NNUNetConverter().plan(source)
    assert plan.splits == ()
    assert "names cases that are not here (b_02)" in " ".join(plan.notes)
    path.write_text('{"train": 3}')
    assert "is no list of folds" in " ".join(NNUNetConverter().plan(source).notes)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_regions(tmp_path: Path) -> None:
    source = raw(tmp_path, labels={"background": 0, "whole tumour": [1, 2, 3], "core": [2, 3], "cyst": [4]})
    message = refusal(source)
    assert "has regions (whole tumour, core)" in message
    assert "imagesUn" in message


@pytest.mark.parametrize("text", ["kidney=organ", "liver", "liver=", "=liver", "background=liver", "liver=a,,cyst=b"])
def test_a_map_that_cannot_be(tmp_path: Path, text: str) -> None:
    message = refusal(raw(tmp_path), map=text)
    assert "does not rename a label; there are left kidney, right kidney, liver, cyst" in message


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("imagesTr/a_01_0000.nii.gz", "1 case(s) in {source}/labelsTr have no image: a_01"),
        ("labelsTr/a_02.nii.gz", "1 case(s) in {source}/imagesTr have no label: a_02"),
        ("dataset.json", "has no dataset.json"),
    ],
)
def test_half_a_data_set(tmp_path: Path, gone: str, words: str) -> None:
    source = raw(tmp_path)
    (source / gone).unlink()
    assert words.format(source=source) in refusal(source)


def test_a_missing_channel(tmp_path: Path) -> None:
    source = raw(tmp_path, channels=2)
    (source / "imagesTr/a_01_0001.nii.gz").rename(source / "imagesTr/a_01_0002.nii.gz")
    assert "The case 'a_01' has 2 image(s)" in refusal(source)


def test_one_level_too_high_or_too_low(tmp_path: Path) -> None:
    source = raw(tmp_path)
    assert f"There is one in {source}" in refusal(source.parent)
    assert f"There is one in {source}" in refusal(source / "imagesTr")


def test_one_case_twice(tmp_path: Path, run: Run) -> None:
    source = raw(tmp_path)
    write(tmp_path / "pool/a_01.nii.gz", "a_01")
    with pytest.raises(BadInputError, match="Two cases are called 'a_01'"):
        run(source, unlabelled=(tmp_path / "pool",))


def test_values_and_names_that_do_not_match(tmp_path: Path, run: Run) -> None:
    with pytest.raises(BadInputError, match=r"that have no name: 4 \(named are 0, 1, 2, 3\)"):
        run(raw(tmp_path, labels={name: value for name, value in LABELS.items() if value < 4}))
    assert "several labels have the value 1" in refusal(raw(tmp_path / "b", labels={"background": 0, "a": 1, "b": 1}))


def test_flat_pictures(tmp_path: Path) -> None:
    assert "'.png'" in refusal(raw(tmp_path, file_ending=".png"))


# --- told apart -------------------------------------------------------------------------------------------------------


def recognised(source: Path) -> dict[str, float]:
    found = {name: registry.load("converters", name)().recognise(source) for name in ("msd", "nnunet")}
    return {name: each.certainty for name, each in found.items() if each}


def decathlon(root: Path, stem: str, **changes: Any) -> Path:
    for sub in ("imagesTr", "labelsTr"):
        write(root / sub / f"{stem}.nii.gz", stem)
    content = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "organ"}, "tensorImageSize": "3D", **changes}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def test_nnunet_and_the_decathlon_are_told_apart(tmp_path: Path) -> None:
    assert recognised(raw(tmp_path)) == {"nnunet": 1.0}
    assert recognised(raw(tmp_path / "b", "anything")) == {"nnunet": 0.95}
    assert recognised(raw(tmp_path / "c", "Task003_Liver", channel_names=None, file_ending=None)) == {"nnunet": 1.0}
    assert recognised(decathlon(tmp_path / "Task09_Spleen", "spleen_2")) == {"msd": 1.0}
    # a renamed folder, a name that looks like a channel number, a file_ending that somebody added
    assert recognised(decathlon(tmp_path / "Dataset009_Spleen", "spleen_2")) == {"msd": 1.0}
    assert recognised(decathlon(tmp_path / "other", "amos_0001", file_ending=".nii.gz")) == {"msd": 0.6}
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/dataset.json").write_text("{")
    assert recognised(tmp_path / "broken") == {}
    assert recognised(tmp_path) == {}
