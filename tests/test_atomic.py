"""Files and folders are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffseg_nnunet import atomic
from diffseg_nnunet.atomic import (
    TEMPORARY_PREFIX,
    disk_is_full,
    full_disk_named,
    new_folder,
    remove_leftovers,
    temporary_sibling,
    write_file,
    write_json,
    write_text,
)


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leftover(folder: Path, process: int, name: str) -> Path:
    own = temporary_sibling(folder / name)
    return own.with_name(own.name.replace(f"-{os.getpid()}-", f"-{process}-"))


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "file.txt"
    write_text(path, "first")

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the sec")
        assert path.read_text() == "first"
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_file(path, fail)
    assert path.read_text() == "first"
    write_json(path, {"ä": [1]})
    assert path.read_text(encoding="utf-8") == '{\n  "ä": [\n    1\n  ]\n}\n'
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_appears_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"

    def interrupted() -> None:
        with new_folder(target) as partial:
            (partial / "file").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as partial:
        (partial / "file").touch()
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["file"]
    with pytest.raises(FileExistsError), new_folder(target):
        pass


def test_what_killed_processes_left_is_removed(tmp_path: Path, dead: int) -> None:
    same, other = leftover(tmp_path, dead, "file.txt"), leftover(tmp_path, dead, "other.txt")
    living = leftover(tmp_path, os.getppid(), "file.txt")
    for path in (same, other, living):
        path.write_text("half")
    write_text(tmp_path / "file.txt", "whole")
    assert not same.exists()
    assert other.exists()
    assert living.exists()
    folder = leftover(tmp_path, dead, "folder")
    folder.mkdir()
    (folder / "file").touch()
    with new_folder(tmp_path / "folder"):
        assert not folder.exists()
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([living, tmp_path / "file.txt", tmp_path / "folder"])
    remove_leftovers(tmp_path / "missing")


def test_what_other_machines_are_writing_stays_for_a_day(
    tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their processes' numbers say nothing here."""
    file, folder = (tmp_path / f"{TEMPORARY_PREFIX}0123abcd-{dead}-{name}" for name in ("file.txt", "folder"))
    file.write_text("half")
    folder.mkdir()
    (folder / "case").write_text("half")
    write_text(tmp_path / "file.txt", "whole")
    remove_leftovers(tmp_path)
    assert file.exists()
    os.utime(file, (1, 1))  # as if copied, with its times
    remove_leftovers(tmp_path)
    assert file.exists()
    assert folder.exists()
    monkeypatch.setattr(atomic, "_ABANDONED_S", -1)
    remove_leftovers(tmp_path)
    assert not file.exists()
    assert not folder.exists()


def test_names_that_only_look_like_leftovers_stay(tmp_path: Path, dead: int) -> None:
    own = leftover(tmp_path, dead, "file").name
    names = [".partial-", ".partial-x-file", f".partial-{dead}-file", own.removeprefix("."), own.removesuffix("-file")]
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_temporary_file_keeps_its_ending(tmp_path: Path) -> None:
    sibling = temporary_sibling(tmp_path / "scan.nii.gz")
    assert sibling.parent == tmp_path
    assert sibling.name.startswith(".")
    assert sibling.name.endswith("scan.nii.gz")


def test_only_a_full_disk_is_called_full(tmp_path: Path) -> None:
    assert not disk_is_full(tmp_path)
    with pytest.raises(ValueError, match="something else"), full_disk_named(tmp_path / "file"):
        raise ValueError("something else")
    with pytest.raises(OSError, match="file") as raised, full_disk_named(tmp_path / "file"):
        raise OSError(errno.EDQUOT, "quota")
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
