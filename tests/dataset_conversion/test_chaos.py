"""CHAOS's tree: which mask belongs to which slice, and grey values."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from diffseg_nnunet import registry
from diffseg_nnunet.dataset_conversion.chaos import CHAOSConverter
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import RawDataset
from diffseg_nnunet.verification import verify_dataset
from diffseg_nnunet.workspace import Workspace

from .dicom.written import ORIGIN, SIZE, by_gdcm, stored_values, write_series

GREYS = np.array([0, 63, 126, 189, 252], np.uint8)


def labels(count: int) -> np.ndarray:
    """Every slice different, so that a mask in the wrong slice is seen."""
    return np.random.default_rng(9).integers(0, count + 1, SIZE).astype(np.uint8)


def write_masks(folder: Path, greys: np.ndarray, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for plane, name in zip(greys, names, strict=True):
        Image.fromarray(plane).save(folder / name)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One case a part; in CT the first file is the topmost slice, as in the public files."""
    train, test = tmp_path / "CHAOS_Train_Sets/Train_Sets", tmp_path / "CHAOS_Test_Sets/Test_Sets"
    down = np.array(ORIGIN) - np.arange(SIZE[0])[:, None] * [0, 0, 3.0]
    ct = {"positions": down, "name": "i{:04d},0000b.dcm"}
    write_series(train / "CT/21/DICOM_anon", stored_values(1), **ct)
    names = [f"liver_GT_{place:03d}.png" for place in range(SIZE[0])]
    write_masks(train / "CT/21/Ground", labels(1) * np.uint8(255), names)
    write_series(test / "CT/3/DICOM_anon", stored_values(2), **ct)
    mr = {"modality": "MR", "RescaleSlope": None, "RescaleIntercept": None}
    dual = train / "MR/2/T1DUAL"
    for number, phase in ((1, "OutPhase"), (2, "InPhase")):
        numbers = [2 * place + number for place in range(SIZE[0])]
        write_series(
            dual / "DICOM_anon" / phase, stored_values(number), numbers=numbers, name="IMG-0004-{:05d}.dcm", **mr
        )
    write_masks(dual / "Ground", GREYS[labels(4)], [f"IMG-0004-{2 * place + 2:05d}.png" for place in range(SIZE[0])])
    write_series(train / "MR/2/T2SPIR/DICOM_anon", stored_values(4), name="IMG-0002-{:05d}.dcm", **mr)
    names = [f"IMG-0002-{place:05d}.png" for place in range(SIZE[0])]
    write_masks(train / "MR/2/T2SPIR/Ground", GREYS[labels(4)], names)
    return tmp_path


def refusal(source: Path, workspace: Workspace, part: str | None) -> str:
    with pytest.raises(BadInputError) as caught:
        CHAOSConverter().plan(source, part=part).execute(dataset_id=1, workspace=workspace, workers=2)
    assert caught.value.mend
    assert not workspace.raw.exists() or not list(workspace.raw.iterdir())
    return str(caught.value)


