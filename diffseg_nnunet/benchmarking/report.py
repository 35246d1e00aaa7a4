"""The report folder: benchmark.json, table.md, table.csv, curve.png, learning_curves.png."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from diffseg_nnunet.atomic import write_file, write_json, write_text
from diffseg_nnunet.benchmarking.curves import LearningCurve
from diffseg_nnunet.benchmarking.divisions import Division
from diffseg_nnunet.benchmarking.pictures import draw_budget_curve, draw_learning_curves
from diffseg_nnunet.benchmarking.protocol import OWN_SPLIT, TWIN, BenchmarkProtocol
from diffseg_nnunet.benchmarking.provenance import Legality, Origin, Pool, flare_legality, seen_together
from diffseg_nnunet.benchmarking.published import Conditions, compared
from diffseg_nnunet.benchmarking.results import METHOD, SHOWN_METRICS, Group, Outcome, group, reach
from diffseg_nnunet.benchmarking.runner import Benchmark
from diffseg_nnunet.benchmarking.runs import Run, RunRecord, State
from diffseg_nnunet.benchmarking.tables import (
    CSV_COLUMNS,
    csv_rows,
    curve_section,
    main_table,
    published_section,
    structure_tables,
)
from diffseg_nnunet.budgets.budget import LabelBudget
from diffseg_nnunet.evaluation.report import read_report
from diffseg_nnunet.pipeline.manifest import versions
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.planning.gpus import visible_gpus
from diffseg_nnunet.planning.hardware import memory_limit_gib, usable_cores
from diffseg_nnunet.training.checkpoint import file_digest
from diffseg_nnunet.training.settings import TrainingSettings
from diffseg_nnunet.verification import listed

MANIFEST, TABLE_MD, TABLE_CSV = "benchmark.json", "table.md", "table.csv"
CURVE_PNG, LEARNING_PNG = "curve.png", "learning_curves.png"


@dataclass(frozen=True)
class Findings:
    """All that a report says.

    Attributes:
        folds: of the protocol.
        states, records: by run.
        groups: of what has finished.
        curves: of what has finished.
        seen: place of a fold -> what the pretraining of what has finished saw; None: its checkpoint does not say.
        origins: data sets by name, the labelled one first.
        pretraining: what all but the twin start from, in words.
    """

    protocol: BenchmarkProtocol
    dataset: str
    folds: tuple[Division, ...]
    states: Mapping[Run, State]
    records: Mapping[Run, RunRecord]
    groups: Sequence[Group]
    curves: Mapping[Run, LearningCurve]
    seen: Mapping[int, Pool | None]
    origins: Mapping[str, Origin]
    pretraining: str

    @property
    def legality(self) -> Legality:
        return flare_legality(self.origins[self.dataset], seen_together(self.seen.values()), self.origins)

    @property
    def conditions(self) -> Conditions:
        whole = [each for each in self.groups if not LabelBudget.parse(each.labels).is_sparse]
        protocol = self.protocol
        return Conditions(
            self.origins[self.dataset].converter,
            protocol.split_name,
            protocol.split_name != OWN_SPLIT and protocol.folds is None,
            protocol.evaluation,
            tuple(summary.structure for each in self.groups[:1] for summary in each.evaluation.structures),
            tuple(sorted({int(each.labelled_cases) for each in whole if each.labelled_cases.is_integer()})),
        )


def gathered(benchmark: Benchmark, folds: tuple[Division, ...]) -> Findings:
    """What there is so far."""
    states = benchmark.states(folds)
    finished = [run for run, state in states.items() if state == "finished"]
    folders = {run: run.folder(benchmark.output) for run in states}
    read = {run: RunRecord.read(folder) for run, folder in folders.items() if states[run] != "other settings"}
    records = {run: record for run, record in read.items() if record is not None}
    outcomes = [Outcome(run, records[run], read_report(folders[run])) for run in finished]
    curves = {run: LearningCurve.read(folders[run]) for run in finished}
    seen = seen_by_fold({run: records[run] for run in finished})
    project = benchmark.project
    names = {project.name: project} | {
        name: Project(project.workspace, name)
        for pool in seen.values()
        for name in pool or ()
        if (project.workspace.raw / name).is_dir()
    }
    return Findings(
        benchmark.protocol,
        project.name,
        folds,
        states,
        records,
        group(outcomes, len(folds)),
        {run: curve for run, curve in curves.items() if curve is not None},
        seen,
        {name: Origin.of(each) for name, each in names.items()},
        _pretraining(benchmark),
    )


def seen_by_fold(finished: Mapping[Run, RunRecord]) -> dict[int, Pool | None]:
    """Place of a fold -> what the pretrainings of its runs saw, together; None: one of them does not say."""
    pools: dict[int, list[Pool | None]] = {}
    for run, record in finished.items():
        if run.strategy != TWIN:
            pools.setdefault(run.fold, []).append(record.saw)
    together = {fold: seen_together(each) for fold, each in pools.items()}
    return {
        fold: None if pool is None else {name: sorted(cases) for name, cases in pool.items()}
        for fold, pool in together.items()
    }


def different_starts(finished: Mapping[Run, RunRecord]) -> Iterator[str]:
    """A line for each fold whose runs started from different pretrained networks."""
    networks: dict[int, dict[str, list[str]]] = {}
    for run, record in finished.items():
        if record.pretrained is not None:
            networks.setdefault(run.fold, {}).setdefault(record.pretrained, []).append(run.name)
    for fold, by_digest in networks.items():
        if len(by_digest) > 1:
            groups = "; ".join(f"{digest[:12]}: {listed(names)}" for digest, names in by_digest.items())
            yield f"- the runs of fold {fold} started from networks of different pretrainings (SHA-256): {groups}"


def readings(finished: Mapping[Run, RunRecord]) -> Iterator[str]:
    """A line for each thing that probes read."""
    strategies: dict[str, set[str]] = {}
    for run, record in finished.items():
        if record.reads is not None:
            strategies.setdefault(record.reads, set()).add(run.strategy)
    for reads, names in strategies.items():
        yield f"- {' and '.join(sorted(names))}: what is read is {reads}"


def _pretraining(benchmark: Benchmark) -> str:
    if benchmark.given is None:
        protocol = benchmark.protocol
        return f"{protocol.pretrain_iterations} of the pretraining (seed {protocol.pretrain_seed})"
    return f"all but the twin start from {benchmark.given.name} (SHA-256 {file_digest(benchmark.given)})"


def write_benchmark_report(benchmark: Benchmark, folds: tuple[Division, ...]) -> Findings:
    """Write the files, each whole or not at all, of all runs that have finished so far."""
    found, output = gathered(benchmark, folds), benchmark.output
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / TABLE_MD, "\n\n".join(_markdown(found)) + "\n")
    rows = pd.DataFrame(list(csv_rows(found.groups)), columns=list(CSV_COLUMNS))
    write_file(output / TABLE_CSV, lambda temporary: rows.to_csv(temporary, index=False))
    beside, _ = compared(found.conditions)
    draw_budget_curve(output / CURVE_PNG, found.groups, _title(found), beside)
    draw_learning_curves(output / LEARNING_PNG, found.curves)
    write_json(output / MANIFEST, _manifest(benchmark, found))
    return found


def _title(found: Findings) -> str:
    cases = sum(len(division.test) for division in found.folds)
    return f"{found.protocol.name}: {found.dataset}, split {found.protocol.split_name}, {cases} test cases"


def _rates(protocol: BenchmarkProtocol) -> str:
    """Initial learning rates, and which strategies have them."""
    by_rate: dict[float, list[str]] = {}
    settings = TrainingSettings(optimizer=protocol.optimizer)
    for strategy in protocol.all_strategies:
        by_rate.setdefault(settings.rate(strategy), []).append(strategy)
    return "; ".join(f"initial rate {rate:g}: {', '.join(strategies)}" for rate, strategies in by_rate.items())


def _markdown(found: Findings) -> Iterator[str]:
    protocol, counts = found.protocol, _counts(found.states)
    yield f"# {_title(found)}"
    yield (
        f"{protocol.summary} Scores by `{protocol.evaluation}`; {protocol.iterations} iterations of every training by "
        f"{protocol.optimizer} ({_rates(protocol)}), {found.pretraining}, seeds {', '.join(map(str, protocol.seeds))}. "
        f"Runs: {', '.join(f'{count} {state}' for state, count in counts.items())}."
    )
    legality = found.legality
    yield f"FLARE22-legal: **{'yes' if legality.legal else 'no'}**. {legality.reason}"
    yield (
        "One plan serves all runs (spacing, and for CT the intensities that are normalised by). It is made of all "
        "labelled cases, tested ones and those beyond a budget included, as nnU-Net plans a cross-validation; or it is "
        "that of the checkpoint it was planned from."
    )
    if found.groups:
        yield main_table(found.groups)
        yield " ".join(filter(None, (METHOD, reach(found.groups))))
        for labels, table in structure_tables(found.groups):
            yield f"## DSC by structure, {labels}"
            yield table
        yield "## Published figures"
        yield from published_section(*compared(found.conditions))
        yield "## Were the networks trained to their end?"
        yield from curve_section(found.curves)
    yield from _remarks(found)


def _counts(states: Mapping[Run, State]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for state in states.values():
        counts[state] = counts.get(state, 0) + 1
    return counts


def _remarks(found: Findings) -> Iterator[str]:
    lines = [f"- {run.name} failed: {record.reason}" for run, record in found.records.items() if record.reason]
    finished = {run: record for run, record in found.records.items() if found.states[run] == "finished"}
    lines += readings(finished)
    lines += different_starts(finished)
    missing = {
        f"- seed {run.seed}, {run.labels}: no label of {', '.join(record.missing)}"
        for run, record in found.records.items()
        if record.missing
    }
    lines += sorted(missing)
    lines += [
        f"- {each.strategy}, {each.labels}: {failure.case} was not scored: {failure.reason}"
        for each in found.groups
        for failure in each.evaluation.failures
    ]
    if lines:
        yield "## To know"
        yield "\n".join(lines)


def _manifest(benchmark: Benchmark, found: Findings) -> dict[str, Any]:
    legality, (beside, apart) = found.legality, compared(found.conditions)
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "protocol": found.protocol.to_json(),
        "dataset": found.dataset,
        "split": {"name": found.protocol.split_name, "folds": [division.as_fold() for division in found.folds]},
        "plan": benchmark.plan_request.to_json(),
        "versions": versions(),
        "hardware": {
            "cores": usable_cores(),
            "memory_gib": round(memory_limit_gib(), 1),
            "gpus": [gpu.name for gpu in visible_gpus()],
        },
        "data": {name: asdict(origin) for name, origin in found.origins.items()},
        "pretraining": found.pretraining,
        "pretraining_saw": {f"fold_{fold}": pool for fold, pool in found.seen.items()},
        "flare_legal": legality.legal,
        "flare_legal_reason": legality.reason,
        "runs": {
            run.name: {"state": state, **(_without_cases(found.records[run]) if run in found.records else {})}
            for run, state in found.states.items()
        },
        "results": [_result(each) for each in found.groups],
        "method": METHOD,
        "published": {
            "comparable": [asdict(each) for each in beside],
            "not_comparable": [{"method": each.method, "why": why, "source": each.source} for each, why in apart],
        },
    }


def _without_cases(record: RunRecord) -> dict[str, Any]:
    """Of what was seen the manifest has a list for each fold."""
    return {name: value for name, value in vars(record).items() if name != "saw"}


def _result(each: Group) -> dict[str, Any]:
    """The means over structures; the rest is in the table."""
    scores: dict[str, Any] = {}
    for metric in SHOWN_METRICS:
        found, paired = getattr(each.evaluation.overall, metric), each.paired(metric)
        scores[metric] = _plain(asdict(found)) | {"by_seed": _plain(dict(each.spread(metric).by_seed))}
        if paired is not None:
            scores[metric]["minus_twin"] = _plain(asdict(paired.difference)) | {
                "p": paired.p,
                "p_holm": (each.p_holm or {}).get(metric),
                "seeds": list(each.compared_seeds),
            }
    return {"strategy": each.strategy, "labels": each.labels, "labelled_cases": each.labelled_cases, "scores": scores}


def _plain(content: Mapping[Any, Any]) -> dict[str, Any]:
    """As JSON has it: NaN is null."""
    return {str(k): None if isinstance(v, float) and math.isnan(v) else v for k, v in content.items()}
