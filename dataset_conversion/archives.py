"""Unpacks a download: zip and tar, whole or not at all, and never anything outside the folder it goes into."""

from __future__ import annotations

import shutil
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from diffseg_nnunet.atomic import DISK_FULL, new_folder
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.verification import Progress

ENDINGS = (".tar.gz", ".tar.bz2", ".tar.xz", ".tgz", ".tar", ".zip")
# to be unpacked by hand
FOREIGN_ENDINGS = (".7z", ".rar")
_CHUNK_BYTES = 2**20
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, OSError, RuntimeError, NotImplementedError)


@dataclass(frozen=True)
class Member:
    """An entry of an archive.

    Attributes:
        name: as the archive has it.
        kind: 'file', 'folder', or what else it is (a link, a device, ...), which is refused.
        size: bytes, unpacked.
        raw: the library's own entry.
    """

    name: str
    kind: str
    size: int
    raw: zipfile.ZipInfo | tarfile.TarInfo

    @property
    def is_rubbish(self) -> bool:
        """What macOS adds to archives."""
        return self.name.startswith("__MACOSX/") or PurePosixPath(self.name).name.startswith("._")


def is_archive(path: Path) -> bool:
    """Whether it is a file that `extract` unpacks, by its name."""
    return path.name.lower().endswith(ENDINGS) and path.is_file()


def archives_in(folder: Path) -> list[Path]:
    """Archives of any kind in a folder and its subfolders, sorted; hidden ones are left out."""
    found = [path for pattern in ("*", "*/*") for path in folder.glob(pattern)] if folder.is_dir() else []
    known = (*ENDINGS, *FOREIGN_ENDINGS)
    return sorted(path for path in found if path.name.lower().endswith(known) and not path.name.startswith("."))


def extracted_folder(archive: Path) -> Path:
    """Where `extract` puts the content: beside the archive, under its name without the ending."""
    ending = next(ending for ending in ENDINGS if archive.name.lower().endswith(ending))
    return archive.with_name(archive.name[: -len(ending)] or "extracted")


def unpacked_bytes(archive: Path) -> int:
    """What its members take, unpacked.

    Raises:
        BadInputError: see `extract`.
    """
    with _opened(archive) as opened:
        return sum(member.size for member in _checked(archive, opened))


def extract(archive: Path, progress: Progress | None = None) -> Path:
    """Unpack an archive beside itself.

    Every member is looked at before the first one is written. Owners, modes and times are not taken over.

    Args:
        archive: see `is_archive`.
        progress: called with (members done, members in all).

    Returns:
        The new folder; where that holds a single folder and nothing else, the latter.

    Raises:
        BadInputError: the new folder exists and holds something else; the archive is damaged or encrypted; a member is
            absolute, leads out of the folder, or is a link or a device; or there is too little space. Nothing is left
            behind.
    """
    target = extracted_folder(archive)
    with _opened(archive) as opened:
        members = _checked(archive, opened)
        if target.exists():
            _refuse_other(archive, target, members)
            return _single_folder(target)
        _refuse_full_disk(archive, sum(member.size for member in members))
        with new_folder(target) as folder:
            for done, member in enumerate(members, start=1):
                path = folder / _relative(archive, member)
                if member.kind == "folder":
                    path.mkdir(parents=True, exist_ok=True)
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                with _stream(archive, opened, member) as stream, path.open("xb") as file:
                    shutil.copyfileobj(stream, file, _CHUNK_BYTES)
                if progress is not None:
                    progress(done, len(members))
    return _single_folder(target)


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    """The archive; errors of the libraries become the user's."""
    try:
        zipped = archive.name.lower().endswith(".zip")
        with zipfile.ZipFile(archive) if zipped else tarfile.open(archive) as opened:
            yield opened
    except FileExistsError as error:
        message = f"{archive} cannot be unpacked: it holds {error.filename} twice."
        raise BadInputError(message, "Extract it by hand.") from error
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise BadInputError(
            f"{archive} cannot be unpacked: {reason}.", "Download it again, or extract it by hand."
        ) from error


