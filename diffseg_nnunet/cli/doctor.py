"""``diffseg doctor``."""

from __future__ import annotations

import typer

from diffseg_nnunet.cli.arguments import Workspace


def doctor(workspace: Workspace = None) -> None:
    """Check this machine and say what to mend: python, torch and CUDA, memory, cores, disk, nnU-Net's variables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from diffseg_nnunet.errors import EXIT_BAD_INPUT
    from diffseg_nnunet.pipeline.doctor import run_checks
    from diffseg_nnunet.workspace import Workspace as Location

    checks = run_checks(Location.locate(workspace), workspace)
    table = Table("check", "", title="diffseg doctor", show_lines=True)
    table.add_column("finding", overflow="fold")
    table.add_column("to mend", overflow="fold")
    colour = {"ok": "green", "warning": "yellow", "problem": "red"}
    for check in checks:
        status = f"[{colour[check.status]}]{check.status}[/]"
        table.add_row(check.name, status, escape(check.finding), escape(check.mend or ""))
    Console().print(table)
    if any(check.status == "problem" for check in checks):
        raise typer.Exit(EXIT_BAD_INPUT)
