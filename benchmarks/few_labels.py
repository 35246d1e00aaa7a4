"""Few labels: fine-tuning and probes against the from-scratch twin, on abdominal CTs, by `diffseg benchmark`.

Usage: python benchmarks/few_labels.py WORKSPACE DATA [--budgets 2cases 14cases] [--seeds 0 1 2]
           [--strategies finetune] [--iterations 1200] [--pretrain-iterations 2000] [--no-report]

The pretraining is one of abdomen.py's: on 14 BTCV and 180 OpenKBP scans, without labels. A data set of all 24 labelled
BTCV scans is planned to start from it; 0025-0034 are tested on, and budgets are drawn from the other 14. What is done
is not done twice, and several processes may share the work, each with other seeds or strategies and `--no-report`; the
last call, with all of them, reports: fine-tuning alone in one section, other strategies in another.
"""

from __future__ import annotations

import argparse
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from abdomen import (
    CONFIGURATION,
    HELD_OUT,
    add_arguments,
    describe,
    prepare,
    pretrain,
    run_environment,
    set_patch,
)
from results import RESULTS, diffseg, write_section

from diffseg_nnunet.atomic import write_file

ID, NAME = 23, "Dataset023_BTCV"
PATCH, PRETRAINING_BATCH = (40, 40, 40), 8
"""Written into the plan: with the planner's own a run takes four times as long, and a table as many hours."""
MODE = "auxiliary"


@dataclass(frozen=True)
class Comparison:
    """One declared comparison: a call of `diffseg benchmark`.

    Attributes:
        mode: of the coordinates in the pretraining.
    """

    workspace: Path
    budgets: tuple[str, ...]
    seeds: tuple[int, ...]
    strategies: tuple[str, ...]
    iterations: int
    pretrain_iterations: int
    mode: str = MODE
    pretrain_seed: int = 0

    @property
    def output(self) -> Path:
        """Folder of the benchmark's report."""
        return self.workspace / "few_labels" / self.mode

    def run(self) -> None:
        """Whatever is not done yet."""
        checkpoint = pretrain(self.workspace, self.mode, self.pretrain_seed, self.pretrain_iterations).checkpoint
        prepare_all(self.workspace, checkpoint)
        lists = {"--budgets": self.budgets, "--seeds": self.seeds, "--strategies": self.strategies}
        chosen = [part for option, values in lists.items() for part in (option, *values)]
        diffseg(
            *("benchmark", "few-label", ID, "--pretrained", checkpoint, *chosen, "-o", self.output),
            *("--test-cases", *(f"btcv{number}" for number in HELD_OUT)),
            *("--iterations", self.iterations, "--optimizer", "adamw"),
            environment=run_environment(self.workspace),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    add_benchmark_arguments(
        parser, budgets=["2cases", "14cases"], seeds=[0, 1, 2], iterations=1200, pretrain_iterations=2000
    )
    options = parser.parse_args()
    prepare(options.workspace, options.data)
    comparison = Comparison(
        options.workspace,
        tuple(options.budgets),
        tuple(options.seeds),
        tuple(options.strategies),
        options.iterations,
        options.pretrain_iterations,
    )
    comparison.run()
    if not options.no_report:
        alone = comparison.strategies == ("finetune",)
        section, title = ("few-labels", "Few labels") if alone else ("strategies", "Few labels: all strategies")
        write_section(section, _report(comparison, section, title))


def add_benchmark_arguments(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """What is compared, and how long it is trained.

    Args:
        defaults: of budgets, seeds, iterations and pretrain_iterations.
    """
    parser.add_argument("--budgets", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--strategies", nargs="+", default=["finetune"])
    parser.add_argument("--iterations", type=int, help="of every training")
    parser.add_argument("--pretrain-iterations", type=int)
    parser.add_argument("--no-report", action="store_true")
    parser.set_defaults(**defaults)


def prepare_all(workspace: Path, checkpoint: Path) -> None:
    """The data set of all labelled scans, planned to start from a checkpoint; nothing where that is done.

    Its normalisation is the checkpoint's, so that nothing of the test scans is in what is trained.
    """
    done, environment = workspace / "few_labels" / "prepared", run_environment(workspace)
    if done.is_file():
        return
    sources = workspace / "sources"
    for part in ("training_BTCV", "held_out_BTCV"):
        for scan in sorted((sources / part).glob("*/*.nii.gz")):
            target = sources / "all_BTCV" / scan.parent.name / scan.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.is_file():
                shutil.copy2(scan, target)
    if not (workspace / "nnUNet_raw" / NAME).is_dir():
        diffseg(
            *("convert", "folder", "--modality", "CT", "--id", ID, "--name", NAME.split("_", 1)[1]),
            *("--images", sources / "all_BTCV" / "images", "--labels", sources / "all_BTCV" / "labels"),
            *("--label-names", sources / "labels.json"),
            environment=environment,
        )
    diffseg("verify", ID, environment=environment)
    diffseg("plan", ID, "--from-checkpoint", checkpoint, "--gpu-memory", 1, environment=environment)
    set_patch(workspace, NAME, PATCH, PRETRAINING_BATCH)
    diffseg("preprocess", ID, "-c", CONFIGURATION, environment=environment)
    done.parent.mkdir(exist_ok=True)
    done.touch()


def benchmark_report(output: Path, name: str) -> str:
    """The report of a finished benchmark as part of a section of ours, its pictures copied as `name`_*.png.

    Args:
        output: the benchmark's folder.
    """
    pictures = RESULTS.parent / "pictures"
    pictures.mkdir(exist_ok=True)
    for picture in ("curve", "learning_curves"):
        source = output / f"{picture}.png"
        write_file(
            pictures / f"{name}_{picture}.png", lambda temporary, found=source: shutil.copyfile(found, temporary)
        )
    body = re.sub(r"^# .*\n", "", (output / "table.md").read_text(encoding="utf-8"))
    return (
        f"{re.sub(r'^## ', '### ', body, flags=re.MULTILINE).strip()}\n\n"
        f"![DSC over labels](pictures/{name}_curve.png)\n"
        f"![Learning curves](pictures/{name}_learning_curves.png)"
    )


def _report(comparison: Comparison, section: str, title: str) -> str:
    return (
        f"## {title}\n\nScript: `benchmarks/few_labels.py`. The pretraining: "
        f"{comparison.pretrain_iterations} iterations, coordinates `{comparison.mode}`, by `benchmarks/abdomen.py`. "
        f"{describe(comparison.workspace)} The labelled data set is planned from its checkpoint; training patches of "
        f"{'×'.join(map(str, PATCH))}, two a batch. What follows is the report of `diffseg "
        f"benchmark few-label`.\n\n{benchmark_report(comparison.output, section.replace('-', '_'))}"
    )


if __name__ == "__main__":
    main()
