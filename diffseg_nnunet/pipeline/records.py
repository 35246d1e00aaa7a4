"""What a folder of predictions says about itself, by which finished cases are left alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffseg_nnunet.raw_dataset import Case


def image_stamps(cases: Sequence[Case]) -> dict[str, list[Any]]:
    """For each case its images by name, size and time of modification."""
    return {case.identifier: [_stamp(path) for path in case.images] for case in cases}


def read_record(path: Path) -> dict[str, Any]:
    """The record of an earlier prediction; empty where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _stamp(path: Path) -> list[Any]:
    status = path.stat() if path.exists() else None
    return [path.name] if status is None else [path.name, status.st_size, status.st_mtime_ns]
