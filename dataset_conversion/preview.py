"""What a conversion would do, told without reading a voxel and without writing anything."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from diffseg_nnunet.workspace import Workspace, dataset_folder_name

from .core import needed_bytes, refuse_bad_plan, refuse_taken_id
from .description import ConversionPlan
from .writer import IMAGE_FOLDERS, is_identity, is_linkable


@dataclass(frozen=True)
class Preview:
    """What would be written.

    Attributes:
        folder: the data set.
        cases: how many cases each role has.
        files: how many files would be 'linked', 'copied' or 'encoded'; labels that are renumbered count as encoded,
            although those that hold none of the values that change would be linked.
        needed: bytes that would be written, estimated by the sources' sizes.
    """

    folder: Path
    cases: dict[str, int]
    files: dict[str, int]
    needed: int


def preview(plan: ConversionPlan, *, dataset_id: int, workspace: Workspace, copy: bool) -> Preview:
    """Look at the names alone.

    Raises:
        BadInputError: the id or the name is taken, or the names of cases cannot be used.
    """
    folder = workspace.raw / dataset_folder_name(dataset_id, plan.name)
    refuse_taken_id(dataset_id, folder.name, workspace)
    refuse_bad_plan(plan)
    kept = "copied" if copy or not _same_device(plan, workspace.raw) else "linked"
    files: Counter[str] = Counter()
    for case in plan.cases:
        for source in case.sources:
            renumbered = source is case.label and not is_identity(plan.values(case))
            files[kept if is_linkable(source) and not renumbered else "encoded"] += 1
    counts = Counter(case.role for case in plan.cases)
    needed = needed_bytes(plan, plan.cases, linkable=kept == "linked")
    return Preview(folder, {role: counts[role] for role in IMAGE_FOLDERS}, dict(files), needed)


def _same_device(plan: ConversionPlan, raw: Path) -> bool:
    """Whether hard links are to be expected; only trying would tell for sure."""
    source = next((path for case in plan.cases for path in case.files if path.exists()), None)
    existing = next(folder for folder in (raw.absolute(), *raw.absolute().parents) if folder.is_dir())
    return source is not None and os.stat(source).st_dev == os.stat(existing).st_dev
