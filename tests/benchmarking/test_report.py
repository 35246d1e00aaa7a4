"""What is written: tables, pictures, the course of trainings."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from diffseg_nnunet.benchmarking.curves import LearningCurve
from diffseg_nnunet.benchmarking.pictures import draw_budget_curve, draw_learning_curves
from diffseg_nnunet.benchmarking.published import PUBLISHED
from diffseg_nnunet.benchmarking.report import different_starts, readings, seen_by_fold
from diffseg_nnunet.benchmarking.results import Group, Outcome, group
from diffseg_nnunet.benchmarking.runs import Run, RunRecord
from diffseg_nnunet.benchmarking.tables import (
    CSV_COLUMNS,
    MAIN_HEADER,
    csv_rows,
    curve_section,
    main_rows,
    main_table,
    published_section,
    structure_tables,
)
from tests.benchmarking.conftest import evaluation

PNG = b"\x89PNG"
CASES = {"2cases": 2, "14cases": 14, "4slices": 4}


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    outcomes = []
    for seed in (0, 1):
        for labels, count in CASES.items():
            for strategy, gain in (("scratch", 0.0), ("finetune", 0.1)):
                scores = {f"c{i}": {"liver": 0.499 + gain + 0.01 * i + 0.02 * seed, "a|b": 0.2} for i in range(4)}
                record = RunRecord("finished", "", labelled_cases=count)
                outcomes.append(Outcome(Run(strategy, labels, seed), record, evaluation(scores)))
    return group(outcomes, 1)


def test_the_main_table(groups: list[Group]) -> None:
    rows = [dict(zip(MAIN_HEADER, row, strict=True)) for row in main_rows(groups)]
    assert [(row["labels"], row["strategy"]) for row in rows[:3]] == [
        ("2cases", "scratch (twin)"),
        ("2cases", "finetune"),
        ("14cases", "scratch (twin)"),
    ]
    assert rows[1]["labelled cases"] == "2"
    assert rows[1]["seeds"] == "0, 1"
    assert rows[1]["DSC"].startswith("0.412 [")
    assert rows[1]["over seeds"] == "± 0.007 (0.407 to 0.417)"
    assert rows[1]["DSC minus twin"] == "+0.050 [+0.050, +0.050]"
    assert rows[1]["wins/ties/losses"] == "4/0/0"
    assert rows[0]["DSC minus twin"] == "–"
    lines = main_table(groups).splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1


def test_a_table_a_budget_of_structures(groups: list[Group]) -> None:
    tables = dict(structure_tables(groups))
    assert list(tables) == list(CASES)
    header, _, liver, odd, overall = tables["2cases"].splitlines()
    assert header == "| structure | scratch | finetune | minus twin |"
    assert liver.startswith("| liver | 0.524 [")
    assert "+0.100" in liver
    assert odd.startswith(r"| a\|b | 0.200"), "a bar in a name is no column"
    assert overall.startswith("| mean over structures")


def test_rows_for_machines(groups: list[Group], tmp_path: Path) -> None:
    table = pd.DataFrame(list(csv_rows(groups)), columns=list(CSV_COLUMNS))
    assert len(table) == len(CASES) * 2 * 3 * 3  # strategies, structures with their mean, scores
    row = table.query("strategy == 'finetune' and labels == '14cases' and metric == 'dsc' and structure == 'liver'")
    assert row["mean"].item() == pytest.approx(0.624)
    assert row["difference"].item() == pytest.approx(0.1)
    assert row["labelled_cases"].item() == 14
    twins = table[table.strategy == "scratch"]
    assert twins.p.isna().all()


def test_what_is_published_is_quoted_or_said_to_be_left_out() -> None:
    beside = "\n".join(published_section(PUBLISHED[:1], []))
    assert "63.07" in beside
    assert PUBLISHED[0].source in beside
    apart = "\n".join(published_section([], [(PUBLISHED[0], "another split")]))
    assert "No published figure" in apart
    assert "another split" in apart
    assert "63.07" not in apart


def test_pictures(groups: list[Group], tmp_path: Path) -> None:
    draw_budget_curve(tmp_path / "curve.png", groups, "a benchmark", PUBLISHED[:2])
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)
    curves = {Run("finetune", labels, 0): curve(5) for labels in CASES}
    draw_learning_curves(tmp_path / "learning.png", curves)
    assert (tmp_path / "learning.png").read_bytes().startswith(PNG)


def test_nothing_finished_is_no_picture(tmp_path: Path) -> None:
    draw_budget_curve(tmp_path / "curve.png", [], "nothing")
    draw_learning_curves(tmp_path / "learning.png", {})
    assert not list(tmp_path.iterdir())


def test_what_the_results_rest_on_is_read_from_their_records() -> None:
    """Whatever was pretrained since, and in which order they finished."""

    def found(**pools: dict[str, list[str]] | None) -> dict[Run, RunRecord]:
        runs = {Run(name, "2cases", 0): RunRecord("finished", "", saw=saw) for name, saw in pools.items()}
        return {Run("scratch", "2cases", 0): RunRecord("finished", "", saw={}), **runs}

    assert seen_by_fold(found()) == {}
    assert seen_by_fold(found(finetune={"A": ["b", "a"]}, decoder={"A": ["c"]})) == {0: {"A": ["a", "b", "c"]}}
    for pools in ({"finetune": None, "decoder": {"A": ["a"]}}, {"decoder": {"A": ["a"]}, "finetune": None}):
        assert seen_by_fold(found(**pools)) == {0: None}


def test_different_pretrainings_of_one_table_are_told() -> None:
    runs = [Run("scratch", "2cases", 0), *(Run("finetune", "2cases", seed) for seed in (0, 1))]
    started = [RunRecord("finished", "", pretrained=digest) for digest in (None, "a" * 64, "b" * 64)]
    assert list(different_starts(dict(zip(runs[:2], started[:2], strict=True)))) == []
    (line,) = different_starts(dict(zip(runs, started, strict=True)))
    assert "aaaaaaaaaaaa: seed0_fold0_2cases_finetune; bbbbbbbbbbbb: seed1_fold0_2cases_finetune" in line


def test_what_probes_read_is_told() -> None:
    clean, noised = "the clean image at 50", "the noised image at 50"
    reads = {"scratch": None, "linear": clean, "nonlinear": clean, "pixel-ensemble": noised}
    finished = {Run(name, "2cases", 0): RunRecord("finished", "", reads=words) for name, words in reads.items()}
    assert list(readings(finished)) == [
        f"- linear and nonlinear: what is read is {clean}",
        f"- pixel-ensemble: what is read is {noised}",
    ]


def curve(epochs: int) -> LearningCurve:
    values = [0.01 * epoch for epoch in range(epochs)]
    logging = dict.fromkeys(("train_losses", "val_losses", "mean_fg_dice"), values)
    logging["ema_fg_dice"] = [0.5 * value for value in values]  # lags
    return LearningCurve.of({"logging": {**logging, "val_losses": [*values, 1.0]}}, 50)


def test_the_course_of_a_training(tmp_path: Path) -> None:
    found = curve(10)
    assert found.iteration == tuple(50.0 * epoch for epoch in range(1, 11))
    assert found.last_gain == pytest.approx(0.02)
    assert curve(2).last_gain is None
    found.write(tmp_path)
    assert LearningCurve.read(tmp_path) == found
    assert LearningCurve.read(tmp_path / "nowhere") is None
    table, _ = curve_section({Run("scratch", "2cases", 0): found})
    assert "| 2cases | scratch | +0.020 to +0.020 |" in table
