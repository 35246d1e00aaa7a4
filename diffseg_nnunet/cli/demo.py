"""``diffseg demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffseg_nnunet.cli.arguments import Device, Seed, Workspace


def demo(
    device: Device = "auto",
    seed: Seed = 0,
    pretrain_iterations: Annotated[int, typer.Option(min=1, help="Length of the pretraining.")] = 200,
    iterations: Annotated[int, typer.Option(min=1, help="Length of the fine-tuning.")] = 400,
    workspace: Workspace = None,
) -> None:
    """Run the built-in CT phantom through every stage (minutes on two cores): shows that the installation works.

    The workspace of the demo is ./diffseg_demo unless --workspace says otherwise.
    """
    from diffseg_nnunet.cli.console import ConsoleReporter
    from diffseg_nnunet.workspace import NNUNET_VARIABLES
    from diffseg_nnunet.workspace import Workspace as Location

    folder = (workspace or Path("diffseg_demo")).resolve()
    # a workspace of its own, whatever nnU-Net variables are exported: the demo must not touch anybody's data
    active = Location(*(folder / variable for variable in NNUNET_VARIABLES)).activate()
    from diffseg_nnunet.evaluation.tables import summary_table
    from diffseg_nnunet.pipeline.demo import demo as run_demo

    with ConsoleReporter().live() as reporter:
        result = run_demo(active, folder, reporter, device, seed, pretrain_iterations, iterations)
        reporter.info("\nheld-out cases, which no stage has seen:")
        reporter.console.print(summary_table(result.evaluation))
        reporter.info(f"report: {result.report}")
        reporter.info(f"picture: {result.picture}")
