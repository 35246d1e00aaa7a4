"""The pool: cases of several data sets side by side."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.training.dataloading import nnunet_dataset
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from skimage.io import imsave

from diffseg_nnunet.coordinates.head import CoordinateMode, CoordinateSettings
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.trainers import DiffSegPretrainer
from diffseg_nnunet.trainers.pool import PooledDataset, PoolMember, pools_of_fold, united
from diffseg_nnunet.training.settings import PretrainingSettings


def member(folder: Path, source: str, values: dict[str, int], read: dict[str, Any] | None = None) -> PoolMember:
    """A preprocessed folder of cases that are constant; `read` is what a reader says of each."""
    (folder / source).mkdir()
    for case, value in values.items():
        shape = (1, 2 + value, 3, 4)
        nnUNetDatasetBlosc2.save_case(
            np.full(shape, value, np.float32),
            np.zeros(shape, np.int16),
            {"value": value} | (read or {}),
            str(folder / source / case),
            chunks=shape,
            blocks=shape,
        )
    return PoolMember(source, folder / source, tuple(values))


def test_equal_case_ids_are_kept_apart(tmp_path: Path) -> None:
    one, other = member(tmp_path, "One", {"b": 1, "a": 2}), member(tmp_path, "Other", {"a": 3})
    pool = PooledDataset([one, other])
    assert pool.identifiers == ["One/a", "One/b", "Other/a"]
    for identifier, value in (("One/a", 2), ("One/b", 1), ("Other/a", 3)):
        data, _, _, properties = pool.load_case(identifier)
        assert (np.asarray(data[:]) == value).all()
        assert pool.described(identifier) == (properties, (2 + value, 3, 4)) == ({"value": value}, (2 + value, 3, 4))
    assert pool.one_of_each_source() == ["Other/a", "One/a"]
    assert pool.record() == {"One": ["a", "b"], "Other": ["a"]}


def test_a_case_is_described_by_reading_its_record_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool may have thousands, and the records of labelled ones are large."""
    pool, read = PooledDataset([member(tmp_path, "One", {"a": 1})]), []
    load = nnunet_dataset.load_pickle
    monkeypatch.setattr(nnunet_dataset, "load_pickle", lambda path: read.append(path) or load(path))
    assert pool.described("One/a") == ({"value": 1}, (3, 3, 4))
    assert len(read) == 1


def test_only_the_named_cases_are_in_the_pool(tmp_path: Path) -> None:
    whole = member(tmp_path, "One", {"a": 1, "b": 2})
    assert PooledDataset([PoolMember("One", whole.folder, ("b",))]).identifiers == ["One/b"]


def test_records_are_united() -> None:
    assert united({"One": ["b", "a"], "Two": ["c"]}, {"One": ["b", "d"]}, {}, {"Three": ["e"]}) == {
        "One": ["a", "b", "d"],
        "Three": ["e"],
        "Two": ["c"],
    }


def test_empty_pool_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"pool to pretrain on is empty.*diffseg preprocess"):
        PooledDataset([PoolMember("One", tmp_path, ())])


def test_the_same_case_twice_is_refused(tmp_path: Path) -> None:
    one = member(tmp_path, "One", {"a": 1, "b": 2})
    with pytest.raises(BadInputError, match=r"two cases of the same id: One/b\..*imagesUn"):
        PooledDataset([one, PoolMember("One", one.folder, ("b",))])


DATA = "plans_3d"
PLACED = {"spacing": [1.0] * 3, "sitk_stuff": {"direction": tuple(np.eye(3).flatten()), "origin": (0.0, 0.0, 0.0)}}


def preprocessed_data_set(folder: Path, unlabelled: dict[str, int]) -> Path:
    """Labelled cases a to d, and further ones from imagesUn."""
    member(folder, DATA, dict.fromkeys("abcd", 1))
    (folder / f"{DATA}_unlabelled").mkdir()
    member(folder / f"{DATA}_unlabelled", folder.name, unlabelled)
    return folder


@pytest.mark.parametrize("pool", ["unlabeled", "training"])
def test_a_copy_of_a_validation_case_in_images_un_is_no_way_into_the_pool(tmp_path: Path, pool: str) -> None:
    """An id in imagesTr and imagesUn alike, which only verifying tells."""
    folder, name = preprocessed_data_set(tmp_path, {"d": 1, "u": 1}), tmp_path.name
    with pytest.raises(BadInputError, match=rf"1 validation case.* fold 0 .*: {name}/d\..*splits_final.*imagesUn"):
        pools_of_fold(folder, DATA, pool, 0, ["a", "b"], ["c", "d"])


