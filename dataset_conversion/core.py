"""The one engine that writes a data set from its description: whole and checked, or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffseg_nnunet.atomic import new_folder, write_json
from diffseg_nnunet.errors import BadInputError, DiffSegError
from diffseg_nnunet.raw_dataset import DATASET_JSON, why_unusable
from diffseg_nnunet.verification import Finding, Progress, in_threads, listed
from diffseg_nnunet.workspace import Workspace, dataset_folder_name

from .description import ConversionPlan, SourceCase
from .sources import VolumeFile
from .writer import DISK_FULL, FILE_ENDING, IMAGE_FOLDERS, CaseWriter, link

SHOWN_FINDINGS = 10


@dataclass(frozen=True)
class ConversionReport:
    """What has been written.

    Attributes:
        folder: the new data set.
        cases: how many cases each role has.
        files: how many files were 'linked', 'copied' or 'encoded' (re-encoded, or split from 4D).
        warnings: findings that did not stop the conversion.
        notes: the plan's.
    """

    folder: Path
    cases: dict[str, int]
    files: dict[str, int]
    warnings: tuple[Finding, ...]
    notes: tuple[str, ...]


def convert(
    plan: ConversionPlan,
    *,
    dataset_id: int,
    workspace: Workspace,
    copy: bool = False,
    workers: int,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write the data set into a temporary folder, check every case, and publish it by one rename.

    Volumes that need no change are hard-linked where the file system allows it, else copied.

    Args:
        plan: what to write.
        dataset_id: 1..999, free.
        workspace: its `raw` receives the data set.
        copy: never link, so that the data set is independent of its source.
        workers: threads.
        progress: called with (cases done, cases in all) after each case.

    Raises:
        BadInputError: the name or id cannot be used, the source is wrong (the message lists what was found), or the
            disk is full; nothing is left behind.
    """
    target = workspace.raw / dataset_folder_name(dataset_id, plan.name)
    _refuse_taken_id(dataset_id, target.name, workspace)
    _refuse_bad_plan(plan)
    needed = 0
    try:
        with new_folder(target) as folder:
            needed = _needed_bytes(plan, linkable=not copy and _can_link(plan, folder))
            if needed > shutil.disk_usage(folder).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            writer = CaseWriter(plan, folder, copy)
            findings = [found for each in in_threads(writer.write, plan.cases, workers, progress) for found in each]
            _refuse_errors(findings)
            write_json(folder / DATASET_JSON, _dataset_json(plan))
    except OSError as error:
        raise _explained(error, needed, target) from error
    roles = Counter(case.role for case in plan.cases)
    cases = {role: roles[role] for role in IMAGE_FOLDERS}
    return ConversionReport(target, cases, dict(Counter(writer.done)), tuple(findings), plan.notes)


def _dataset_json(plan: ConversionPlan) -> dict[str, Any]:
    return {
        **plan.extra,
        "name": plan.name,
        "channel_names": {str(channel): plan.channel_names[channel] for channel in sorted(plan.channel_names)},
        "labels": dict(sorted(plan.labels.items(), key=lambda entry: entry[1])),
        "numTraining": sum(case.role == "training" for case in plan.cases),
        "file_ending": FILE_ENDING,
    }


def _can_link(plan: ConversionPlan, folder: Path) -> bool:
    """Whether hard links work depends on devices, owners and mount options: trying it is the only sure way."""
    source = next((path for case in plan.cases for path in case.files if path.is_file()), None)
    trial = folder / "trial-link"
    linked = source is not None and link(source, trial)
    trial.unlink(missing_ok=True)
    return linked


def _needed_bytes(plan: ConversionPlan, linkable: bool) -> int:
    """Bytes to be written, estimated by the sizes of the sources: re-encoding changes them."""
    total = 0
    for case in plan.cases:
        for source in (*case.images, *([] if case.label is None else [case.label])):
            kept = isinstance(source, VolumeFile) and source.path.name.endswith(FILE_ENDING)
            shares = getattr(source, "count", 1)
            if not (linkable and kept):
                total += sum(path.stat().st_size for path in source.files if path.is_file()) // shares
    return total


def _explained(error: OSError, needed: int, target: Path) -> DiffSegError:
    if error.errno in DISK_FULL:
        free = shutil.disk_usage(target.parent).free
        return BadInputError(
            f"The disk of {target.parent} is full: {target.name} needs about {_mib(needed)}, {_mib(free)} are free. "
            "Nothing was written.",
            "Free some space, or choose another disk with --workspace.",
        )
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
        return BadInputError(f"{target} exists already.", "Choose another id with --id, or remove it.")
    return BadInputError(
        f"{target.name} could not be written: {error.strerror or error} ({error.filename or target.parent}).",
        "Check the disk, the permissions and --workspace.",
    )


def _mib(size: int) -> str:
    return f"{size / 1024**2:,.1f} MiB"


def _refuse_taken_id(dataset_id: int, folder_name: str, workspace: Workspace) -> None:
    taken: dict[int, list[Path]] = {}
    for root in (workspace.raw, workspace.preprocessed, workspace.results):
        for entry in sorted(root.iterdir()) if root.is_dir() else ():
            # what other stages left of the same data set is no conflict; of another one with this id it is
            conflict = root == workspace.raw or entry.name != folder_name
            if conflict and (match := re.fullmatch(r"Dataset(\d{3})_.+", entry.name)):
                taken.setdefault(int(match[1]), []).append(entry)
    if dataset_id in taken:
        free = next(
            (number for number in [*range(dataset_id, 1000), *range(1, dataset_id)] if number not in taken), None
        )
        raise BadInputError(
            f"The data set id {dataset_id} is taken by {listed(taken[dataset_id])}.",
            f"Choose another, for example --id {free}." if free else "Remove a data set: all 999 ids are taken.",
        )


def _refuse_bad_plan(plan: ConversionPlan) -> None:
    first: dict[str, SourceCase] = {}
    for case in plan.cases:
        files = case.files[0]
        if reason := why_unusable(case.identifier):
            message = f"'{case.identifier}' ({files}) cannot be a case identifier: {reason}."
            raise BadInputError(message, "Rename the file, and its label.")
        twin = first.setdefault(case.identifier, case)
        if twin is not case:
            message = f"Two cases are called '{case.identifier}': {twin.files[0]} and {files}."
            raise BadInputError(message, "Rename or remove one.")
    if not plan.cases:
        raise BadInputError(f"The source of '{plan.name}' has no case.", "Point to the folder that holds the images.")


def _refuse_errors(findings: Iterable[Finding]) -> None:
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors:
        return
    cases = len({finding.case for finding in errors})
    lines = [f"{len(errors)} problem(s) in {cases} case(s), no data set was written:"]
    lines += [f"- {finding.case}: {finding}" for finding in errors[:SHOWN_FINDINGS]]
    if len(errors) > SHOWN_FINDINGS:
        lines.append(f"- and {len(errors) - SHOWN_FINDINGS} more")
    raise BadInputError("\n".join(lines) + "\n", "Mend or remove these cases, then convert again.")
