"""BTCV in its public layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from diffseg_nnunet.workspace import Workspace

from .trees import (
    BTCV,
    BTCV_LAYOUTS,
    BTCV_NUMBERS,
    SHARED_DATA,
    Tree,
    btcv,
    convert,
    count,
    notes,
    plan,
    refusal,
)


@pytest.mark.parametrize("layout", BTCV_LAYOUTS)
def test_btcv(tmp_path: Path, workspace: Workspace, layout: str) -> None:
    tree, (image, label, test) = btcv(tmp_path / "btcv", layout)
    folder = convert("btcv", tmp_path / "btcv", workspace)
    assert (count(folder, "imagesTr"), count(folder, "labelsTr"), count(folder, "imagesTs")) == (30, 30, 2)
    for number in (f"{number:04d}" for number in BTCV_NUMBERS):
        tree.check(folder, "Tr", f"btcv_{number}", image.format(number), label.format(number))
    for number in ("0061", "0080"):
        tree.check(folder, "Ts", f"btcv_{number}", test.format(number))
    assert json.loads((folder / "dataset.json").read_text())["channel_names"] == {"0": "CT"}


def test_btcv_splits_name_its_cases(tmp_path: Path) -> None:
    btcv(tmp_path / "btcv")
    made = plan("btcv", tmp_path / "btcv")
    assert [scheme.name for scheme in made.splits][:2] == ["24/6", "18/12"]
    assert made.splits[0].folds[0]["val"] == tuple(f"btcv_00{number}" for number in range(35, 41))
    training = {case.identifier for case in made.cases if case.role == "training"}
    assert all({*fold["train"], *fold["val"]} <= training for scheme in made.splits for fold in scheme.folds)


@pytest.mark.parametrize("start", ["RawData", "RawData/Training", "RawData/Training/img", ".."])
def test_btcv_one_level_too_low_or_too_high(tmp_path: Path, start: str) -> None:
    btcv(tmp_path / "btcv")
    assert len(plan("btcv", tmp_path / "btcv" / start).cases) == 32


def test_btcv_half_a_download(tmp_path: Path, workspace: Workspace) -> None:
    source = tmp_path / "btcv"
    btcv(source, numbers=BTCV_NUMBERS[:24])
    shutil.rmtree(source / "RawData/Testing")
    said = notes("btcv", source)
    assert "24 training image(s) found as Training/img/img{case}, a whole download has 30." in said
    assert "offered whole or not at all: 24/6, 18/12" in said
    assert "btcv_0035" in said
    assert [scheme.name for scheme in plan("btcv", source).splits] == ["5-fold"]
    assert count(convert("btcv", source, workspace), "imagesTr") == 24


def test_btcv_missing_labels_and_images(tmp_path: Path) -> None:
    btcv(tmp_path / "btcv", numbers=[1, 2, 3])
    (tmp_path / "btcv/RawData/Training/label/label0002.nii.gz").unlink()
    message = refusal("btcv", tmp_path / "btcv")
    assert "1 file(s) have no label" in message
    assert "img0002.nii.gz" in message
    (tmp_path / "btcv/RawData/Training/img/img0002.nii.gz").unlink()
    (tmp_path / "btcv/RawData/Training/img/img0003.nii.gz").unlink()
    assert "1 file(s) have no image" in refusal("btcv", tmp_path / "btcv")


def test_btcv_is_not_the_cardiac_set_beside_it(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "syn3193805", ["heart"])
    tree.case("averaged-training-images/DET0000101_avg", "averaged-training-labels/DET0000101_avg_seg")
    for start in (tree.root, tree.root / "averaged-training-images"):
        message = refusal("btcv", start)
        assert "cardiac set, not the 30 abdominal CTs" in message
        assert "RawData.zip" in message
    btcv(tree.root / "Abdomen")
    assert len(plan("btcv", tree.root).cases) == 32


def test_btcv_something_else(tmp_path: Path) -> None:
    Tree(tmp_path / "other", BTCV).case("images/a", "labels/a")
    assert "Training/img/img0001.nii.gz" in refusal("btcv", tmp_path / "other")
    assert "There is no folder" in refusal("btcv", tmp_path / "nowhere")


@pytest.mark.skipif(not (SHARED_DATA / "BTCV_3mm").is_dir(), reason=f"no BTCV_3mm in {SHARED_DATA} (DIFFSEG_TEST_DATA)")
def test_real_btcv(workspace: Workspace) -> None:
    tree = Tree(SHARED_DATA / "BTCV_3mm/RawData/Training", BTCV)
    folder = convert("btcv", SHARED_DATA / "BTCV_3mm", workspace)
    numbers = [f"{number:04d}" for number in [*range(1, 11), *range(21, 35)]]
    assert count(folder, "imagesTr") == count(folder, "labelsTr") == len(numbers) == 24
    for number in numbers:
        tree.check(folder, "Tr", f"btcv_{number}", f"img/img{number}", f"label/label{number}")
