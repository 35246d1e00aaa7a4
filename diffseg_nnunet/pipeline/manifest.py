"""The run manifest: what was run with which inputs, when, and whether it is finished.

One JSON file per data set, ``diffseg_run.json`` in its results. A stage is skipped if it finished with the same inputs,
continued if it was interrupted with the same inputs, and redone if its inputs changed.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
from filelock import FileLock, Timeout

from diffseg_nnunet.atomic import write_json
from diffseg_nnunet.errors import BadInputError

FILE_NAME = "diffseg_run.json"
_PACKAGES = (
    "diffseg_nnunet",
    "nnunetv2",
    "torch",
    "numpy",
    "monai",
    "batchgenerators",
    "batchgeneratorsv2",
    "SimpleITK",
)
_RSS_INTERVAL_S = 1.0
_held: set[str] = set()
"""Files of the locks of stages whose turn it is in this process."""


def signature(inputs: Mapping[str, Any]) -> str:
    """A digest of everything a stage's result depends on; JSON values only."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Of the packages that results depend on most."""
    return {package: version(package) for package in _PACKAGES}


@dataclass
class StageRun:
    """A stage that is running: what it notes in `outputs` is recorded when it finishes."""

    outputs: dict[str, Any]


class Manifest:
    """Reads and writes the manifest; several processes may work on different stages of one data set.

    Args:
        folder: the data set's folder in nnUNet_results.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE_NAME

    def read(self) -> dict[str, Any]:
        """The manifest's content.

        Raises:
            BadInputError: the file is no JSON (it was edited; it is never half-written).
        """
        if not self.path.is_file():
            return {"format": 1, "dataset": self.path.parent.name, "stages": {}}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInputError(f"{self.path} is not readable: {error}.", "Mend or remove it.") from error
        stages = content.get("stages") if isinstance(content, dict) else None
        if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
            raise BadInputError(f"{self.path} is no manifest of a run.", "Mend or remove it.")
        return content

    def stage(self, name: str) -> dict[str, Any]:
        """The record of a stage, empty if it never ran."""
        return self.read()["stages"].get(name, {})

    def is_finished(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """True if the stage finished with these inputs."""
        record = self.stage(name)
        return record.get("status") == "finished" and record.get("signature") == signature(inputs)

    @contextmanager
    def running(
        self,
        name: str,
        inputs: Mapping[str, Any],
        settings: Mapping[str, Any],
        discard: Callable[[], None] | None = None,
    ) -> Iterator[StageRun]:
        """Record a stage's start, end, duration and peak memory around the block; an exception leaves it unfinished.

        Args:
            inputs: what the result depends on.
            settings: for the reader of the manifest, and for `diffseg run` to go on with.
            discard: takes away what an earlier attempt with other inputs left. It runs before this attempt is
                recorded, so that one that is killed in between is never gone on with.
        """
        with self.turn(name):
            yield from self._recorded(name, inputs, settings, discard)

    @contextmanager
    def turn(self, name: str, tell: Callable[[str], None] | None = None) -> Iterator[None]:
        """The block is for this process alone: two would write the same folder.

        Jobs of single folds that are started together wait for each other, and find done what the first of them has
        done for all: the stage's state is to be asked for, and the stage run, within the block.

        Args:
            tell: told that there is somebody to wait for; None: nobody is waited for.

        Raises:
            BadInputError: another process works on the stage, and is not waited for.
        """
        lock = self._lock(name)
        if lock.lock_file in _held:
            yield
            return
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            at_work = f"is working on {name} of {self.path.parent.name}"
            if tell is None:
                raise BadInputError(f"Another process {at_work}.", "Wait for it, or end it.") from error
            tell(f"waiting for another process, which {at_work}")
            lock.acquire()
        _held.add(lock.lock_file)
        try:
            yield
        finally:
            _held.discard(lock.lock_file)
            lock.release()

    def _lock(self, name: str) -> FileLock:
        folder = self.path.parent / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name.replace('/', '_')}.lock")

    def _recorded(
        self,
        name: str,
        inputs: Mapping[str, Any],
        settings: Mapping[str, Any],
        discard: Callable[[], None] | None,
    ) -> Iterator[StageRun]:
        digest = signature(inputs)
        if discard is not None and self.stage(name).get("signature") != digest:
            discard()
        run = StageRun(outputs={})
        started = monotonic()
        record = {
            "status": "running",
            "signature": digest,
            "settings": dict(settings),
            "versions": versions(),
            "start": _now(),
        }
        self._put(name, record)
        with _PeakMemory() as memory:
            yield run
        self._put(
            name,
            {
                **record,
                "status": "finished",
                "end": _now(),
                "seconds": round(monotonic() - started, 1),
                "peak_rss_gib": round(memory.peak_gib, 2),
                "outputs": run.outputs,
            },
        )

    def adopt(self, other: Manifest, stages: tuple[str, ...]) -> None:
        """Take over another manifest's records of stages whose names begin so: what is done there is done here, too."""
        records = {name: record for name, record in other.read()["stages"].items() if name.startswith(stages)}
        self._update(lambda content: content["stages"].update(records))

    def last_run(self) -> dict[str, Any]:
        """The options the last `diffseg run` was given, empty if there was none."""
        return self.read().get("last_run", {})

    def remember_run(self, options: Mapping[str, Any]) -> None:
        """Keep the options of a `diffseg run` for the next one."""
        self._update(lambda content: content.update(last_run=dict(options)))

    def _put(self, name: str, record: dict[str, Any]) -> None:
        def change(content: dict[str, Any]) -> None:
            content["stages"][name] = record

        self._update(change)

    def _update(self, change: Callable[[dict[str, Any]], None]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            content = self.read()
            change(content)
            write_json(self.path, content)


class _PeakMemory:
    """Largest resident memory of this process and its children together, GiB, sampled by a thread."""

    def __init__(self) -> None:
        self.peak_gib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.peak_gib = max(self.peak_gib, _resident_bytes(process) / 2**30)
            if self._stop.wait(_RSS_INTERVAL_S):
                return


def _resident_bytes(process: psutil.Process) -> int:
    return sum(_own_share(each) for each in [process, *process.children(recursive=True)])


def _own_share(process: psutil.Process) -> int:
    """Resident memory with shared pages counted once: a forked worker shares nearly all of its pages."""
    try:
        return getattr(process.memory_full_info(), "pss", None) or process.memory_info().rss
    except psutil.Error:  # it has just ended
        return 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
