"""``diffseg evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffseg_nnunet.cli.arguments import Workspace


def evaluate(
    prediction: Annotated[Path, typer.Option(help="Folder of segmentations.", show_default=False)],
    reference: Annotated[Path, typer.Option(help="Folder of reference segmentations.", show_default=False)],
    labels: Annotated[Path, typer.Option(help="labels.json (name: value) or dataset.json.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report.", show_default=False)],
    tolerance: Annotated[float, typer.Option(min=0.0, help="Tolerance of the NSD, mm.")] = 1.0,
    workspace: Workspace = None,
) -> None:
    """DSC, NSD and HD95 per case and structure, with confidence intervals, as JSON and CSV."""
    from diffseg_nnunet.cli.console import ConsoleReporter
    from diffseg_nnunet.errors import EXIT_BAD_INPUT
    from diffseg_nnunet.evaluation.report import summary_table
    from diffseg_nnunet.pipeline.evaluating import evaluate as evaluate_stage

    with ConsoleReporter().live() as reporter:
        evaluation = evaluate_stage(
            prediction,
            reference,
            labels,
            output,
            tolerance_mm=tolerance,
            progress=lambda done, total: reporter.progress("evaluate", done, total),
        )
        reporter.console.print(summary_table(evaluation))
        reporter.info(f"report: {output}")
        for failure in evaluation.failures:
            reporter.warn(f"{failure.case} was set aside: {failure.reason}")
    if evaluation.failures:
        raise typer.Exit(EXIT_BAD_INPUT)