def test_a_copy_of_a_training_case_is_refused_too(tmp_path: Path) -> None:
    """It would be drawn twice as often, or hide the other."""
    folder = preprocessed_data_set(tmp_path, {"a": 1})
    with pytest.raises(BadInputError, match="two cases of the same id"):
        pools_of_fold(folder, DATA, "training", 0, ["a", "b"], ["c", "d"])


def test_splits_that_overlap_are_refused(tmp_path: Path) -> None:
    """Of the user's own splits_final.json; what is pretrained on all cases hides nothing."""
    folder = preprocessed_data_set(tmp_path, {"u": 1})
    with pytest.raises(BadInputError, match=rf"{tmp_path.name}/b, {tmp_path.name}/c\."):
        pools_of_fold(folder, DATA, "training", 0, ["a", "b", "c"], ["b", "c", "d"])
    for pool, fold in (("all", 0), ("training", "all")):
        seen, watched = pools_of_fold(folder, DATA, pool, fold, ["a", "b", "c", "d"], ["b", "c", "d"])
        assert [identifier[-1] for identifier in seen.identifiers] == ["a", "b", "c", "d", "u"]
        assert [identifier[-1] for identifier in watched.identifiers] == ["b", "c", "d"]


def test_what_is_held_back_is_not_learnt_from(tmp_path: Path) -> None:
    """Of this name and data set alone; a pool that is to hold everything holds it, too."""
    folder = preprocessed_data_set(tmp_path, {"u": 1, "v": 1})
    held_back, cases = [f"{tmp_path.name}/u", "elsewhere/v", f"{tmp_path.name}/a"], (["a", "b"], ["c", "d"])
    for pool, fold, expected in (("training", 0, "abv"), ("unlabeled", 0, "v"), ("all", 0, "abcduv")):
        seen, watched = pools_of_fold(folder, DATA, pool, fold, *cases, held_back)
        assert "".join(identifier[-1] for identifier in seen.identifiers) == expected
        assert "".join(identifier[-1] for identifier in watched.identifiers) == "cd"
    with pytest.raises(BadInputError, match="pool to pretrain on is empty"):
        pools_of_fold(folder, DATA, "unlabeled", 0, *cases, [f"{tmp_path.name}/{case}" for case in "uv"])


def test_a_png_has_no_place_in_the_body(tmp_path: Path) -> None:
    imsave(tmp_path / "a.png", np.zeros((4, 4), np.uint8), check_contrast=False)
    _, read = NaturalImage2DIO().read_images([str(tmp_path / "a.png")])
    folder = tmp_path / "Dataset007_Photographs"
    folder.mkdir()
    member(folder, DATA, {"a": 1, "b": 2}, read)
    settings, cases = PretrainingSettings(), {"train": ["a"], "val": ["b"]}
    with pytest.raises(BadInputError) as refused:
        DiffSegPretrainer.check_data(folder, DATA, 0, cases, settings)
    for words in ("Photographs/a has no 3D direction cosines", "`--coordinates none`", "`diffseg plan 7 --coordinates"):
        assert words in str(refused.value)
    without = replace(settings, coordinates=CoordinateSettings(mode="none"))
    DiffSegPretrainer.check_data(folder, DATA, 0, cases, without)
    with pytest.raises(BadInputError, match="pool to pretrain on is empty"):
        DiffSegPretrainer.check_data(folder, DATA, 0, cases, replace(without, pool="unlabeled"))


@pytest.mark.parametrize(
    ("mode", "iterations", "refused"), [("guidance", 1, True), ("guidance", 2, False), ("auxiliary", 1, False)]
)
def test_guidance_needs_an_epoch_for_each_of_its_networks(
    tmp_path: Path, mode: CoordinateMode, iterations: int, refused: bool
) -> None:
    """With one, the regressor would be trained, and the denoiser's random weights handed on as pretrained."""
    folder = tmp_path / "Dataset007_Photographs"
    folder.mkdir()
    member(folder, DATA, {"a": 1, "b": 2}, PLACED)
    settings = PretrainingSettings(iterations=iterations, coordinates=CoordinateSettings(mode=mode))
    expected = pytest.raises(BadInputError, match="too few for both") if refused else nullcontext()
    with expected:
        DiffSegPretrainer.check_data(folder, DATA, 0, {"train": ["a"], "val": ["b"]}, settings)
