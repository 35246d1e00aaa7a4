"""``diffseg evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffseg_nnunet.cli.arguments import Workspace

if TYPE_CHECKING:
    from diffseg_nnunet.cli.console import ConsoleReporter
    from diffseg_nnunet.evaluation.statistics import Evaluation

AGAINST = "against"


def evaluate(
    prediction: Annotated[Path, typer.Option(help="Folder of segmentations.", show_default=False)],
    reference: Annotated[Path, typer.Option(help="Folder of reference segmentations.", show_default=False)],
    labels: Annotated[Path, typer.Option(help="Labels of the references: labels.json (name: value) or dataset.json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report.", show_default=False)],
    prediction_labels: Annotated[
        Path | None,
        typer.Option(
            help="Labels of the segmentations, where they are numbered otherwise; structures are matched by name.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Folder of other segmentations of the same cases, with the same labels: compare the two.",
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="Rules: plain, flare22, flare23, flare-clean, btcv or synapse8.")
    ] = "plain",
    revision: Annotated[
        str | None, typer.Option(help="Of flare22's official script: 2022 or 2024 (default).", show_default=False)
    ] = None,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            help="Tolerance of the NSD in mm: 2, or liver=5 for one structure; may be repeated. Default: the "
            "protocol's, else 1.",
            show_default=False,
        ),
    ] = None,
    cases: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CASE ...",
            help="Compare these only, by their files' names without ending; else all, which both folders must hold.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Cases compared at once; default: the cores.", show_default=False)
    ] = None,
    worst: Annotated[int, typer.Option(min=0, help="How many of the worst cases to name.")] = 5,
    workspace: Workspace = None,  # as every command takes it; folders are all that is read here
) -> None:
    """DSC, IoU, NSD, HD95, ASSD and volumes per case and structure, with confidence intervals, as JSON, CSV
    and a page (report.html).

    With --against, the same of other segmentations (in OUTPUT/against), and both compared case by case.
    """
    from diffseg_nnunet.cli.console import ConsoleReporter
    from diffseg_nnunet.errors import EXIT_BAD_INPUT
    from diffseg_nnunet.evaluation.protocols import find_protocol
    from diffseg_nnunet.evaluation.structures import parse_tolerances
    from diffseg_nnunet.evaluation.tables import comparison_table
    from diffseg_nnunet.pipeline.evaluating import compare_evaluations
    from diffseg_nnunet.pipeline.evaluating import evaluate as evaluate_stage

    tolerance_mm, tolerances_mm = parse_tolerances(tolerance or ())
    rules = find_protocol(protocol, revision)
    with ConsoleReporter().live() as reporter:
        evaluations: list[Evaluation] = []
        for folder, report, stage in ((prediction, output, "evaluate"), (against, output / AGAINST, AGAINST)):
            if folder is None:
                continue
            evaluation = evaluate_stage(
                folder,
                reference,
                labels,
                report,
                prediction_labels=prediction_labels,
                protocol=rules,
                tolerance_mm=tolerance_mm,
                tolerances_mm=tolerances_mm,
                cases=cases,
                workers=workers,
                worst=worst,
                progress=lambda done, total, stage=stage: reporter.progress(stage, done, total),
            )
            _show(reporter, evaluation, report)
            evaluations.append(evaluation)
        if len(evaluations) == 2:
            reporter.console.print(comparison_table(compare_evaluations(*evaluations, output)))
            reporter.info(f"comparison: {output}")
    if any(evaluation.failures for evaluation in evaluations):
        raise typer.Exit(EXIT_BAD_INPUT)


def _show(reporter: ConsoleReporter, evaluation: Evaluation, report: Path) -> None:
    from diffseg_nnunet.evaluation.tables import summary_table

    reporter.console.print(summary_table(evaluation))
    for name, mean in evaluation.official.items():
        reporter.info(f"{name}: {mean:.4f}")
    for worst in evaluation.worst_cases:
        reporter.info(f"worst: {worst.case}, mean DSC {worst.dsc:.3f}, {worst.structure} {worst.structure_dsc:.3f}")
    for side, names in evaluation.settings["unmatched"].items():
        if names:
            reporter.info(f"not scored, of the {side}: {', '.join(names)}")
    reporter.info(f"report: {report}")
    for remark in evaluation.remarks:
        reporter.warn(f"{remark.case}, {remark.structure}: {remark.text}")
    for failure in evaluation.failures:
        reporter.warn(f"{failure.case} was set aside: {failure.reason}")
