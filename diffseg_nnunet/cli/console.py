"""What the user sees of a running stage."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from pathlib import Path

    from diffseg_nnunet.pipeline.project import Project


_WIDTH_OF_LOGS = 120


class ConsoleReporter:
    """Prints news as lines, and a progress bar where there is a terminal."""

    def __init__(self) -> None:
        # bound to the stream of now: nnU-Net's prints are redirected to a log while a stage runs
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False, width=_width())
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._tasks: dict[str, int] = {}

    def info(self, text: str) -> None:
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.console.print(f"Warning: {text}", style="yellow", markup=False)

    def progress(self, stage: str, done: int, total: int, news: str = "") -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total)
            self.console.print(f"{stage} …", style="bold", markup=False)
        self._bar.update(self._tasks[stage], completed=done, total=total)
        if news:
            self.console.print(f"  {news}", markup=False)
        if done >= total:
            self._bar.update(self._tasks[stage], visible=False)

    @contextmanager
    def live(self) -> Iterator[ConsoleReporter]:
        """Show the bar within the block."""
        with self._bar:
            yield self


def _width() -> int | None:
    """rich finds a terminal's width; in a file or a pipe it would squeeze tables into 80 columns."""
    return None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDTH_OF_LOGS


@contextmanager
def open_project(workspace: Path | None, dataset_id: int) -> Iterator[Project]:
    """The data set in its workspace, with nnU-Net's variables set and progress shown."""
    from diffseg_nnunet.workspace import Workspace

    location = Workspace.locate(workspace)
    location.dataset_name(dataset_id)  # a mistyped --workspace must not leave folders behind
    active = location.activate()
    from diffseg_nnunet.pipeline.project import Project

    with ConsoleReporter().live() as reporter:
        yield Project.open(active, dataset_id, reporter)
