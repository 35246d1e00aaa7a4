"""What the coordinates are worth: pretraining without, with a head, with guidance, and none at all, few labels each.

Usage: python benchmarks/ablation.py WORKSPACE DATA [--seeds 0 1 2] [--iterations 1200] [--pretrain-iterations 2000]
           [--no-report]

One pretraining a mode, of equal length, on all training scans of abdomen.py; then the same fine-tuning on two labelled
cases, once a seed, with other cases and another stream of batches for each seed, scored on the ten held-out BTCV cases.
The rows of the head and of the twin from scratch are those of few_labels.py, which must have run. Every run is resumed,
or skipped when done; several processes may share the work, each with other modes or seeds and `--no-report`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from abdomen import (
    CONFIGURATION,
    HELD_OUT,
    add_arguments,
    describe,
    prepare,
    pretrain,
    run_environment,
    run_folder,
)
from few_labels import ID, MODE, NAME, PATCH, Comparison, prepare_all
from numpy.typing import NDArray
from results import diffseg, interval, table, write_section
from scipy.stats import wilcoxon

from diffseg_nnunet.budgets.folds import BudgetFold, read_budget_folds

MODES = ("none", "auxiliary", "guidance")
SCRATCH = "from scratch"
BUDGET = "2cases"

Scores = dict[int, dict[str, float]]
"""Seed -> held-out case -> mean DSC over the organs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=1200, help="of fine-tuning")
    parser.add_argument("--pretrain-iterations", type=int, default=2000)
    parser.add_argument("--no-report", action="store_true")
    options = parser.parse_args()
    prepare(options.workspace, options.data)
    modes = list(dict.fromkeys((MODE, *options.modes)))  # the data set is planned to start from that one
    pretrainings = {mode: pretrain(options.workspace, mode, 0, options.pretrain_iterations) for mode in modes}
    prepare_all(options.workspace, pretrainings[MODE].checkpoint)
    for seed in options.seeds:  # so that an interrupted run has complete comparisons
        for mode in options.modes:
            if mode != MODE:
                _finetune(options, mode, pretrainings[mode].checkpoint, seed)
    if options.no_report:
        return
    scores = {mode: {seed: _scores(options, mode, seed) for seed in options.seeds} for mode in options.modes}
    scores[SCRATCH] = {seed: _scores(options, SCRATCH, seed) for seed in options.seeds}
    cost = {mode: pretraining.seconds for mode, pretraining in pretrainings.items()}
    write_section("ablation", _report(options, scores, cost))


def _run(options: argparse.Namespace, mode: str) -> str:
    return f"ablation_{mode}_{options.iterations}"


def _finetune(options: argparse.Namespace, mode: str, checkpoint: Path, seed: int) -> None:
    """On the labels that few_labels.py draws for that seed, from a fold that is tested on the held-out cases."""
    splits = json.loads((options.workspace / "nnUNet_preprocessed" / NAME / "splits_final.json").read_text())
    tested = [f"btcv{number}" for number in HELD_OUT]
    fold = next(number for number, fold in enumerate(splits) if sorted(fold["val"]) == tested)
    diffseg(
        *("train", ID, "-c", CONFIGURATION, "-f", fold, "--labels", BUDGET, "--label-seed", seed, "--seed", seed),
        *("--pretrained", checkpoint, "--iterations", options.iterations, "--optimizer", "adamw"),
        environment=run_environment(options.workspace, _run(options, mode), NAME),
    )


def _drawn(workspace: Path) -> dict[int, BudgetFold]:
    """Seed -> the two cases drawn for it, and the fold they are."""
    folder = workspace / "nnUNet_preprocessed" / NAME
    folds = read_budget_folds(folder, json.loads((folder / "splits_final.json").read_text()))
    return {fold.seed: fold for fold in folds.values() if fold.labels == BUDGET}


def _scores(options: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    """Held-out case -> mean DSC over the organs."""
    if name in (MODE, SCRATCH):
        strategy = "scratch" if name == SCRATCH else "finetune"
        comparison = Comparison(
            options.workspace, (BUDGET,), (seed,), (strategy,), options.iterations, options.pretrain_iterations
        )
        report = comparison.output / "runs" / f"seed{seed}_fold0_{BUDGET}_{strategy}"
    else:
        folder = run_folder(options.workspace, _run(options, name)) / NAME
        folder /= f"DiffSegTrainer__DiffSegPlans__{CONFIGURATION}"
        report = folder / f"fold_{_drawn(options.workspace)[seed].fold}" / "validation_report"
    scores = json.loads((report / "scores.json").read_text())
    return {case["case"]: case["dsc"] for case in scores["case_means"]}


def seed_means(scores: Scores) -> NDArray[np.float64]:
    """Mean over cases, one a seed."""
    return np.array([np.mean(list(of_cases.values())) for of_cases in scores.values()])


def paired(first: Scores, second: Scores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Differences first − second over the seeds and cases of both: means over cases (seeds,), over seeds (cases,)."""
    seeds = [seed for seed in first if seed in second]
    cases = sorted(first[seeds[0]])
    differences = np.array([[first[seed][case] - second[seed][case] for case in cases] for seed in seeds])
    return differences.mean(axis=1), differences.mean(axis=0)


def mean_and_spread(values: NDArray[np.float64]) -> str:
    """Mean ± standard deviation (of a sample)."""
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _report(options: argparse.Namespace, scores: Mapping[str, Scores], cost: Mapping[str, float]) -> str:
    rows = []
    for name, own in scores.items():
        cells = [name, f"{cost[name]:.0f}" if name in cost else "0", f"**{mean_and_spread(seed_means(own))}**"]
        for other in ("none", SCRATCH):
            if name == other or other not in scores or (name, other) == (SCRATCH, "none"):
                cells.append("")
                continue
            over_seeds, over_cases = paired(own, scores[other])
            p = wilcoxon(over_cases).pvalue
            cells.append(f"{mean_and_spread(over_seeds)}; {interval(over_cases, 3)}, p = {p:.3f}")
        rows.append(cells)
    drawn = _drawn(options.workspace)
    cases = "; ".join(f"seed {seed}: {', '.join(drawn[seed].train)}" for seed in options.seeds)
    header = ("coordinates in pretraining", "its seconds", "DSC", "minus none", "minus from scratch")
    return (
        "## What the coordinates are worth, with two labelled cases\n\nScript: `benchmarks/ablation.py`. "
        f"{describe(options.workspace)} One pretraining a mode, {options.pretrain_iterations} iterations, seed 0, on "
        "all 194 training scans: equal iterations, so the seconds differ (guidance spends a quarter of its iterations "
        f"on the regressor alone). Then {options.iterations} iterations (AdamW, patches of "
        f"{'×'.join(map(str, PATCH))}) from the encoder on two labelled BTCV cases, one network a seed, other cases "
        f"for each ({cases}), the same for all rows of a seed. Mean DSC over 13 organs on the ten held-out BTCV cases."
        f"\n\nDSC: mean ± standard deviation over the {len(options.seeds)} seed(s). Differences are paired by seed "
        "and case: mean ± standard deviation over seeds; mean [95 % interval] over cases, averaged over the seeds "
        "first, and p of a two-sided Wilcoxon signed-rank test over them, not corrected.\n\n" + table(header, rows)
    )


if __name__ == "__main__":
    main()
