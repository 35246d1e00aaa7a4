"""The pool: cases of several data sets side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.trainers.pool import PooledDataset, PoolMember, pools_of_fold


def member(folder: Path, source: str, values: dict[str, int]) -> PoolMember:
    """A preprocessed folder of cases that are constant."""
    (folder / source).mkdir()
    for case, value in values.items():
        shape = (1, 2 + value, 3, 4)
        nnUNetDatasetBlosc2.save_case(
            np.full(shape, value, np.float32),
            np.zeros(shape, np.int16),
            {"value": value},
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
        assert properties == pool.properties(identifier) == {"value": value}
        assert pool.shape(identifier) == (2 + value, 3, 4)
    assert pool.record() == {"One": ["a", "b"], "Other": ["a"]}


def test_only_the_named_cases_are_in_the_pool(tmp_path: Path) -> None:
    whole = member(tmp_path, "One", {"a": 1, "b": 2})
    assert PooledDataset([PoolMember("One", whole.folder, ("b",))]).identifiers == ["One/b"]


def test_empty_pool_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"pool to pretrain on is empty.*diffseg preprocess"):
        PooledDataset([PoolMember("One", tmp_path, ())])


def test_the_same_case_twice_is_refused(tmp_path: Path) -> None:
    one = member(tmp_path, "One", {"a": 1, "b": 2})
    with pytest.raises(BadInputError, match=r"two cases of the same id: One/b\..*imagesUn"):
        PooledDataset([one, PoolMember("One", one.folder, ("b",))])


DATA = "plans_3d"


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
