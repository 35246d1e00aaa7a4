"""The runs of a benchmark, in their order; which of them are done, and how long the others may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from diffseg_nnunet.atomic import write_json
from diffseg_nnunet.benchmarking.divisions import Division
from diffseg_nnunet.benchmarking.protocol import TWIN, BenchmarkProtocol
from diffseg_nnunet.benchmarking.provenance import Pool
from diffseg_nnunet.evaluation.protocols import find_protocol
from diffseg_nnunet.evaluation.report import SCORES_JSON
from diffseg_nnunet.pipeline.manifest import signature
from diffseg_nnunet.pipeline.records import read_record

RUNS, RECORD = "runs", "run.json"
State = Literal["to do", "finished", "failed", "other settings"]


@dataclass(frozen=True)
class Run:
    """One training, tested.

    Attributes:
        strategy: a registered trainer.
        labels: the budget.
        seed: of the labels drawn and of the training.
        fold: number of the division, by the split it is of.
    """

    strategy: str
    labels: str
    seed: int
    fold: int = 0

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"seed{self.seed}_fold{self.fold}_{self.labels.replace('%', 'percent')}_{self.strategy}"

    def folder(self, output: Path) -> Path:
        """In the benchmark's output."""
        return output / RUNS / self.name


@dataclass(frozen=True)
class RunRecord:
    """What is kept of a run that has ended.

    Attributes:
        status: "finished" or "failed".
        signature: digest of everything declared that its result depends on.
        inputs: digest of what its training read, plan and cases among them; None where it failed.
        checkpoint: SHA-256 of the trained network; None where there is none.
        pretrained: SHA-256 of the network that it started from; None where there is none.
        saw: what its pretraining saw, nothing where there was none; None: the pretrained checkpoint does not say, or
            the run failed.
        labelled_cases: training cases with labels, all or part of them annotated.
        labelled_slices: in all, for a budget of slices; else None.
        missing: structures without any label in the budget.
        seconds: of training and test, where it was not interrupted; else None.
        iterations: of the training.
        reads: what a probe reads, in words; None where the training was none of a probe.
        reason: why it failed.
    """

    status: Literal["finished", "failed"]
    signature: str
    inputs: str | None = None
    checkpoint: str | None = None
    pretrained: str | None = None
    saw: Pool | None = None
    labelled_cases: int | None = None
    labelled_slices: int | None = None
    missing: tuple[str, ...] = ()
    seconds: float | None = None
    iterations: int | None = None
    reads: str | None = None
    reason: str | None = None

    def is_result_of(self, signature: str, inputs: str) -> bool:
        """Whether it is what a run with this signature and these inputs has ended with."""
        return (self.status, self.signature, self.inputs) == ("finished", signature, inputs)

    def write(self, folder: Path) -> None:
        write_json(folder / RECORD, {**vars(self), "missing": list(self.missing)})

    @classmethod
    def read(cls, folder: Path) -> RunRecord | None:
        """None where there is none that can be read."""
        content = read_record(folder / RECORD)
        try:
            return cls(**{**content, "missing": tuple(content["missing"])})
        except (KeyError, TypeError):
            return None


def fold_numbers(protocol: BenchmarkProtocol, count: int) -> Sequence[int]:
    """Of a benchmark's divisions, of which there are so many: those asked for, else in their order."""
    return range(count) if protocol.folds is None or protocol.test_cases else protocol.folds


def list_runs(protocol: BenchmarkProtocol, folds: int) -> tuple[Run, ...]:
    """Seed by seed, within it budget by budget: what is interrupted has complete comparisons up to there."""
    return tuple(
        Run(strategy, labels, seed, fold)
        for seed in protocol.seeds
        for labels in protocol.budgets
        for fold in fold_numbers(protocol, folds)
        for strategy in protocol.all_strategies
    )


def run_signature(
    protocol: BenchmarkProtocol,
    run: Run,
    settings: Mapping[str, Any],
    division: Division,
    plan: Mapping[str, Any],
    data: Sequence[str],
    pretrained: str | None = None,
) -> str:
    """A digest of what a run's scores depend on, as far as it is declared.

    Args:
        settings: of the run's trainer, as JSON, those the protocol leaves alone included: an earlier version's may
            have been others.
        plan: the plan's request, as JSON.
        data: digests of the data sets, the labelled one first.
        pretrained: digest of the checkpoint that was given to start from; None: the benchmark pretrains.
    """
    pretraining: Any = None
    if run.strategy != TWIN:
        pretraining = pretrained or [protocol.pretrain_iterations, protocol.pretrain_seed]
    # what joins the pool is no matter of a network that was not pretrained, but it is of the plan's fingerprint
    return signature(
        {
            "run": vars(run) | {"fold": None},
            "cases": division.as_fold(),
            "settings": dict(settings),
            "pretraining": pretraining,
            "configuration": protocol.configuration,
            "evaluation": find_protocol(protocol.evaluation).as_plain(),
            "plan": dict(plan),
            "data": list(data),
        }
    )


def state_of(run: Run, output: Path, wanted: str) -> State:
    """Where a run stands.

    Args:
        output: the benchmark's.
        wanted: its signature.
    """
    folder = run.folder(output)
    record = RunRecord.read(folder)
    if record is None:
        return "to do"
    if record.signature != wanted:
        return "other settings"
    if record.status == "failed":
        return "failed"
    return "finished" if (folder / SCORES_JSON).is_file() else "to do"


def set_aside_other(run: Run, output: Path, signature: str, inputs: str) -> Path | None:
    """Keep the scores that a run got with other settings or data under another name; None where there are none."""
    folder = run.folder(output)
    record = RunRecord.read(folder)
    if record is None or record.status != "finished" or record.is_result_of(signature, inputs):
        return None
    return folder.rename(folder.with_name(f"superseded_{folder.name}_{datetime.now():%Y%m%d-%H%M%S-%f}"))


def estimated_seconds(
    to_do: Sequence[Run], measured: Mapping[Run, RunRecord], iterations: int
) -> tuple[float, int] | None:
    """How long the runs may take by those that were measured, and by how many of these.

    A strategy is judged by its own runs, one without any by all of them. Pretraining is not counted.

    Returns:
        None where nothing was measured.
    """
    rates: dict[str, list[float]] = {}
    for run, record in measured.items():
        if record.seconds is not None and record.iterations:
            rates.setdefault(run.strategy, []).append(record.seconds / record.iterations)
    everything = [rate for own in rates.values() for rate in own]
    if not everything:
        return None
    total = 0.0
    for run in to_do:
        own = rates.get(run.strategy, everything)
        total += iterations * sum(own) / len(own)
    return total, len(everything)
