"""Preprocessed cases on disk. A case is finished when its ``.pkl`` is there: it is published last."""

from __future__ import annotations

from pathlib import Path


def preprocessed_cases(folder: Path) -> tuple[str, ...]:
    """Identifiers of the finished cases of a preprocessed folder, sorted; none if there is no such folder."""
    return tuple(sorted(path.stem for path in folder.glob("*.pkl"))) if folder.is_dir() else ()