def _checked(archive: Path, opened: zipfile.ZipFile | tarfile.TarFile) -> list[Member]:
    """The members that are to be written."""
    members = [member for member in _members(opened) if not member.is_rubbish]
    for member in members:
        _relative(archive, member)
        if member.kind not in ("file", "folder"):
            raise BadInputError(
                f"{archive} holds {member.name!r}, which is a {member.kind}: it is not unpacked.",
                "Extract it by hand if you trust it, then convert the folder.",
            )
    _refuse_clashes(archive, [_relative(archive, member) for member in members if member.kind == "file"])
    return members


def _refuse_clashes(archive: Path, files: list[PurePosixPath]) -> None:
    """Raises BadInputError where there is no file, one is there twice, or one would lie within another."""
    if not files:
        raise BadInputError(f"{archive} holds no file.", "Download it again.")
    once = set(files)
    twice = sorted(path for path, times in Counter(files).items() if times > 1)
    if clash := twice or sorted({parent for path in once for parent in path.parents} & once):
        message = f"{archive} cannot be unpacked: it holds {str(clash[0])!r} twice."
        raise BadInputError(message, "Extract it by hand.")


def _members(opened: zipfile.ZipFile | tarfile.TarFile) -> Iterator[Member]:
    if isinstance(opened, zipfile.ZipFile):
        for entry in opened.infolist():
            kind = stat.S_IFMT(entry.external_attr >> 16)
            special = kind not in (0, stat.S_IFREG, stat.S_IFDIR)
            named = "link" if stat.S_ISLNK(kind) else "special file"
            plain = "folder" if entry.is_dir() else "encrypted file" if entry.flag_bits & 1 else "file"
            yield Member(entry.filename, named if special else plain, entry.file_size, entry)
        return
    for entry in opened.getmembers():
        linked = "link" if entry.issym() or entry.islnk() else "special file"
        kind = "file" if entry.isreg() else "folder" if entry.isdir() else linked
        yield Member(entry.name, kind, entry.size, entry)


def _relative(archive: Path, member: Member) -> PurePosixPath:
    """The member's path, which stays within the folder.

    Raises:
        BadInputError: it does not.
    """
    # what is a path on Windows only is refused as well: it cannot be meant
    path = PurePosixPath(member.name.replace("\\", "/"))
    leaves = path.is_absolute() or ".." in path.parts or PureWindowsPath(member.name).drive or "\0" in member.name
    if leaves:
        raise BadInputError(
            f"{archive} holds {member.name!r}, which leads out of the folder it is unpacked into.",
            "Do not trust this archive; download it from its publishers.",
        )
    return path


def _stream(archive: Path, opened: zipfile.ZipFile | tarfile.TarFile, member: Member) -> IO[bytes]:
    stream = opened.open(member.raw) if isinstance(opened, zipfile.ZipFile) else opened.extractfile(member.raw)
    if stream is None:
        raise BadInputError(f"{archive}: {member.name!r} has no content.", "Download it again.")
    return stream


def _refuse_full_disk(archive: Path, size: int) -> None:
    free = shutil.disk_usage(archive.resolve().parent).free
    if size > free:
        raise BadInputError(
            f"{archive} takes {gib(size)} unpacked, {gib(free)} are free there.", "Free some space, or move it."
        )


def _refuse_other(archive: Path, folder: Path, members: list[Member]) -> None:
    """An earlier run may have unpacked the archive: a folder that lacks none of its files is taken as it is."""
    files = [(folder / _relative(archive, member), member.size) for member in members if member.kind == "file"]
    if not all(path.is_file() and path.stat().st_size == size for path, size in files):
        raise BadInputError(
            f"{folder} exists already, and is not what {archive.name} holds.",
            "Convert that folder, or rename it and extract again.",
        )


def _single_folder(folder: Path) -> Path:
    """The innermost folder that is all there is."""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    if len(entries) == 1 and entries[0].is_dir():
        return _single_folder(entries[0])
    return folder


def gib(size: int) -> str:
    """``"1.23 GiB"``."""
    return f"{size / 1024**3:,.2f} GiB"
