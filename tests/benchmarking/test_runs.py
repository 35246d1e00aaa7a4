"""The list of runs, what makes two of them different, and what is gone on with."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffseg_nnunet.benchmarking.divisions import Division
from diffseg_nnunet.benchmarking.protocol import PROTOCOLS, TWIN, BenchmarkProtocol
from diffseg_nnunet.benchmarking.runner import Benchmark
from diffseg_nnunet.benchmarking.runs import (
    Run,
    RunRecord,
    estimated_seconds,
    list_runs,
    run_signature,
    set_aside_other,
    state_of,
)
from diffseg_nnunet.pipeline.project import Project

BTCV = PROTOCOLS["btcv"]
DIVISION = Division(("a", "b"), ("c",))
PLAN: dict[str, Any] = {"base_features": 32}
SETTINGS: dict[str, Any] = {"iterations": 5, "transfer": "encoder"}


def signature(protocol: BenchmarkProtocol = BTCV, run: Run = Run("finetune", "2cases", 0), **changes: Any) -> str:
    given = {"settings": SETTINGS, "division": DIVISION, "plan": PLAN, "data": ("x",), **changes}
    return run_signature(protocol, run, **given)


@given(
    seeds=st.lists(st.integers(0, 50), min_size=1, max_size=4, unique=True),
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True),
    folds=st.integers(1, 5),
)
def test_comparisons_are_complete_one_after_the_other(seeds: list[int], counts: list[int], folds: int) -> None:
    protocol = BTCV.changed(seeds=tuple(seeds), budgets=tuple(f"{count}cases" for count in counts))
    runs = list_runs(protocol, folds)
    assert len({run.name for run in runs}) == len(runs)
    assert [seed for seed, _ in groupby(run.seed for run in runs)] == seeds
    size = len(protocol.all_strategies)
    for start in range(0, len(runs), size):
        together = runs[start : start + size]
        assert together[0].strategy == TWIN
        assert {run.strategy for run in together} == set(protocol.all_strategies)
        assert len({(run.seed, run.labels, run.fold) for run in together}) == 1


def test_runs_are_of_the_folds_that_are_asked_for() -> None:
    """Not of their places: two calls for a fold each have folders of their own."""
    once, again = (list_runs(BTCV.changed(folds=folds), len(folds)) for folds in ((1,), (3, 1)))
    assert {run.fold for run in once} == {1}
    assert {run.fold for run in again} == {3, 1}
    assert set(once) <= set(again)
    assert {run.fold for run in list_runs(BTCV.changed(test_cases=("a",), folds=(2,)), 1)} == {0}


def test_names_are_names_of_folders() -> None:
    assert Run("linear", "0.5%voxels", 3, 1).name == "seed3_fold1_0.5percentvoxels_linear"


@pytest.mark.parametrize(
    ("protocol", "changes"),
    [
        (BTCV.changed(pretrain_iterations=7), {}),
        (BTCV.changed(pretrain_seed=1), {}),
        (BTCV.changed(configuration="2d"), {}),
        (BTCV.changed(evaluation="synapse8"), {}),
        (BTCV, {"settings": SETTINGS | {"iterations": 7}}),
        (BTCV, {"settings": SETTINGS | {"transfer": "all"}}),
        (BTCV, {"run": Run("finetune", "2cases", 1)}),
        (BTCV, {"run": Run("finetune", "6cases", 0)}),
        (BTCV, {"division": Division(("a",), ("b", "c"))}),
        (BTCV, {"plan": {"base_features": 16}}),
        (BTCV, {"data": ("y",)}),
        (BTCV, {"pretrained": "abc"}),
    ],
)
def test_whatever_a_result_depends_on_makes_it_another(protocol: BenchmarkProtocol, changes: dict) -> None:
    assert signature(protocol, **changes) != signature()


def test_the_twin_does_not_depend_on_the_pretraining() -> None:
    twin, longer = Run(TWIN, "2cases", 0), BTCV.changed(pretrain_iterations=7, pretrain_seed=1)
    assert signature(longer, twin) == signature(BTCV, twin)
    assert signature(BTCV, twin, pretrained="abc") == signature(BTCV, twin)


def test_a_given_checkpoint_is_all_that_counts_of_the_pretraining() -> None:
    longer = BTCV.changed(pretrain_iterations=7, pretrain_seed=1)
    assert signature(longer, pretrained="abc") == signature(pretrained="abc")
    assert signature(pretrained="abc") != signature(pretrained="def")


def test_other_runs_do_not_matter() -> None:
    assert signature(BTCV.changed(seeds=(9, 0), budgets=("2cases",), strategies=("finetune",))) == signature()


def test_states(tmp_path: Path) -> None:
    run = Run("finetune", "10%", 0)
    folder = run.folder(tmp_path)
    assert state_of(run, tmp_path, "now") == "to do"
    RunRecord("failed", "now", reason="memory").write(folder)
    assert state_of(run, tmp_path, "now") == "failed"
    RunRecord("finished", "now", missing=("spleen",), seconds=3.0).write(folder)
    assert state_of(run, tmp_path, "now") == "to do", "its scores are missing"
    (folder / "scores.json").touch()
    assert state_of(run, tmp_path, "now") == "finished"
    assert state_of(run, tmp_path, "later") == "other settings"
    assert RunRecord.read(folder) == RunRecord("finished", "now", missing=("spleen",), seconds=3.0)
    record = RunRecord("finished", "now", "plan", pretrained="abc", saw={"A": ["a", "b"]}, labelled_cases=2)
    record.write(folder)
    assert RunRecord.read(folder) == record
    (folder / "run.json").write_text('{"status": "finished", "unknown": 1}')
    assert state_of(run, tmp_path, "now") == "to do"


def test_a_run_that_fails_does_not_write_over_scores(named_dataset: Callable[..., Project], tmp_path: Path) -> None:
    """Nothing is preprocessed, so no label can be drawn: it fails before it looks at what is there."""
    run, output = Run("finetune", "2cases", 0), tmp_path / "output"
    folder = run.folder(output)
    RunRecord("finished", "before", "plan", labelled_cases=2).write(folder)
    (folder / "scores.json").write_text("{}")
    benchmark = Benchmark(named_dataset(["a", "b", "c"]), BTCV, output, "cpu")
    benchmark._attempt(run, DIVISION, 0, "now")
    assert RunRecord.read(folder).status == "failed"
    (kept,) = folder.parent.glob("superseded_*")
    assert RunRecord.read(kept) == RunRecord("finished", "before", "plan", labelled_cases=2)
    assert (kept / "scores.json").is_file()


def test_scores_of_other_settings_are_kept(tmp_path: Path) -> None:
    run = Run("finetune", "10%", 0)
    folder = run.folder(tmp_path)
    assert set_aside_other(run, tmp_path, "now", "plan") is None
    for signature, inputs in (("before", "plan"), ("now", "another plan")):
        RunRecord("finished", signature, inputs).write(folder)
        (folder / "scores.json").write_text("{}")
        kept = set_aside_other(run, tmp_path, "now", "plan")
        assert not folder.exists()
        assert (kept / "scores.json").is_file()
    for record in (RunRecord("finished", "now", "plan"), RunRecord("failed", "before")):
        record.write(folder)
        assert set_aside_other(run, tmp_path, "now", "plan") is None
        assert folder.exists()


def test_time_is_estimated_by_what_was_measured() -> None:
    twin, tuned, probe = (Run(strategy, "2cases", 0) for strategy in (TWIN, "finetune", "linear"))
    measured = {
        twin: RunRecord("finished", "", seconds=100.0, iterations=1000),
        tuned: RunRecord("finished", "", seconds=300.0, iterations=1000),
        probe: RunRecord("finished", "", seconds=None, iterations=1000),  # was interrupted
    }
    to_do = [Run(TWIN, "2cases", 1), Run("finetune", "2cases", 1), Run("linear", "2cases", 1)]
    assert estimated_seconds(to_do, measured, 2000) == (pytest.approx(200 + 600 + 400), 2)
    assert estimated_seconds(to_do, {}, 2000) is None
