"""``diffseg report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffseg_nnunet.cli.arguments import DatasetId, Workspace
from diffseg_nnunet.cli.console import open_project


def report(
    dataset_id: DatasetId,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.html",
            help="Default: report.html in the data set's results.",
            show_default=False,
        ),
    ] = None,
    pictures: Annotated[int, typer.Option(min=0, help="So many of each fold's worst validation cases are shown.")] = 3,
    workspace: Workspace = None,
) -> None:
    """One page of what was done with a data set and what came of it: findings, plan, stages, learning
    curves, scores, the worst cases. It holds pictures of patients; it needs no network."""
    with open_project(workspace, dataset_id) as project:
        from diffseg_nnunet.errors import BadInputError
        from diffseg_nnunet.pipeline.reporting import write_project_report

        if output is not None and output.suffix.lower() not in (".html", ".htm"):
            raise BadInputError(f"--output {output} does not end in .html.", "Name it FILE.html.")
        project.reporter.info(f"report: {write_project_report(project, output, pictures)}")
