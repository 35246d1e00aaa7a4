"""The networks of refinement.py: segmentors trained with few labels, their refiners, and what both predict."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import few_labels
import few_labels_hippocampus
from abdomen import CONFIGURATION, run_environment, run_folder
from calibration import Calibration, case_calibration
from filelock import FileLock
from refinement_tables import Scored
from results import diffseg

from diffseg_nnunet.atomic import write_json
from diffseg_nnunet.benchmarking.runner import NETWORKS
from diffseg_nnunet.benchmarking.runs import Run, RunRecord
from diffseg_nnunet.budgets.folds import read_budget_folds
from diffseg_nnunet.evaluation.report import read_report
from diffseg_nnunet.inference.predictor import load_predictor, predict_cases
from diffseg_nnunet.inference.refining import RefineOptions, load_refining_predictor
from diffseg_nnunet.pipeline.device import prepare_device
from diffseg_nnunet.pipeline.evaluating import evaluate
from diffseg_nnunet.pipeline.starting import FINAL
from diffseg_nnunet.raw_dataset import Case
from diffseg_nnunet.training.checkpoint import file_digest

_PUBLISHED = ("--dice-weight", 0, "--start-share", 0)
VARIANTS = {
    "frozen": ("--segmentor", "frozen"),
    "alternate": ("--segmentor", "alternate"),
    "binary": ("--segmentor", "frozen", "--binary"),
    "binary_alternate": ("--segmentor", "alternate", "--binary"),
    "published": ("--segmentor", "frozen", *_PUBLISHED),
    "published_alternate": ("--segmentor", "alternate", *_PUBLISHED),
    "published_binary": ("--segmentor", "frozen", "--binary", *_PUBLISHED),
    "entropy": ("--segmentor", "frozen", *_PUBLISHED, "--focal-gamma", 0),
    "bounded": (),
}
WORDS = {
    "frozen": "frozen, full precision",
    "alternate": "alternate, full precision",
    "binary": "frozen, binarised",
    "binary_alternate": "alternate, binarised",
    "published": "frozen, full precision, the published loss",
    "published_alternate": "alternate, full precision, the published loss",
    "published_binary": "frozen, binarised, the published loss",
    "entropy": "frozen, full precision, the published loss with cross entropy in place of the focal one",
    "bounded": "none: the segmentor's probabilities, bounded as a refiner's are",
}
BOUNDED = "bounded"
"""The control: what bounding alone does to calibration, before windows are averaged."""
_NEVER = 99.0  # bits, a threshold that no voxel passes
TRAINERS = {"finetune": "DiffSegTrainer", "scratch": "DiffSegTrainerScratch"}
TEST, TUNING, ALONE = "test", "tuning", "alone"
_DONE = "calibration.json"


@dataclass(frozen=True)
class Source:
    """The data set and the networks of a benchmark of few labels.

    Attributes:
        id, name: of the data set.
        script: that trained the networks.
        arguments: of it, WORKSPACE in them.
        report: of the benchmark, in the workspace.
        patch: that they were trained with.
        budgets, seeds: that are refined unless others are asked for.
        tested: the test cases, in words.
        section, title: of RESULTS.md.
        small: structures told apart.
    """

    id: int
    name: str
    script: str
    arguments: str
    report: str
    patch: tuple[int, ...]
    budgets: tuple[str, ...]
    seeds: tuple[int, ...]
    tested: str
    section: str
    title: str
    small: tuple[str, ...] = ()

    def trained_by(self, strategy: str) -> Source:
        """The same, reported on in a section of its own where the segmentors are not fine-tuned."""
        if strategy == "finetune":
            return self
        return replace(self, section=f"{self.section}-{strategy}", title=f"{self.title}, segmentors by `{strategy}`")

    def apart(self, words: str | None) -> Source:
        """The same, reported on in a section of its own where it is given a name."""
        if words is None:
            return self
        name = "-".join(re.findall("[a-z0-9]+", words.lower()))
        return replace(self, section=f"{self.section}-{name}", title=f"{self.title}: {words}")


SOURCES = {
    "abdomen": Source(
        few_labels.ID,
        few_labels.NAME,
        "few_labels.py",
        "WORKSPACE DATA",
        f"few_labels/{few_labels.MODE}",
        few_labels.PATCH,
        ("2cases", "14cases"),
        (0, 1, 2),
        "The ten held-out BTCV scans, 13 organs",
        "refinement",
        "Refinement (HiDiff)",
        ("gallbladder", "esophagus", "portal_and_splenic_veins", "right_adrenal_gland", "left_adrenal_gland"),
    ),
    "hippocampus": Source(
        few_labels_hippocampus.ID,
        few_labels_hippocampus.NAME,
        "few_labels_hippocampus.py",
        "TASK_FOLDER WORKSPACE",
        "few_labels",
        few_labels_hippocampus.PATCH,
        ("2cases", "160cases"),
        (0, 1, 2),
        "The 40 cases of fold 0, 2 structures",
        "refinement-hippocampus",
        "Refinement (HiDiff): hippocampus",
    ),
}


@dataclass(frozen=True)
class Segmentor:
    """A trained network.

    Attributes:
        strategy: that trained it, of TRAINERS.
        labels: the budget.
        seed: of its draw and of the training.
        fold: that it is.
        test: the held-out cases.
        tuning: training scans that it was not trained on; none where all were.
    """

    workspace: Path
    source: Source
    strategy: str
    labels: str
    seed: int
    fold: int
    test: tuple[str, ...]
    tuning: tuple[str, ...]

    @property
    def name(self) -> str:
        name = f"{self.labels}_seed{self.seed}"
        return name if self.strategy == "finetune" else f"{self.strategy}_{name}"

    @property
    def results(self) -> Path:
        """nnU-Net's results that hold it: the benchmark's."""
        return self.workspace / self.source.report / NETWORKS

    @property
    def model(self) -> Path:
        return _model(self.results, self.source, TRAINERS[self.strategy])

    @property
    def preprocessed(self) -> Path:
        return self.workspace / "nnUNet_preprocessed" / self.source.name

    @property
    def checkpoint(self) -> Path:
        return (self.model / f"fold_{self.fold}" / FINAL).resolve()

    def cases(self, part: str) -> tuple[str, ...]:
        return self.tuning if part == TUNING else self.test

    def images(self, part: str) -> list[Case]:
        folder = self.workspace / "nnUNet_raw" / self.source.name / "imagesTr"
        return [Case(case, (folder / f"{case}_0000.nii.gz",), None) for case in self.cases(part)]


@dataclass(frozen=True)
class Refinement:
    """A segmentor and a way to refine it; measured once, part by part."""

    segmentor: Segmentor
    variant: str
    options: argparse.Namespace

    @property
    def run(self) -> str:
        own = self.options
        return (
            f"refine_{self.segmentor.name}_{self.variant}_{own.iterations}_width{own.width}"
            f"_{own.samples}x{own.sampling_steps}"
        )

    @property
    def model(self) -> Path:
        results = run_folder(self.segmentor.workspace, self.run)
        return _model(results, self.segmentor.source, "DiffSegRefinerTrainer")

    @property
    def checkpoint(self) -> Path:
        return self.model / f"fold_{self.segmentor.fold}" / FINAL

    @cached_property
    def environment(self) -> dict[str, str]:
        return run_environment(self.segmentor.workspace, self.run, self.segmentor.source.name)

    @property
    def is_trained(self) -> bool:
        """Whether it has a refiner of its own."""
        return self.variant != BOUNDED

    @property
    def parts(self) -> list[str]:
        """What of it is measured."""
        parts = [TEST, *([TUNING] if self.segmentor.tuning else [])]
        return [*parts, *([ALONE] if self.variant.endswith("alternate") else [])]

    @property
    def is_measured(self) -> bool:
        """Whether nothing of it is left to do."""
        return all((_folder(self.segmentor, part, self.run) / _DONE).is_file() for part in self.parts)

    def measure(self, part: str) -> Scored:
        """The refined test or tuning scans; or, ALONE, the test scans by the segmentor that learnt with the refiner."""
        return _measured(self.segmentor, part, self.run, lambda folder: self._predict(part, folder))

    def _predict(self, part: str, folder: Path) -> Path:
        segmentor, own = self.segmentor, self.options
        if not self.is_trained:
            model, options = replace(self, variant="frozen").model, RefineOptions(threshold_bits=_NEVER)
            device = prepare_device("auto")
            predictor = load_refining_predictor(model, [segmentor.fold], device, True, FINAL, options)
            return _predicted(predictor, segmentor.images(part), folder)
        if part == TEST:  # the stage's own validation
            diffseg(
                *("refine", segmentor.source.id, "-c", CONFIGURATION, "-f", segmentor.fold),
                *("--checkpoint", segmentor.checkpoint),
                *("--iterations", own.iterations, "--seed", segmentor.seed, "--width", own.width, "--npz"),
                *("--samples", own.samples, "--sampling-steps", own.sampling_steps, *VARIANTS[self.variant]),
                environment=self.environment,
            )
            return self.checkpoint.parent / "validation"
        device = prepare_device("auto")
        if part == ALONE:
            predictor = load_predictor(self.model, [segmentor.fold], device, True, FINAL)
        else:
            chosen = RefineOptions(seed=segmentor.seed)
            predictor = load_refining_predictor(self.model, [segmentor.fold], device, True, FINAL, chosen)
        return _predicted(predictor, segmentor.images(part), folder)


def _model(results: Path, source: Source, trainer: str) -> Path:
    return results / source.name / f"{trainer}__DiffSegPlans__{CONFIGURATION}"


def find_segmentors(options: argparse.Namespace) -> list[Segmentor]:
    """Those asked for; ends the script where one is missing, unless it only reports, and says what makes it."""
    source: Source = options.source
    folder = options.workspace / "nnUNet_preprocessed" / source.name
    drawn = read_budget_folds(folder, json.loads((folder / "splits_final.json").read_text()))
    found = []
    for labels in options.budgets:
        for seed in options.seeds:
            fold = next((each for each in drawn.values() if (each.labels, each.seed) == (labels, seed)), None)
            if fold is None and options.measured:
                continue
            if fold is not None:
                tuning = fold.unlabelled[: options.tuning_scans]
                own = (options.workspace, source, options.strategy, labels, seed)
                found.append(Segmentor(*own, fold.fold, fold.val, tuning))
            if fold is None or not _is_the_benchmarks(found[-1]):
                arguments = source.arguments.replace("WORKSPACE", str(options.workspace))
                sys.exit(
                    f"No segmentor of {labels}, seed {seed}: run `python benchmarks/{source.script} {arguments} "
                    f"--budgets {labels} --seeds {seed} --strategies {options.strategy} --no-report` first."
                )
    return found


def _is_the_benchmarks(segmentor: Segmentor) -> bool:
    """Whether the network is there that the benchmark reports, and not one that was trained in its place since."""
    run = Run(segmentor.strategy, segmentor.labels, segmentor.seed)
    record = RunRecord.read(run.folder(segmentor.workspace / segmentor.source.report))
    path = segmentor.checkpoint
    return record is not None and path.is_file() and file_digest(path) == record.checkpoint


def plain(segmentor: Segmentor, part: str) -> Scored:
    """The segmentor's own predictions of the test or tuning scans; ALONE has those of the test scans before it."""
    part = TEST if part == ALONE else part

    def predict(folder: Path) -> Path:
        predictor = load_predictor(segmentor.model, [segmentor.fold], prepare_device("auto"), True, FINAL)
        return _predicted(predictor, segmentor.images(part), folder)

    return _measured(segmentor, part, f"plain_{segmentor.name}", predict)


