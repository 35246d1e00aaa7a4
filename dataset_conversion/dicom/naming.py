"""Case identifiers: safe as file names, unique, and made of nothing but what the user chose."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from .index import Series

IDENTIFIERS = ("patient", "folder", "uid")


def identifiers(series: Iterable[tuple[Series, str]], kind: str, root: Path) -> list[str]:
    """One name a stack.

    Args:
        series: (series, what tells its stacks apart or ''), in a fixed order.
        kind: 'patient': PatientID, StudyDate and SeriesNumber; 'folder': the path of its folder below `root`; 'uid':
            its SeriesInstanceUID.
        root: of the tree.
    """
    names: list[str] = []
    taken: set[str] = set()
    for each, suffix in series:
        stem = safe("_".join(part for part in (*_parts(each, kind, root), suffix) if part)) or "case"
        # a file system may not tell upper from lower case
        name, number = stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def safe(text: str) -> str:
    """Letters, digits, ``_ . + -`` only, none of the last three in front, no ``_seg`` at the end."""
    cleaned = re.sub(r"[^A-Za-z0-9_.+-]+", "_", text).strip("_.+-")
    return re.sub(r"_seg$", "_segm", cleaned)


def _parts(series: Series, kind: str, root: Path) -> tuple[str, ...]:
    first = series.first
    if kind == "uid":
        return (first.series,)
    if kind == "folder":
        return series.folder.relative_to(root).parts or (root.name,)
    return (first.patient or "anonymous", first.study_date, first.series_number)
