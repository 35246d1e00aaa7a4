"""What a probe should read: the linear probe at other time steps, of noisy or clean images, on training cases alone.

Usage: python benchmarks/probe_readings.py WORKSPACE DATA [--seeds 0] [--iterations 600] [--readings NAME ...]

WORKSPACE is remedies.py's, and so are the cases: two labelled ones, and twelve others that are scored. What is done is
not done twice.
"""

from __future__ import annotations

import argparse

from abdomen import add_arguments, prepare
from few_labels import MODE
from remedies import LENGTH, Variant, circumstances, compared, prepare_folds, scores_of
from results import table, write_section

DEFAULT = "three_clean"
FOLDED = ("--probe-time-steps", "folded")
READINGS: dict[str, tuple[str, tuple[object, ...]]] = {
    DEFAULT: ("the clean image at time steps 50, 150, 250 (the default)", ()),
    "three": ("noised at time steps 50, 150, 250", ("--probe-noisy",)),
    "50": ("noised at time step 50", ("--probe-time-steps", 50, "--probe-noisy")),
    "100": ("noised at time step 100", ("--probe-time-steps", 100, "--probe-noisy")),
    "400": ("noised at time step 400", ("--probe-time-steps", 400, "--probe-noisy")),
    "folded": ("the clean image, folded at time step 100", FOLDED),
    "augmented": ("folded, of augmented patches", (*FOLDED, "--augment")),
    "slower": ("folded, at an initial rate of 2e-3 instead of 5e-2", (*FOLDED, "--initial-lr", 2e-3)),
    "slow": ("folded, at 1e-2", (*FOLDED, "--initial-lr", 1e-2)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--readings", nargs="+", choices=READINGS, default=list(READINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--iterations", type=int, default=600, help="of every probe")
    parser.add_argument("--no-report", action="store_true")
    options = parser.parse_args()
    prepare(options.workspace, options.data)
    folds = prepare_folds(options.workspace, options.seeds)
    scores = {}
    for name in options.readings:
        words, chosen = READINGS[name]
        variant = Variant(words, training=("--strategy", "linear", *chosen), trainer="DiffSegTrainerLinear")
        run = f"probe_{name}"
        scores[name] = {
            seed: scores_of(options.workspace, run, variant, fold, seed, options.iterations)
            for seed, fold in folds.items()
        }
    if options.no_report:
        return
    rows = compared(scores, DEFAULT, {name: words for name, (words, _) in READINGS.items()})
    write_section(
        "probe-readings",
        "## What a probe should read\n\nScript: `benchmarks/probe_readings.py`, `--strategy linear`. "
        f"{circumstances(options.workspace, options.seeds, options.iterations)} Pretrained for {LENGTH} iterations, "
        f"coordinates `{MODE}`. All but the augmented patches are windows of the scans as they are, predicted without "
        "mirroring.\n\n" + table(("what is read", "DSC", "minus the default"), rows),
    )


if __name__ == "__main__":
    main()