def _predicted(predictor: Any, cases: Sequence[Case], folder: Path) -> Path:
    failed = predict_cases(predictor, cases, folder, save_probabilities=True, skip_existing=True)
    if failed:
        sys.exit(f"{failed[0].case} could not be predicted: {failed[0].reason}")
    return folder


def _folder(segmentor: Segmentor, part: str, run: str) -> Path:
    """Of what is measured."""
    name = f"{part}_{len(segmentor.cases(part))}"  # so many tuning scans were asked for
    return segmentor.workspace / "benchmarks" / "refinement" / run / name


def _measured(segmentor: Segmentor, part: str, run: str, predict: Callable[[Path], Path]) -> Scored:
    """Scores and calibration of predictions, once; probabilities are removed, a hundred megabytes a case.

    Args:
        predict: makes them, with probabilities, in the folder it is given or another, and returns which.
    """
    folder = _folder(segmentor, part, run)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / _DONE).is_file():
            predictions = predict(folder / "predictions")
            references = segmentor.preprocessed / "gt_segmentations"
            cases = segmentor.cases(part)
            evaluate(predictions, references, segmentor.preprocessed / "dataset.json", folder, cases=cases)
            found = {
                case: asdict(case_calibration(predictions / f"{case}.npz", references / f"{case}.nii.gz"))
                for case in cases
            }
            write_json(folder / _DONE, found)
            for case in cases:
                for ending in (".npz", ".pkl"):
                    (predictions / f"{case}{ending}").unlink()
    calibrations = json.loads((folder / _DONE).read_text())
    return Scored(read_report(folder), {case: Calibration(**each) for case, each in calibrations.items()})
