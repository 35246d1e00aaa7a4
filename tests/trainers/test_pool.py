"""The pool: cases of several data sets side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.trainers.pool import PooledDataset, PoolMember


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
