"""``diffseg benchmark``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffseg_nnunet.cli.arguments import STRATEGIES, Device, Workspace
from diffseg_nnunet.cli.console import open_project
from diffseg_nnunet.cli.pretrain import OPTIMIZERS

if TYPE_CHECKING:
    from diffseg_nnunet.benchmarking.protocol import BenchmarkProtocol
    from diffseg_nnunet.benchmarking.report import Findings
    from diffseg_nnunet.benchmarking.runner import Benchmark
    from diffseg_nnunet.pipeline.project import Project

BENCHMARKS = ("btcv", "synapse8", "flare22", "few-label")
_DECLARED = "Not given: as the protocol declares."
_SHOWN_COLUMNS = ("labels", "strategy", "seeds", "DSC", "NSD", "DSC minus twin", "p (Holm)")
_PLANNED = "As in `plan`; not given: as last planned."


def _option(text: str, metavar: str | None = None, **more: object) -> object:
    return typer.Option(help=text, metavar=metavar, show_default=False, **more)


def benchmark(
    name: Annotated[str, typer.Argument(metavar="|".join(BENCHMARKS), help="The protocol.", show_default=False)],
    source: Annotated[
        str,
        typer.Argument(metavar="SRC_OR_ID", help="Id or name of a data set, or the download.", show_default=False),
    ],
    dataset_id: Annotated[
        int | None,
        typer.Option("--id", min=1, max=999, help="Of the data set the download becomes.", show_default=False),
    ] = None,
    strategies: Annotated[
        list[str] | None, _option(f"Besides the twin, scratch: {', '.join(STRATEGIES)}. {_DECLARED}", "NAME ...")
    ] = None,
    budgets: Annotated[
        list[str] | None, _option(f"As in `labels`: 2cases 10% 4slices. {_DECLARED}", "BUDGET ...")
    ] = None,
    seeds: Annotated[
        list[int] | None,
        _option(f"Each draws other labels and other batches. {_DECLARED}", "SEED ..."),
    ] = None,
    iterations: Annotated[int | None, _option(f"Of every training. {_DECLARED}", min=1)] = None,
    pretrain_iterations: Annotated[int | None, _option(f"Of the pretraining. {_DECLARED}", min=1)] = None,
    pretrain_seed: Annotated[int | None, _option(f"Of the pretraining, one for all seeds. {_DECLARED}", min=0)] = None,
    pretrained: Annotated[
        Path | None, _option("All but the twin start from this checkpoint; else the benchmark pretrains.")
    ] = None,
    optimizer: Annotated[str | None, _option(f"Of every training: sgd or adamw. {_DECLARED}")] = None,
    configuration: Annotated[str | None, _option(f"nnU-Net's. {_DECLARED}")] = None,
    split: Annotated[str | None, _option(f"A published one: 24/6, 18/12, nnunet-5-fold, … {_DECLARED}")] = None,
    fold: Annotated[list[int] | None, _option(f"Folds of the split. {_DECLARED}", "FOLD ...")] = None,
    test_cases: Annotated[
        list[str] | None, _option("Test on these, train on all others; a split of your own.", "CASE ...")
    ] = None,
    evaluation: Annotated[str | None, _option(f"Protocol of `evaluate`. {_DECLARED}")] = None,
    gpu_memory: Annotated[str | None, _option(_PLANNED, "auto|GIB")] = None,
    backbone: Annotated[str | None, _option(_PLANNED)] = None,
    base_features: Annotated[int | None, _option(_PLANNED, min=1)] = None,
    spacing: Annotated[tuple[float, float, float] | None, _option(_PLANNED, "Z Y X")] = None,
    unlabeled: Annotated[list[str] | None, _option(f"Data sets to pretrain on, too. {_PLANNED}", "ID ...")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of report and networks; else in the data set's results."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs, what is done, and how long it takes.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Report on the runs that have finished, and run none.")
    ] = False,
    device: Device = "auto",
    workspace: Workspace = None,
) -> None:
    """Run a declared comparison of strategies and label budgets with the from-scratch twin, and report on it.

    Run it again after an interruption: what is finished and unchanged is not done twice.
    """
    from diffseg_nnunet.benchmarking.protocol import find_benchmark
    from diffseg_nnunet.benchmarking.runner import Benchmark
    from diffseg_nnunet.cli.arguments import check_choice, dataset_ids, given
    from diffseg_nnunet.errors import BadInputError

    for strategy in strategies or ():
        check_choice("--strategies", strategy, STRATEGIES)
    if optimizer is not None:
        check_choice("--optimizer", optimizer, OPTIMIZERS)
    lists = {"strategies": strategies, "budgets": budgets, "seeds": seeds, "folds": fold, "test_cases": test_cases}
    planned = given(
        gpu_memory=gpu_memory,
        backbone=backbone,
        base_features=base_features,
        spacing=spacing,
        unlabelled=dataset_ids(unlabeled) or None,
    )
    protocol = find_benchmark(name).changed(
        plan=planned,
        **{key: tuple(values) for key, values in lists.items() if values},
        **given(
            iterations=iterations,
            pretrain_iterations=pretrain_iterations,
            pretrain_seed=pretrain_seed,
            optimizer=optimizer,
            configuration=configuration,
            split=split,
            evaluation=evaluation,
        ),
    )
    for option, value in (("--pretrain-iterations", pretrain_iterations), ("--pretrain-seed", pretrain_seed)):
        if pretrained is not None and value is not None:
            raise BadInputError(f"{option} does not go with --pretrained.", "Leave one of them out.")
    for option, value in (("--split", split), ("--fold", fold)):
        if test_cases and value:
            raise BadInputError(f"{option} does not go with --test-cases, which are a split.", "Leave one of them out.")
    number = _dataset(protocol, source, dataset_id, workspace, dry_run)
    if number is None:
        return
    with open_project(workspace, number) as project:
        folder = (output or project.results / f"benchmark_{protocol.name}").resolve()
        benchmark = Benchmark(project, protocol, folder, device, pretrained)
        benchmark.networks.workspace.export()  # before nnU-Net reads where results go
        try:
            if report_only:
                _report(benchmark)
            else:
                _run(project, benchmark, dry_run)
        finally:
            project.workspace.export()


def _dataset(
    protocol: BenchmarkProtocol, source: str, dataset_id: int | None, workspace: Path | None, dry_run: bool
) -> int | str | None:
    """The data set's id or name, converted from the download if that is given and not done; None: nothing to go on
    with.

    Raises:
        BadInputError: the id is missing or given twice, the protocol converts nothing, or the id belongs to other data.
    """
    from diffseg_nnunet.errors import BadInputError
    from diffseg_nnunet.workspace import Workspace, is_dataset

    if is_dataset(source):
        if dataset_id is not None:
            raise BadInputError(
                f"--id {dataset_id} is of the data set that a download becomes, and {source} is one already.",
                "Leave one of them out.",
            )
        return source
    if protocol.converter is None:
        raise BadInputError(f"'{source}' is no id.", "Convert the data with `diffseg convert` and give its id.")
    if dataset_id is None:
        raise BadInputError(f"The data set that {source} becomes needs an id.", "Add --id, 1 to 999.")
    folder = Path(source)
    location = Workspace.locate(workspace)
    there = [each for each in location.dataset_names() if each.startswith(f"Dataset{dataset_id:03d}_")]
    if there:
        _refuse_other(location.raw / there[0], protocol, folder)
        return dataset_id
    return _converted(protocol, folder, dataset_id, workspace, dry_run)


def _refuse_other(raw: Path, protocol: BenchmarkProtocol, source: Path) -> None:
    from diffseg_nnunet.errors import BadInputError
    from diffseg_nnunet.raw_dataset import read_json_object

    record = raw / "conversion.json"
    known = read_json_object(record) if record.is_file() else {}
    if (known.get("format"), known.get("source")) != (protocol.converter, source.resolve().name):
        raise BadInputError(
            f"The id belongs to {raw.name}, which was not converted from {source} as '{protocol.converter}'.",
            "Choose another --id, or give the id of a converted data set instead of the download.",
        )


def _converted(
    protocol: BenchmarkProtocol, source: Path, dataset_id: int, workspace: Path | None, dry_run: bool
) -> int | None:
    from diffseg_nnunet import registry
    from diffseg_nnunet.cli.conversion import Request, convert

    converter = registry.load("converters", str(protocol.converter))()
    request = Request(dataset_id, workspace=workspace, dry_run=dry_run)
    with suppress(typer.Exit):  # warnings, which were printed: the data set is there
        convert(converter, source, dict(protocol.conversion), request)
    return None if dry_run else dataset_id


def _run(project: Project, benchmark: Benchmark, dry_run: bool) -> None:
    from diffseg_nnunet.errors import EXIT_FAILURE

    if dry_run:
        _preview(benchmark)
        return
    from diffseg_nnunet.benchmarking.report import TABLE_MD, write_benchmark_report

    reports: list[Findings] = []
    states = benchmark.run(lambda unfinished, folds: reports.append(write_benchmark_report(unfinished, folds)))
    _show(project, reports[-1])
    project.reporter.info(f"report: {benchmark.output / TABLE_MD}")
    failed = [run for run, state in states.items() if state != "finished"]
    for run in failed:
        project.reporter.warn(f"{run.name} did not finish; {benchmark.output / TABLE_MD} says why")
    if failed:
        raise typer.Exit(EXIT_FAILURE)


def _report(benchmark: Benchmark) -> None:
    from diffseg_nnunet.benchmarking.report import TABLE_MD, write_benchmark_report
    from diffseg_nnunet.errors import BadInputError

    if "finished" not in benchmark.preview().values():
        raise BadInputError(f"No run of this benchmark has finished in {benchmark.output}.", "Leave out --report-only.")
    _show(benchmark.project, write_benchmark_report(benchmark, benchmark.divisions()))
    benchmark.project.reporter.info(f"report: {benchmark.output / TABLE_MD}")


def _show(project: Project, found: Findings) -> None:
    from rich.markup import escape
    from rich.table import Table

    from diffseg_nnunet.benchmarking.results import METHOD
    from diffseg_nnunet.benchmarking.tables import MAIN_HEADER, main_rows

    shown = [MAIN_HEADER.index(name) for name in _SHOWN_COLUMNS]
    table = Table(*_SHOWN_COLUMNS, caption=escape(METHOD), caption_justify="left")
    for row in main_rows(found.groups):
        table.add_row(*(escape(row[column]) for column in shown))
    project.reporter.console.print(table, soft_wrap=False)
    legality = found.legality
    project.reporter.info(f"FLARE22-legal: {'yes' if legality.legal else 'no'}. {legality.reason}")


def _preview(benchmark: Benchmark) -> None:
    from rich.table import Table

    from diffseg_nnunet.benchmarking.runs import RunRecord, estimated_seconds

    states, reporter = benchmark.preview(), benchmark.project.reporter
    table = Table("seed", "fold", "labels", "strategy", "state", title=f"{benchmark.protocol.name}: {len(states)} runs")
    for run, state in states.items():
        table.add_row(str(run.seed), str(run.fold), run.labels, run.strategy, state)
    reporter.console.print(table, soft_wrap=False)
    left = [run for run, state in states.items() if state != "finished"]
    records = {run: RunRecord.read(run.folder(benchmark.output)) for run in states}
    measured = {run: record for run, record in records.items() if record is not None}
    estimate = estimated_seconds(left, measured, benchmark.protocol.iterations)
    if not left:
        reporter.info("all runs are finished")
    elif estimate is None:
        reporter.info(f"{len(left)} run(s) to do; how long they take is known once the first has finished")
    else:
        seconds, runs = estimate
        reporter.info(
            f"{len(left)} run(s) to do, about {_spoken(seconds)} by {runs} measured run(s), pretraining not counted"
        )


def _spoken(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"