def voxels(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_it_is_registered() -> None:
    assert registry.load("converters", "chaos") is CHAOSConverter


@pytest.mark.parametrize(
    ("part", "case", "channels", "organs", "downwards"),
    [
        ("CT", "CT_021", ["DICOM_anon"], 1, True),
        ("T1DUAL", "T1DUAL_002", ["DICOM_anon/InPhase", "DICOM_anon/OutPhase"], 4, False),
        ("T2SPIR", "T2SPIR_002", ["DICOM_anon"], 4, False),
    ],
)
def test_each_part(
    source: Path, workspace: Workspace, part: str, case: str, channels: list[str], organs: int, downwards: bool
) -> None:
    report = CHAOSConverter().plan(source, part=part).execute(dataset_id=1, workspace=workspace, workers=2)
    inner = "CT/21" if part == "CT" else f"MR/2/{part}"
    for number, channel in enumerate(channels):
        written = report.folder / f"imagesTr/{case}_000{number}.nii.gz"
        expected = by_gdcm(source / "CHAOS_Train_Sets/Train_Sets" / inner / channel)
        np.testing.assert_array_equal(voxels(written), sitk.GetArrayFromImage(expected))
    expected = labels(organs)[::-1] if downwards else labels(organs)
    np.testing.assert_array_equal(voxels(report.folder / f"labelsTr/{case}.nii.gz"), expected)
    assert report.cases == {"training": 1, "unlabelled": 0, "test": int(part == "CT")}
    assert list(RawDataset.open(report.folder).labels) == [
        "background",
        *["liver", "right_kidney", "left_kidney", "spleen"][:organs],
    ]
    assert bool(report.notes) == (part == "CT")
    assert verify_dataset(RawDataset.open(report.folder), workers=2) == []


def test_numbers_order_names_not_letters(source: Path, workspace: Workspace) -> None:
    """liver_GT_10 comes after liver_GT_9."""
    ground = source / "CHAOS_Train_Sets/Train_Sets/CT/21/Ground"
    for place, path in enumerate(sorted(ground.iterdir())):
        path.rename(ground / f"liver_GT_{place + 7}.png")
    report = CHAOSConverter().plan(source, part="CT").execute(dataset_id=1, workspace=workspace, workers=2)
    np.testing.assert_array_equal(voxels(report.folder / "labelsTr/CT_021.nii.gz"), labels(1)[::-1])


@pytest.mark.parametrize("below", ["CHAOS_Train_Sets", "CHAOS_Train_Sets/Train_Sets"])
def test_any_level_will_do(source: Path, below: str) -> None:
    assert [case.identifier for case in CHAOSConverter().plan(source / below, part="CT").cases] == ["CT_021"]


def test_recognition(source: Path, tmp_path: Path) -> None:
    assert CHAOSConverter().recognise(source).options == {"part": "CT"}
    shutil.rmtree(source / "CHAOS_Train_Sets")
    shutil.rmtree(source / "CHAOS_Test_Sets")
    assert CHAOSConverter().recognise(source) is None


def test_parts_must_be_chosen(source: Path, workspace: Workspace) -> None:
    assert "CHAOS has several parts. Choose one with --part: CT, T1DUAL, T2SPIR" in refusal(source, workspace, None)
    assert "--part PET is unknown" in refusal(source, workspace, "PET")
    shutil.rmtree(source / "CHAOS_Train_Sets")
    assert "has no T2SPIR case" in refusal(source, workspace, "T2SPIR")


def test_unknown_greys_stop_it(source: Path, workspace: Workspace) -> None:
    """An earlier release coded the organs as 80, 160, 240 and 255."""
    mask = source / "CHAOS_Train_Sets/Train_Sets/MR/2/T2SPIR/Ground/IMG-0002-00003.png"
    Image.fromarray(np.full(SIZE[1:], 240, np.uint8)).save(mask)
    message = refusal(source, workspace, "T2SPIR")
    assert "IMG-0002-00003.png cannot be used: it has the grey values 240; known are 0, 63, 126, 189, 252" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Image.fromarray(np.zeros((9, 9), np.uint8)), "it has (9, 9) pixels, its image (14, 11)"),
        (Image.new("RGB", SIZE[:0:-1]), "no 8-bit grey image (mode RGB)"),
        (b"\x89PNG\r\n\x1a\nnothing", "no PNG that can be read"),
    ],
)
def test_masks_that_are_none(source: Path, workspace: Workspace, content: object, words: str) -> None:
    mask = source / "CHAOS_Train_Sets/Train_Sets/CT/21/Ground/liver_GT_003.png"
    mask.write_bytes(content) if isinstance(content, bytes) else content.save(mask)
    assert words in refusal(source, workspace, "CT")


def test_a_missing_mask_and_no_masks(source: Path, workspace: Workspace) -> None:
    ground = source / "CHAOS_Train_Sets/Train_Sets/CT/21/Ground"
    (ground / "liver_GT_003.png").unlink()
    assert "there are 5 masks of 6 images" in refusal(source, workspace, "CT")
    shutil.rmtree(ground)
    assert "Ground has no mask" in refusal(source, workspace, "CT")


def test_black_and_white_masks(source: Path, workspace: Workspace) -> None:
    ground = source / "CHAOS_Train_Sets/Train_Sets/CT/21/Ground"
    for path in ground.iterdir():
        Image.open(path).convert("1").save(path)
    report = CHAOSConverter().plan(source, part="CT").execute(dataset_id=1, workspace=workspace, workers=2)
    np.testing.assert_array_equal(voxels(report.folder / "labelsTr/CT_021.nii.gz"), labels(1)[::-1])
