"""The command line as its users run it: in a process of its own, in a folder of its own, without inherited settings.
And what pytest's processes share: the order of the files, the cores, and folders that are made once."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from .process_state import OURS

MadeOnce = Callable[[str, Callable[[Path], None]], Path]
_RESULTS = "results of all lines: "
_LONGEST = ("pipeline", "trainers", "planners")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The folders whose files take longest come first: short ones at the end let the processes end together."""

    def rank(item: pytest.Item) -> int:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return _LONGEST.index(folder) if folder in _LONGEST else len(_LONGEST)

    items.sort(key=rank)


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str

    def ok(self) -> Finished:
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self

    def refused(self, *words: object) -> Finished:
        """It ended as on wrong usage or data: exit code 2, no traceback, and a message that holds all of `words`."""
        assert self.code == 2, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.out + self.err
        for word in words:
            assert str(word) in self.err, f"{word!r} is not in:\n{self.err}"
        return self


def _own_cores() -> list[int | None]:
    """This process's share of the cores: were all open to each of pytest-xdist's workers, commands of two of them would
    often meet on one core, while another has nothing to do."""
    if not hasattr(os, "sched_getaffinity"):
        return [None]
    cores = sorted(os.sched_getaffinity(0))
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return cores[number % len(cores) :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))]


def _prepare(core: int | None) -> None:
    """In the child: its core, and Ctrl-C as a terminal would have it; a test run in the background ignores it."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Started:
    """A command that runs, as leader of its own process group, on one core.

    Stages take the cores they find, and the tests' tiny networks on several threads would mostly wait for each other.
    """

    _cores = itertools.cycle(_own_cores())

    def __init__(self, command: Sequence[object], cwd: Path, environment: dict[str, str]):
        core = next(self._cores)
        self.process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: _prepare(core),
        )

    def wait(self, given: str | None = None, timeout_s: float = 600) -> Finished:
        """Let it end; `given` is what it reads from its standard input."""
        try:
            out, err = self.process.communicate(given, timeout=timeout_s)
        except BaseException:
            self.kill()
            raise
        return Finished(self.process.returncode, out, err)

    def kill(self) -> None:
        """End the whole process group at once, as a power cut would."""
        try:
            os.killpg(self.process.pid, 9)
        except ProcessLookupError:
            return
        self.process.wait()


class CommandLine:
    """Runs commands in `folder`; ``./diffseg_workspace`` there is the default workspace."""

    def __init__(self, folder: Path):
        self.folder = folder

    def start(self, *arguments: object, **variables: object) -> Started:
        """``diffseg arguments``, with further environment variables."""
        return self.start_other(sys.executable, "-m", "diffseg_nnunet", *arguments, **variables)

    def start_other(self, *command: object, **variables: object) -> Started:
        """Any other command."""
        return Started(command, self.folder, clean_environment() | {name: str(v) for name, v in variables.items()})

    def in_one_process(self, lines: Sequence[Sequence[object]]) -> list[Finished]:
        """Several command lines of one workspace, one after the other in one process: nnU-Net is imported once."""
        code = f"""
import contextlib, io, json, sys
from diffseg_nnunet.cli.app import run
results = []
for line in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(line)
    results.append([code, out.getvalue(), err.getvalue()])
print("{_RESULTS}" + json.dumps(results))
"""
        arguments = json.dumps([[str(argument) for argument in line] for line in lines])
        finished = self.start_other(sys.executable, "-c", code).wait(arguments).ok()
        return [Finished(*result) for result in json.loads(finished.out.split(_RESULTS)[1])]

    def __call__(self, *arguments: object, **variables: object) -> Finished:
        return self.start(*arguments, **variables).wait()


def clean_environment() -> dict[str, str]:
    """This process's, without nnU-Net's and our variables, without a terminal's width, and without a GPU."""
    dropped = (*OURS, "COLUMNS", "LINES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def command_line() -> Callable[[Path], CommandLine]:
    """The command line in a given folder."""
    return CommandLine


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> MadeOnce:
    """(name, make) -> a copy of the folder that `make` fills, which it does once a test run: of pytest-xdist's workers
    the first that asks makes it, and the others wait. Times of modification are kept, so that nothing seems changed."""
    run = tmp_path_factory.getbasetemp()
    if worker_id != "master":  # a worker's folder lies in the run's
        run = run.parent

    def copy(name: str, make: Callable[[Path], None]) -> Path:
        folder, made = run / f"once_{name}", run / f"once_{name}.made"
        with FileLock(run / f"once_{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                make(folder)
                made.touch()
        return Path(shutil.copytree(folder, tmp_path_factory.mktemp(name), dirs_exist_ok=True))

    return copy


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch, in this process; folders of tests on tiny tensors use it for all of them."""
    from diffseg_nnunet.training.threads import single_threaded

    with single_threaded():
        yield


@pytest.fixture
def diffseg(tmp_path: Path) -> CommandLine:
    """The command line in an empty folder."""
    return CommandLine(tmp_path)
