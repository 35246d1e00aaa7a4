"""What is declared: budgets in order, the twin always, nothing unknown."""

from __future__ import annotations

import json

import pytest

from diffseg_nnunet.benchmarking.protocol import PROTOCOLS, TWIN, find_benchmark
from diffseg_nnunet.cli.arguments import STRATEGIES
from diffseg_nnunet.cli.benchmark import BENCHMARKS
from diffseg_nnunet.errors import BadInputError


@pytest.mark.parametrize("name", PROTOCOLS)
def test_declared_protocols_can_be_run_and_stored(name: str) -> None:
    protocol = find_benchmark(name)
    assert protocol.name == name
    assert set(protocol.all_strategies) <= set(STRATEGIES)
    assert len(protocol.seeds) >= 3
    assert json.loads(json.dumps(protocol.to_json()))["twin"] == TWIN


def test_the_command_names_them_all() -> None:
    assert tuple(PROTOCOLS) == BENCHMARKS


def test_the_twin_comes_first_and_once() -> None:
    changed = PROTOCOLS["btcv"].changed(strategies=("linear", TWIN, "finetune", "linear"))
    assert changed.all_strategies == (TWIN, "linear", "finetune")
    assert PROTOCOLS["btcv"].changed(strategies=(TWIN,)).all_strategies == (TWIN,)


def test_budgets_are_canonical_and_in_order() -> None:
    changed = PROTOCOLS["btcv"].changed(budgets=("4slices", "24 cases", "2cases", "2case", "1%voxels"))
    assert changed.budgets == ("2cases", "24cases", "4slices", "1%voxels")


def test_folds_and_seeds_count_once() -> None:
    changed = PROTOCOLS["btcv"].changed(folds=(1, 0, 1), seeds=(2, 2, 0))
    assert (changed.folds, changed.seeds) == ((1, 0), (2, 0))


def test_plan_options_add_up() -> None:
    once = PROTOCOLS["few-label"].changed(plan={"base_features": 16})
    assert dict(once.changed(plan={"backbone": "plain"}).plan) == {"base_features": 16, "backbone": "plain"}


def test_results_on_own_test_cases_bear_no_published_name() -> None:
    assert PROTOCOLS["btcv"].split_name == "24/6"
    assert PROTOCOLS["btcv"].changed(test_cases=("btcv_0001",)).split_name == "own"
    assert PROTOCOLS["few-label"].split_name == "own"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budgets": ("two",)}, "'two' is no label budget"),
        ({"budgets": ()}, "has no budget"),
        ({"seeds": ()}, "has no seed"),
        ({"seeds": (0, -1)}, "-1 is no seed"),
        ({"evaluation": "btcv13"}, "no protocol 'btcv13'"),
    ],
)
def test_what_cannot_be_run_is_refused(options: dict, words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        PROTOCOLS["btcv"].changed(**options)


def test_an_unknown_benchmark_is_told_the_known() -> None:
    with pytest.raises(BadInputError, match="btcv, synapse8, flare22, few-label"):
        find_benchmark("amos")
