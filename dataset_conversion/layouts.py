"""Public layouts as patterns of paths, and the search for them in a folder.

A pattern is a path relative to the root of the download, without its ending, in which ``{case}`` stands for what tells
the cases apart: ``RawData/Training/img/img{case}``, ``{case}/imaging``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import VOLUME_ENDINGS

from .description import Role

CASE = "{case}"
SEARCHED_LEVELS = 2


@dataclass(frozen=True)
class Part:
    """Images of one role, and their labels.

    Attributes:
        role: what the cases are for.
        images: one pattern a channel.
        labels: pattern of the labels; None where there are none.
        identifier: name of a case, made of what `{case}` stood for.
        optional: the layout is recognised without this part.
        expected: how many cases a whole download has; None: unknown.
    """

    role: Role
    images: tuple[str, ...]
    labels: str | None = None
    identifier: str = CASE
    optional: bool = False
    expected: int | None = None


@dataclass(frozen=True)
class Layout:
    """One of the forms in which a data set is handed around.

    Attributes:
        name: for messages.
        parts: what it consists of.
        case: regular expression of what `{case}` stands for.
        endings: of the files.
    """

    name: str
    parts: tuple[Part, ...]
    case: str = r"[^/]+?"
    endings: tuple[str, ...] = VOLUME_ENDINGS


@dataclass(frozen=True)
class FoundPart:
    """What a part's patterns matched.

    Attributes:
        part: the part.
        images: what `{case}` stood for -> one file a channel, None where a channel is missing.
        labels: the same -> label.
    """

    part: Part
    images: dict[str, tuple[Path | None, ...]]
    labels: dict[str, Path]


@dataclass(frozen=True)
class Found:
    """A layout that was recognised under a root."""

    layout: Layout
    root: Path
    parts: tuple[FoundPart, ...]

    @property
    def count(self) -> int:
        """Images and labels that fit."""
        return sum(len(found.images) + len(found.labels) for found in self.parts)


def match(pattern: str, root: Path, layout: Layout) -> dict[str, Path]:
    """What `{case}` stands for -> file, sorted. Hidden files and folders (macOS's ``._*``) are ignored.

    A level of the path without ``{case}`` is looked up, not listed.

    Raises:
        BadInputError: two files differ by their ending only.
    """
    expression = re.escape(pattern).replace(re.escape(CASE), f"(?P<case>{layout.case})", 1)
    expression = expression.replace(re.escape(CASE), "(?P=case)")
    whole = re.compile(f"{expression}(?:{'|'.join(re.escape(ending) for ending in layout.endings)})")
    found: dict[str, Path] = {}
    for path in _walk(root, pattern.split("/")):
        fits = whole.fullmatch(path.relative_to(root).as_posix())
        if fits:
            case = fits["case"] if CASE in pattern else ""
            if case in found:
                raise BadInputError(f"{found[case]} and {path.name} are one case twice.", "Remove one of them.")
            found[case] = path
    return dict(sorted(found.items()))


def _walk(folder: Path, levels: list[str]) -> Iterator[Path]:
    """Files whose path has as many levels as the pattern, with its fixed levels in place."""
    if not folder.is_dir():
        return
    first, rest = levels[0], levels[1:]
    if rest and CASE not in first:
        yield from _walk(folder / first, rest)
        return
    # a folder that may not be listed is an error: its cases must not vanish silently
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if rest:
            yield from _walk(Path(entry.path), rest)
        elif not _is_folder(entry):
            yield Path(entry.path)


def _is_folder(entry: os.DirEntry) -> bool:
    """False for links that lead nowhere or in a circle: they are somebody's data that has not arrived."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def find(source: Path, layouts: tuple[Layout, ...]) -> Found | None:
    """The layout that fits best at `source`, else a little below, else a little above; None where none fits.

    A layout fits where every part that is not optional has an image. Of several, the one with the most files is taken.

    Raises:
        BadInputError: one file is there twice.
        PermissionError: the source, or a folder in it where images may lie, may not be listed.
    """
    for root in _roots(source):
        try:
            found = [candidate for layout in layouts if (candidate := look(root, layout)) is not None]
        except PermissionError:
            # above the source, folders of others are nobody's business
            if root == source or source in root.parents:
                raise
            continue
        if found:
            return max(found, key=lambda candidate: candidate.count)
    return None


def look(root: Path, layout: Layout) -> Found | None:
    """The layout under this very root, or None."""
    parts = []
    for part in layout.parts:
        channels = [match(pattern, root, layout) for pattern in part.images]
        cases = sorted({case for channel in channels for case in channel})
        if not cases and not part.optional:
            return None
        images = {case: tuple(channel.get(case) for channel in channels) for case in cases}
        labels = match(part.labels, root, layout) if part.labels is not None else {}
        parts.append(FoundPart(part, images, labels))
    return Found(layout, root, tuple(parts)) if any(found.images for found in parts) else None


def _roots(source: Path) -> Iterator[Path]:
    """The source, its visible subfolders level by level, and its parents. Links to folders are not followed down."""
    yield source
    level = [source]
    for _ in range(SEARCHED_LEVELS):
        level = [folder for parent in level for folder in _folders(parent)]
        yield from level
    yield from list(source.resolve().parents)[:SEARCHED_LEVELS]


def _folders(folder: Path) -> list[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return []
    return [
        Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
    ]
