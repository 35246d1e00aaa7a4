"""What the user sees of a running stage."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from pathlib import Path

    from diffseg_nnunet.pipeline.project import Project


_WIDTH_OF_LOGS = 120


class ConsoleReporter:
    """Prints news as lines, and a progress bar where there is a terminal.

    Args:
        stream: where to; None: the standard output.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        # bound to the stream of now: nnU-Net's prints are redirected to a log while a stage runs
        stream = stream or sys.stdout
        self.console = Console(file=stream, soft_wrap=True, highlight=False, width=_width(stream))
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


def _width(stream: TextIO) -> int | None:
    """rich finds a terminal's width; in a file or a pipe it would squeeze tables into 80 columns."""
    return None if stream.isatty() or "COLUMNS" in os.environ else _WIDTH_OF_LOGS


@contextmanager
def news_to_standard_error(wanted: bool) -> Iterator[None]:
    """Within the block all that is printed goes to standard error if `wanted`, so that standard output holds the answer
    alone: also what processes started there print, which know of no sys.stdout but their own."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _processes() -> int:
    # training/processes.py says the same, but imports torch
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 1


def is_first() -> bool:
    """Whether this is the one process, or the first of those that torchrun started."""
    return _processes() == 1 or os.environ["RANK"] == "0"


@contextmanager
def open_project(
    workspace: Path | None, dataset: int | str, *, several: bool = False, news: TextIO | None = None
) -> Iterator[Project]:
    """The data set in its workspace, with nnU-Net's variables set and progress shown.

    Args:
        dataset: its id, or the name of its folder.
        several: whether the command may run in several processes; then the first one speaks.
        news: where news go; None: the standard output.

    Raises:
        BadInputError: torchrun started several, and the command is for one.
    """
    from diffseg_nnunet.errors import BadInputError
    from diffseg_nnunet.workspace import Workspace

    if not several and _processes() > 1:
        raise BadInputError(
            "Only `pretrain`, `train` and `refine` run in several processes.", "Run this command without torchrun."
        )
    location = Workspace.locate(workspace)
    location.dataset_name(dataset)  # a mistyped --workspace must not leave folders behind
    active = location.activate()
    from diffseg_nnunet.pipeline.project import Project

    if not is_first():
        yield Project.open(active, dataset)
        return
    with ConsoleReporter(news).live() as reporter:
        if (overruled := location.overruled(workspace)) is not None:
            reporter.warn(overruled)
        yield Project.open(active, dataset, reporter)
