"""Differences are paired by seed and case."""

from __future__ import annotations

import argparse

import ablation
import numpy as np

from diffseg_nnunet.budgets.folds import BudgetFold


def test_paired_differences():
    first = {0: {"a": 0.5, "b": 0.7}, 1: {"a": 0.6, "b": 0.8}}
    second = {0: {"a": 0.4, "b": 0.7}, 1: {"a": 0.3, "b": 0.8}}
    over_seeds, over_cases = ablation.paired(first, second)
    np.testing.assert_allclose(over_seeds, [0.05, 0.15])
    np.testing.assert_allclose(over_cases, [0.2, 0.0])
    np.testing.assert_allclose(ablation.seed_means(first), [0.6, 0.7])


def test_report_has_a_row_for_each_start_and_no_difference_to_itself(monkeypatch):
    monkeypatch.setattr(ablation, "describe", lambda workspace: "A plan.")
    fold = BudgetFold(6, 5, "2cases", 0, ("x", "y"), (), ("a", "b"), None, 0, ())
    monkeypatch.setattr(ablation, "_drawn", lambda workspace: {0: fold, 1: fold})
    options = argparse.Namespace(workspace=None, seeds=[0, 1], iterations=5, pretrain_iterations=7)
    names = ("none", "auxiliary", ablation.SCRATCH)
    scores = {name: {seed: {"a": 0.1 * i, "b": 0.2 * i} for seed in (0, 1)} for i, name in enumerate(names)}
    report = ablation._report(options, scores, {"none": 10.0, "auxiliary": 12.0})
    rows = {line.split(" | ")[0].strip("| "): line for line in report.splitlines() if line.startswith("| ")}
    cells = [cell.strip() for cell in rows["auxiliary"].strip("|").split("|")]
    assert cells[1:3] == ["12", "**0.150 ± 0.000**"]
    assert cells[3].startswith("0.150 ± 0.000; 0.150 [")
    assert rows["none"].count("[") == 1
    assert "[" not in rows[ablation.SCRATCH]
