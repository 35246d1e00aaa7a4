"""What the coordinates are worth: pretraining without, with a head, with guidance, and none at all, few labels each.

Usage: python benchmarks/ablation.py WORKSPACE DATA [--seeds 0 1 2] [--iterations 250] [--pretrain-iterations 600]

One pretraining a mode, of equal length, on all training scans of abdomen.py; then the same short fine-tuning on two
labelled cases, once a seed, with other cases and another stream of batches for each seed; the from-scratch twin has the
same plan, cases, batches and length. Scored on the ten held-out BTCV cases. Every run is resumed, or skipped when done.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from abdomen import (
    CONFIGURATION,
    FEW_FOLDS,
    LABELLED,
    add_arguments,
    describe,
    held_out,
    prepare,
    pretrain,
    run_environment,
    run_folder,
    splits,
    stage_seconds,
)
from numpy.typing import NDArray
from results import diffseg, interval, table, write_section

MODES = ("none", "auxiliary", "guidance")
SCRATCH = "from scratch"
OPTIMIZER = ("--optimizer", "adamw")

Scores = dict[int, dict[str, float]]
"""Seed -> held-out case -> mean DSC over the organs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help=f"of 0 to {FEW_FOLDS - 1}")
    parser.add_argument("--iterations", type=int, default=250, help="of fine-tuning")
    parser.add_argument("--pretrain-iterations", type=int, default=600)
    parser.add_argument("--pretrain-seed", type=int, default=0)
    options = parser.parse_args()
    if not set(options.seeds) <= set(range(FEW_FOLDS)):
        parser.error(f"there are folds for the seeds 0 to {FEW_FOLDS - 1}")
    prepare(options.workspace, options.data)
    length, seed = options.pretrain_iterations, options.pretrain_seed
    pretrainings = {mode: pretrain(options.workspace, mode, seed, length) for mode in options.modes}
    scores: dict[str, Scores] = {}
    seconds: dict[str, list[float]] = {}
    # seed by seed, so that an interrupted run has complete comparisons
    for training_seed in options.seeds:
        for name in (*options.modes, SCRATCH):
            checkpoint = pretrainings[name].checkpoint if name in pretrainings else None
            source = "scratch" if checkpoint is None else f"{name}{length}_{seed}"
            run = f"finetune_{source}_seed{training_seed}_{options.iterations}"
            of_cases, took = _finetuned(options, run, checkpoint, training_seed)
            scores.setdefault(name, {})[training_seed] = of_cases
            seconds.setdefault(name, []).append(took)
    cost = {name: pretraining.seconds for name, pretraining in pretrainings.items()}
    write_section("ablation", _report(options, scores, seconds, cost))


def _finetuned(
    options: argparse.Namespace, run: str, checkpoint: Path | None, seed: int
) -> tuple[dict[str, float], float]:
    """Train, predict and score one network; held-out case -> mean DSC over the organs, and the seconds of training."""
    workspace, fold = options.workspace, seed + 1
    folder = run_folder(workspace, run)
    report, sources = folder / "report", held_out(workspace, "BTCV")
    strategy = "scratch" if checkpoint is None else "finetune"
    if not (report / "scores.json").is_file():
        environment = run_environment(workspace, run)
        start = ("--strategy", strategy) if checkpoint is None else ("--pretrained", checkpoint)
        length = ("--iterations", options.iterations, "--seed", seed, *OPTIMIZER)
        diffseg("train", LABELLED, "-c", CONFIGURATION, "-f", fold, *start, *length, environment=environment)
        diffseg(
            *("predict", "-d", LABELLED, "-c", CONFIGURATION, "-f", fold, "--strategy", strategy, "--no-mirroring"),
            *("-i", sources[0].image.parent, "-o", folder / "predictions"),
            environment=environment,
        )
        diffseg(
            *("evaluate", "--prediction", folder / "predictions", "--reference", sources[0].label.parent),
            *("--labels", workspace / "sources" / "labels.json", "-o", report),
            environment=environment,
        )
    scores = json.loads((report / "scores.json").read_text())
    took = stage_seconds(workspace, run, f"train/{strategy}/{CONFIGURATION}/fold_{fold}")
    return {case["case"]: case["dsc"] for case in scores["case_means"]}, took


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


def _report(
    options: argparse.Namespace,
    scores: Mapping[str, Scores],
    seconds: Mapping[str, list[float]],
    cost: Mapping[str, float],
) -> str:
    rows = []
    for name, own in scores.items():
        cells = [name, f"{cost[name]:.0f}" if name in cost else "0", f"{np.mean(seconds[name]):.0f}"]
        cells.append(f"**{mean_and_spread(seed_means(own))}**")
        for other in ("none", SCRATCH):
            if name == other or other not in scores or (name, other) == (SCRATCH, "none"):
                cells.append("")
                continue
            over_seeds, over_cases = paired(own, scores[other])
            cells.append(f"{mean_and_spread(over_seeds)}; {interval(over_cases, 3)}")
        rows.append(cells)
    folds = splits()
    cases = "; ".join(f"seed {seed}: {', '.join(folds[seed + 1]['train'])}" for seed in options.seeds)
    header = ("pretraining", "its seconds", "fine-tuning's seconds", "DSC", "minus none", "minus from scratch")
    return (
        f"## What the coordinates are worth, with two labelled cases\n\nScript: `benchmarks/ablation.py`. "
        f"{describe(options.workspace)} One pretraining a mode, {options.pretrain_iterations} iterations, seed "
        f"{options.pretrain_seed}, on all 194 training scans: equal iterations, so the seconds differ (guidance spends "
        f"a quarter of its iterations on the regressor alone). Then {options.iterations} iterations (AdamW) on two "
        f"labelled BTCV cases, one network a seed, other cases for each ({cases}), the same for all rows of a seed. "
        f"Mean DSC over 13 organs on the ten held-out BTCV cases, no test-time mirroring.\n\n"
        f"DSC: mean ± standard deviation over the {len(options.seeds)} seed(s). Differences are paired by seed and "
        "case: mean ± standard deviation over seeds; mean [95 % CI] over cases.\n\n" + table(header, rows)
    )


if __name__ == "__main__":
    main()
