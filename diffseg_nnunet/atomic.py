"""Files and folders that are written whole or not at all: temporary name, flush to disk, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".partial-"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

_LEFTOVER = re.compile(re.escape(TEMPORARY_PREFIX) + r"([0-9a-f]{8})-(\d+)-(.+)")
_ABANDONED_S = 24 * 3600
"""Untouched for so long, what a process of another machine was writing is taken for left behind."""
_PROBE_BYTES = 2**20


def flush_to_disk(path: Path) -> None:
    """Return when the bytes of a file are on the disk, so that a power cut cannot take them."""
    descriptor = os.open(path, os.O_RDWR)  # Windows flushes only what is open for writing
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_sibling(path: Path) -> Path:
    """A hidden name beside `path`, on the same file system, with the same ending (writers choose a format by it)."""
    return path.with_name(f"{TEMPORARY_PREFIX}{_machine()}-{os.getpid()}-{path.name}")


@cache
def _machine() -> str:
    """Tells machines, and containers of one machine, apart: within each a number is that of one process."""
    try:
        numbering = os.readlink("/proc/self/ns/pid")
    except OSError:  # only Linux numbers the processes of containers by themselves
        numbering = ""
    return hashlib.sha256(f"{socket.gethostname()} {numbering}".encode()).hexdigest()[:8]


def remove_leftovers(folder: Path, target: str | None = None) -> None:
    """Remove what killed processes left unfinished in `folder`: of one target's name, or of all.

    What belongs to a living process of this machine stays, and what one of another machine may still be writing: the
    nodes of a cluster share folders.
    """
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or target not in (None, match[3]) or not _is_abandoned(path, match[1], int(match[2])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_abandoned(path: Path, machine: str, process: int) -> bool:
    from psutil import pid_exists

    if machine == _machine():
        return not pid_exists(process)
    try:
        # a copy has the time of modification of what it is made from, but was itself changed when it was made
        touched = max(max(each.stat().st_mtime, each.stat().st_ctime) for each in (path, *path.rglob("*")))
    except FileNotFoundError:  # at this moment it is being written
        return False
    return time.time() - touched > _ABANDONED_S


def disk_is_full(folder: Path) -> bool:
    """True if not one MiB can be written to `folder`; quotas count, which asking for the free space overlooks."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return error.errno in DISK_FULL
    return False


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Where the block fails to write `path` for want of space, raise the OSError that says so.

    torch raises a RuntimeError then, SimpleITK none or one of its own, and Python's OSError lacks the file's name.
    """
    try:
        yield
    except Exception as error:
        known = isinstance(error, OSError) and error.errno in DISK_FULL
        if known or (path.parent.is_dir() and disk_is_full(path.parent)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def write_file(path: Path | str, write: Callable[[Path], Any]) -> None:
    """Publish `path` by one rename after `write(temporary_path)` has succeeded and its bytes are on the disk.

    Whatever `write` raises is raised on, a full disk as an OSError (ENOSPC), and nothing is left behind; what a killed
    process left of the same file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    temporary = temporary_sibling(path)
    try:
        with full_disk_named(path):
            write(temporary)
            flush_to_disk(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path | str, content: Any) -> None:
    """Write a JSON file atomically; numpy scalars must have been converted by the caller."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` if the block succeeds, and vanishes if it does not.

    What a killed process left of the same folder is removed.

    Raises:
        FileExistsError: `path` exists already; it is never overwritten.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    temporary = temporary_sibling(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
