"""What fine-tuning should start from: settings of pretraining and fine-tuning compared on training cases alone.

Usage: python benchmarks/remedies.py WORKSPACE DATA [--seeds 0] [--iterations 1200] [--variants NAME ...]

On few_labels.py's data set: two labelled BTCV cases are learned from, the other twelve training cases scored; the
held-out ones are not looked at. Every variant has the same cases, batches and length. What is done is not done twice.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from abdomen import (
    CONFIGURATION,
    FEW_FOLDS,
    RATE,
    TRAINING,
    add_arguments,
    describe,
    prepare,
    pretrain,
    run_environment,
    run_folder,
    splits,
)
from few_labels import ID, MODE, NAME, PATCH, prepare_all
from results import diffseg, interval, table, write_section

from diffseg_nnunet.benchmarking.divisions import Division, ensure_fold
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.workspace import Workspace

TWIN, LENGTH = "from scratch", 2000
SeedScores = dict[int, dict[str, float]]
"""Seed -> case -> mean DSC over the organs."""


@dataclass(frozen=True)
class Variant:
    """A way to start.

    Attributes:
        words: for the table.
        mode: of the coordinates in pretraining; None: no pretraining.
        iterations: of the pretraining.
        pretraining: further options of it.
        training: further options of the training.
        trainer: the class that trains it.
    """

    words: str
    mode: str | None = MODE
    iterations: int = LENGTH
    pretraining: tuple[object, ...] = ()
    training: tuple[object, ...] = ()
    trainer: str = "DiffSegTrainer"

    @property
    def in_full(self) -> str:
        if self.mode is None:
            return self.words
        return f"{self.words}; {self.iterations} iterations of pretraining, coordinates `{self.mode}`"


VARIANTS = {
    "twin": Variant(TWIN, mode=None, training=("--strategy", "scratch"), trainer="DiffSegTrainerScratch"),
    "all": Variant("encoder and decoder", training=("--transfer", "all")),
    "none400": Variant(
        "encoder and decoder, folded at time step 400",
        mode="none",
        training=("--transfer", "all", "--fold-timestep", 400),
    ),
    "sample": Variant(
        "encoder and decoder, the image as target, a quarter of the rate",
        iterations=600,
        pretraining=("--target", "sample", "--initial-lr", RATE / 4),
        training=("--transfer", "all"),
    ),
    "encoder": Variant("the encoder"),
    "encoder_none": Variant("the encoder", mode="none"),
    "encoder_rate": Variant("the encoder, half the rate of fine-tuning", training=("--initial-lr", 1e-3)),
    "encoder_400": Variant("the encoder, folded at time step 400", training=("--fold-timestep", 400)),
    "encoder_kept": Variant("the encoder, coordinates kept on", training=("--keep-coordinates", 0.1)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help=f"of 0 to {FEW_FOLDS - 1}")
    parser.add_argument("--iterations", type=int, default=1200, help="of every fine-tuning")
    parser.add_argument("--no-report", action="store_true")
    options = parser.parse_args()
    prepare(options.workspace, options.data)
    folds = prepare_folds(options.workspace, options.seeds)
    chosen = {name: VARIANTS[name] for name in options.variants}
    scores = {
        name: {
            seed: scores_of(options.workspace, f"remedy_{name}", variant, fold, seed, options.iterations)
            for seed, fold in folds.items()
        }
        for name, variant in chosen.items()
    }
    if not options.no_report:
        write_section("remedies", _report(options, scores))


def prepare_folds(workspace: Path, seeds: Sequence[int]) -> dict[int, int]:
    """Seed -> the fold of few_labels.py's data set that learns from two cases and is scored on twelve others."""
    prepare_all(workspace, pretrain(workspace, MODE, 0, LENGTH).checkpoint)
    os.environ.update(run_environment(workspace))
    project = Project.open(Workspace.locate(None).activate(), ID)
    cases, drawn = {f"btcv{number}" for number in TRAINING}, splits()
    folds = {}
    for seed in seeds:
        few = drawn[1 + seed]["train"]
        folds[seed] = ensure_fold(project, CONFIGURATION, Division(tuple(few), tuple(sorted(cases.difference(few)))))
    return folds


def scores_of(workspace: Path, name: str, variant: Variant, fold: int, seed: int, iterations: int) -> dict[str, float]:
    """Validation case -> mean DSC over the organs, of one training."""
    run = f"{name}_seed{seed}_{iterations}"
    folder = run_folder(workspace, run) / NAME / f"{variant.trainer}__DiffSegPlans__{CONFIGURATION}" / f"fold_{fold}"
    report = folder / "validation_report" / "scores.json"
    if not report.is_file():
        start: tuple[object, ...] = ()
        if variant.mode is not None:
            made = pretrain(workspace, variant.mode, 0, variant.iterations, variant.pretraining)
            start = ("--pretrained", made.checkpoint)
        diffseg(
            *("train", ID, "-c", CONFIGURATION, "-f", fold, "--iterations", iterations, "--seed", seed),
            *("--optimizer", "adamw", *start, *variant.training),
            environment=run_environment(workspace, run, NAME),
        )
    return {case["case"]: case["dsc"] for case in json.loads(report.read_text())["case_means"]}


def compared(scores: dict[str, SeedScores], baseline: str, words: dict[str, str]) -> list[list[str]]:
    """Rows of a table: what, its mean DSC, and how far above the baseline it is; intervals over seeds and cases."""
    rows = []
    for name, by_seed in scores.items():
        pairs = [(seed, case) for seed, of_cases in by_seed.items() for case in of_cases]
        cells = [words[name], interval([by_seed[seed][case] for seed, case in pairs], 3), ""]
        if name != baseline and baseline in scores:
            cells[-1] = interval([by_seed[seed][case] - scores[baseline][seed][case] for seed, case in pairs], 3)
        rows.append(cells)
    return rows


def circumstances(workspace: Path, seeds: Sequence[int], iterations: int) -> str:
    """What all trainings here have in common, for a report."""
    drawn = splits()
    cases = "; ".join(f"seed {seed}: {' and '.join(drawn[1 + seed]['train'])}" for seed in seeds)
    return (
        f"Compared on training cases alone: two labelled BTCV cases ({cases}), scored on the twelve others that may be "
        f"trained on. {describe(workspace)} Training patches of {'×'.join(map(str, PATCH))}, two a batch, {iterations} "
        "iterations of AdamW, the same batches for all. Pretraining saw the images of all 14, without labels. Mean DSC "
        "over 13 organs, [95 % interval] over seeds and cases."
    )


def _report(options: argparse.Namespace, scores: dict[str, SeedScores]) -> str:
    rows = compared(scores, "twin", {name: variant.in_full for name, variant in VARIANTS.items()})
    return (
        "## What fine-tuning should start from\n\nScript: `benchmarks/remedies.py`. "
        f"{circumstances(options.workspace, options.seeds, options.iterations)}\n\n"
        + table(("started from", "DSC", f"minus {TWIN}"), rows)
    )


if __name__ == "__main__":
    main()
