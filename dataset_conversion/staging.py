"""The folder in which a conversion grows until it is published: locked, kept when killed, gone on with, or discarded.

Beside the data set, ``.converting-Dataset005/data`` holds the files so far and ``journal.jsonl`` one line a finished
case. The journal's first line is a digest of the plan, the settings and the sources: of anything else, nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from filelock import FileLock, Timeout

from diffseg_nnunet import __version__
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.verification import CaseRecord, Finding

from .description import ConversionPlan
from .writer import Handling, Written

PREFIX = ".converting-"
_DATASET_ID = slice(0, len("Dataset000"))


class Staging:
    """A data set that is being written.

    Attributes:
        data: the folder that will be published.
        finished: case identifier -> what became of it, in this run or in an earlier one that was killed.
    """

    def __init__(self, folder: Path, signature: str):
        self.folder, self.data = folder, folder / "data"
        self._journal = folder / "journal.jsonl"
        self._writing = threading.Lock()
        self.finished = self._read(signature)
        if self.finished is None:
            shutil.rmtree(folder, ignore_errors=True)
            self.data.mkdir(parents=True)
            self._append({"signature": signature})
            self.finished = {}

    def record(self, written: Written) -> None:
        """Note that a case is finished; safe in threads."""
        sizes = {path: (self.data / path).stat().st_size for path in written.files}
        with self._writing:
            # a dictionary with numbers as keys would come back from JSON with texts: records know how they are stored
            record = written.record.to_json() if written.record is not None else None
            self._append({**asdict(written), "record": record, "sizes": sizes})
            self.finished[written.case] = written

    def _append(self, entry: dict) -> None:
        with self._journal.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")

    def _read(self, signature: str) -> dict[str, Written] | None:
        """The finished cases of an earlier run of the same conversion; None where there was none."""
        try:
            first, *lines = self._journal.read_text(encoding="utf-8").splitlines()
            if json.loads(first) != {"signature": signature} or not self.data.is_dir():
                return None
        except (OSError, ValueError):
            return None
        finished = {}
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # the run was killed while it wrote this line
                break
            # after a power cut, a file may have lost its bytes
            if all(_size(self.data / path) == size for path, size in entry["sizes"].items()):
                findings = tuple(Finding(**finding) for finding in entry["findings"])
                record = CaseRecord.from_json(entry["record"]) if entry["record"] is not None else None
                finished[entry["case"]] = Written(entry["case"], findings, entry["files"], record)
        # what follows must not be glued to half a line
        text = self._journal.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            self._journal.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
        return finished

    def publish(self, target: Path) -> None:
        """Make the data the data set, by one rename.

        Raises:
            OSError: `target` exists.
        """
        os.rename(self.data, target)


@contextmanager
def exclusive(target: Path) -> Iterator[Path]:
    """Hold the only right to convert into the id of `target`; yields where to stage it.

    Raises:
        BadInputError: another process holds it.
    """
    folder = target.with_name(PREFIX + target.name[_DATASET_ID])
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BadInputError(
            f"Another process is converting a data set into {target.parent}, with the same id.",
            "Wait for it or end it, or choose another id with --id.",
        ) from error
    try:
        yield folder
    finally:
        # while it is held: nobody else can hold it then, and filelock does not accept a lock on a removed file
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def staging(folder: Path, signature: str) -> Iterator[Staging]:
    """Go on with what a killed run of the same conversion left in `folder`, else begin anew.

    When the block ends or fails, the folder is removed; when it is killed or interrupted, it stays.
    """
    try:
        yield Staging(folder, signature)
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def signature_of(plan: ConversionPlan, handling: Handling) -> str:
    """A digest of all that decides what is written: plan, settings, version, and the sources' sizes and times."""
    digest = hashlib.sha256(repr((__version__, handling, replace(plan, cases=()))).encode())
    for case in plan.cases:
        digest.update(repr(case).encode())
        for path in case.files:
            status = path.stat() if path.exists() else None
            digest.update(repr((status.st_size, status.st_mtime_ns) if status else None).encode())
    return digest.hexdigest()


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
