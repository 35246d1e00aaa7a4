"""Published splits are found in a data set's cases, whole or not at all; a user's own test cases divide the rest."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from diffseg_nnunet.benchmarking.divisions import divisions, held_out
from diffseg_nnunet.benchmarking.protocol import PROTOCOLS
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline.project import Project

BTCV = [f"btcv_{number:04d}" for number in (*range(1, 11), *range(21, 41))]


def test_btcv(named_dataset: Callable[..., Project]) -> None:
    (found,) = divisions(named_dataset(BTCV), PROTOCOLS["btcv"])
    assert found.test == tuple(f"btcv_{number:04d}" for number in range(35, 41))
    assert len(found.train) == 24
    assert not set(found.train) & set(found.test)


def test_synapse(named_dataset: Callable[..., Project]) -> None:
    (found,) = divisions(named_dataset(BTCV), PROTOCOLS["synapse8"])
    assert (len(found.train), len(found.test)) == (18, 12)
    assert {"btcv_0001", "btcv_0038"} <= set(found.test)


def test_five_folds_test_every_case_once(named_dataset: Callable[..., Project]) -> None:
    project, protocol = named_dataset(BTCV), PROTOCOLS["btcv"].changed(split="nnunet-5-fold")
    found = divisions(project, protocol)
    assert sorted(case for division in found for case in division.test) == BTCV
    (second,) = divisions(project, protocol.changed(folds=(1,)))
    assert second == found[1]
    with pytest.raises(BadInputError, match="folds 0 to 4, not 5"):
        divisions(project, protocol.changed(folds=(5,)))


def test_flare22_tests_on_the_tuning_cases(named_dataset: Callable[..., Project]) -> None:
    labelled = [f"FLARE22_Tr_{number:04d}" for number in range(1, 51)]
    tuning = [f"tuning_FLARETs_{number:04d}" for number in range(1, 51)]
    made = ["pseudo_blackbean_Case_00001"]
    entry = {"pseudo_labelled": {"source": "pseudo", "cases": made}}
    (found,) = divisions(named_dataset([*labelled, *tuning], **entry), PROTOCOLS["flare22"])
    assert (list(found.train), list(found.test)) == (labelled, tuning)


def test_a_published_split_is_taken_whole_or_not_at_all(named_dataset: Callable[..., Project]) -> None:
    with pytest.raises(BadInputError, match="taken whole or not at all") as refused:
        divisions(named_dataset(BTCV[:-1]), PROTOCOLS["btcv"])
    assert "--test-cases" in str(refused.value.mend)


def test_any_data_set_has_no_published_split(named_dataset: Callable[..., Project]) -> None:
    with pytest.raises(BadInputError, match="knows no published split"):
        divisions(named_dataset(BTCV), PROTOCOLS["few-label"].changed(split="24/6"))


def test_own_test_cases(named_dataset: Callable[..., Project]) -> None:
    protocol = PROTOCOLS["btcv"].changed(test_cases=("btcv_0025", "btcv_0002"))
    (found,) = divisions(named_dataset(BTCV[:-1]), protocol)
    assert found.test == ("btcv_0002", "btcv_0025")
    assert sorted((*found.train, *found.test)) == BTCV[:-1]


def test_own_test_cases_must_exist_and_leave_some() -> None:
    with pytest.raises(BadInputError, match="no labelled case x"):
        held_out("Dataset001_A", ["a", "b"], ["a", "x"])
    with pytest.raises(BadInputError, match="All 2 labelled cases"):
        held_out("Dataset001_A", ["a", "b"], ["b", "a"])
