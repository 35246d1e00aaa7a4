"""The one engine that writes a data set from its description: whole and checked, or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffseg_nnunet.atomic import DISK_FULL, write_json, write_text
from diffseg_nnunet.errors import BadInputError, DiffSegError, StageFailedError
from diffseg_nnunet.patients import SAME_PATIENT
from diffseg_nnunet.raw_dataset import DATASET_JSON, SPLITS_FILE, why_unusable
from diffseg_nnunet.verification import Finding, Progress, check_records, in_threads, listed, of_severity
from diffseg_nnunet.workspace import Workspace, dataset_folder_name

from .description import BACKGROUND, IGNORE, ConversionPlan, SourceCase
from .report import ConversionRefusedError, ConversionReport, write_report
from .selection import keep
from .staging import exclusive, signature_of, staging
from .writer import FILE_ENDING, IMAGE_FOLDERS, CaseWriter, Handling, Written, is_identity, is_linkable, link

__all__ = ["ConversionRefusedError", "ConversionReport", "convert"]


def convert(
    plan: ConversionPlan,
    *,
    dataset_id: int,
    workspace: Workspace,
    copy: bool = False,
    verify: bool = True,
    repair: bool = True,
    skip_bad: bool = False,
    workers: int,
    progress: Progress | None = None,
    record: Mapping[str, Any] | None = None,
) -> ConversionReport:
    """Write the data set into a hidden folder beside its place, check every case, and publish it by one rename.

    Volumes that need no change are hard-linked where the file system allows it, else copied. A conversion that was
    killed or interrupted goes on where it was when it is called again with the same plan, settings and sources.

    Args:
        plan: what to write.
        dataset_id: 1..999, free.
        workspace: its `raw` receives the data set.
        copy: never link, so that the data set is independent of its source.
        verify: check every case; else files that need no change are linked unread.
        repair: mend what can be mended (`repair`), else refuse it.
        skip_bad: leave out and report cases with errors, instead of refusing them all.
        workers: threads.
        progress: called with (cases done, cases in all) after each case.
        record: further entries of conversion.json: format, source, options.

    Raises:
        BadInputError: the name or id cannot be used, another process is converting into it, the source is wrong (then
            a `ConversionRefusedError`, which has the findings), or the disk is full; nothing is left behind.
        StageFailedError: the plan contradicts itself, which is the converter's fault.
    """
    target = workspace.raw / dataset_folder_name(dataset_id, plan.name)
    refuse_bad_plan(plan)
    handling = Handling(copy, verify, repair)
    needed = 0
    try:
        with exclusive(target) as place, staging(place, signature_of(plan, handling)) as staged:
            refuse_taken_id(dataset_id, target.name, workspace)
            writer = CaseWriter(plan, staged.data, handling)
            cases = [case for case in plan.cases if case.identifier not in staged.finished]
            needed = needed_bytes(plan, cases, linkable=not copy and _can_link(cases, place))
            if needed > shutil.disk_usage(place).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            resumed = len(plan.cases) - len(cases)

            def told(done: int, _: int) -> None:
                if progress is not None:
                    progress(resumed + done, len(plan.cases))

            in_threads(lambda case: staged.record(writer.write(case)), cases, workers, told)
            results = [staged.finished[case.identifier] for case in plan.cases]
            kept, findings = _judged(plan, results, skip_bad)
            report = _report(target, kept, findings, results, resumed)
            write_json(staged.data / DATASET_JSON, dataset_json(kept))
            if kept.splits:
                write_json(staged.data / SPLITS_FILE, kept.splits[0].folds)
            _remove_left_out(staged.data, results, report)
            write_report(
                staged.data, report.as_json({**(record or {}), **_settings(handling, skip_bad)}), report.findings
            )
            staged.publish(target)
    except OSError as error:
        raise _explained(error, needed, target) from error
    return replace(report, notes=(*report.notes, *_install_splits(target, workspace)))


def dataset_json(plan: ConversionPlan) -> dict[str, Any]:
    """The content of dataset.json."""
    return {
        **plan.extra,
        **({SAME_PATIENT: plan.same_patient} if plan.same_patient else {}),
        "name": plan.name,
        "channel_names": {str(channel): plan.channel_names[channel] for channel in sorted(plan.channel_names)},
        "labels": dict(sorted(plan.labels.items(), key=lambda entry: entry[1])),
        "numTraining": sum(case.role == "training" for case in plan.cases),
        "file_ending": FILE_ENDING,
    }


def needed_bytes(plan: ConversionPlan, cases: Iterable[SourceCase], linkable: bool) -> int:
    """Bytes to be written for these cases, estimated by the sizes of the sources: re-encoding changes them."""
    total = 0
    for case in cases:
        for source in case.sources:
            renumbered = source is case.label and not is_identity(plan.values(case))
            if not (linkable and is_linkable(source) and not renumbered):
                shares = getattr(source, "count", 1)
                total += sum(path.stat().st_size for path in source.files if path.is_file()) // shares
    return total


def refuse_taken_id(dataset_id: int, folder_name: str, workspace: Workspace) -> None:
    """Raises BadInputError where the id or the name is taken."""
    taken: dict[int, list[Path]] = {}
    for root in (workspace.raw, workspace.preprocessed, workspace.results):
        for entry in sorted(root.iterdir()) if root.is_dir() else ():
            # what an earlier data set left under exactly this name is no conflict: plans and results are made anew
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


def refuse_bad_plan(plan: ConversionPlan) -> None:
    """Raises BadInputError where the cases' names cannot be used, StageFailedError where the converter is wrong."""
    first: dict[str, SourceCase] = {}
    for case in plan.cases:
        twin = first.setdefault(case.identifier, case)
        if twin is not case:
            message = f"Two cases are called '{case.identifier}': {twin.files[0]} and {case.files[0]}."
            raise BadInputError(message, "Rename or remove one.")
    if unusable := {name: reason for name in first if (reason := why_unusable(name))}:
        (name, reason), *more = unusable.items()
        message = f"'{name}' ({first[name].files[0]}) cannot be a case identifier: {reason}."
        others = f" Nor can {len(more)} more: {listed(other for other, _ in more)}." if more else ""
        raise BadInputError(message + others, "Rename the file, and its label.")
    if not plan.cases:
        raise BadInputError(f"The source of '{plan.name}' has no case.", "Point to the folder that holds the images.")
    ordered = sorted(plan.labels, key=plan.labels.__getitem__)
    if [plan.labels[name] for name in ordered] != list(range(len(ordered))) or ordered[:1] != [BACKGROUND]:
        wrong = f"its labels are {plan.labels}, not 'background' 0, then 1, 2, ..."
    elif IGNORE in ordered[:-1]:
        wrong = "its label 'ignore' is not the highest"
    elif IGNORE not in ordered and any(case.unannotated for case in plan.cases):
        wrong = "it has cases that are not fully annotated, but no label 'ignore'"
    else:
        return
    raise StageFailedError(f"The converter of '{plan.name}' is wrong: {wrong}.", "Tell its authors.")


def _can_link(cases: list[SourceCase], folder: Path) -> bool:
    """Whether hard links work depends on devices, owners and mount options: trying it is the only sure way."""
    source = next((path for case in cases for path in case.files if path.is_file()), None)
    trial = folder / "trial-link"
    trial.unlink(missing_ok=True)
    linked = source is not None and link(source, trial)
    trial.unlink(missing_ok=True)
    return linked


def _judged(plan: ConversionPlan, results: list[Written], skip_bad: bool) -> tuple[ConversionPlan, list[Finding]]:
    """The plan without the cases that have errors, and all findings: those of each case, then those across cases.

    Raises:
        ConversionRefusedError: there are errors, and they are not to be skipped; or no case would be left.
    """
    findings = [finding for written in results for finding in written.findings]
    bad = {written.case for written in results if written.is_bad}
    across = _across(plan, results, bad)
    while skip_bad and (worst := of_severity(across, "error")):
        # without these, others may still be copies of each other
        findings += worst
        bad |= {finding.case for finding in worst}
        across = _across(plan, results, bad)
    findings += across
    bad |= {finding.case for finding in of_severity(across, "error")}
    if not bad:
        return plan, findings
    if not skip_bad or len(bad) == len(results):
        raise ConversionRefusedError(findings)
    return keep(plan, {case.identifier for case in plan.cases} - bad), findings


def _across(plan: ConversionPlan, results: list[Written], bad: set[str]) -> list[Finding]:
    """What the cases that are not bad say against each other, as far as they were read."""
    records = [written.record for written in results if written.record is not None and written.case not in bad]
    channel_names = [plan.channel_names[channel] for channel in sorted(plan.channel_names)]
    return check_records(records, channel_names, plan.labels) if records else []


def _report(
    target: Path, plan: ConversionPlan, findings: list[Finding], results: list[Written], resumed: int
) -> ConversionReport:
    kept = {case.identifier for case in plan.cases}
    counts = Counter(case.role for case in plan.cases)
    note = f"Went on with an interrupted conversion: {resumed} of {len(results)} case(s) were finished."
    return ConversionReport(
        folder=target,
        plan=plan,
        cases={role: counts[role] for role in IMAGE_FOLDERS},
        files=dict(Counter(how for written in results if written.case in kept for how in written.files.values())),
        findings=tuple(findings),
        notes=(*plan.notes, *[note] * bool(resumed)),
    )


def _remove_left_out(folder: Path, results: list[Written], report: ConversionReport) -> None:
    """A case may be written before it turns out that it cannot stay beside another."""
    for written in results:
        if written.case in report.skipped:
            for path in written.files:
                (folder / path).unlink()


def _settings(handling: Handling, skip_bad: bool) -> dict[str, Any]:
    return {"settings": {**vars(handling), "skip_bad": skip_bad}}


def _install_splits(target: Path, workspace: Workspace) -> list[str]:
    """Put the data set's splits where nnU-Net looks for them, unless some are there; a note where they differ."""
    chosen, installed = target / SPLITS_FILE, workspace.preprocessed / target.name / SPLITS_FILE
    if not chosen.is_file():
        return []
    content = chosen.read_text(encoding="utf-8")
    if installed.is_file():
        same = installed.read_text(encoding="utf-8") == content
        return [] if same else [f"{installed} was there already and stays; the chosen splits are in {chosen}."]
    write_text(installed, content)
    return []


def _explained(error: OSError, needed: int, target: Path) -> DiffSegError:
    if error.errno in DISK_FULL:
        free = shutil.disk_usage(target.parent).free
        return BadInputError(
            f"The disk of {target.parent} is full: {target.name} needs about {mib(needed)}, {mib(free)} are free. "
            "Nothing was written.",
            "Free some space, or choose another disk with --workspace.",
        )
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
        return BadInputError(f"{target} exists already.", "Choose another id with --id, or remove it.")
    return BadInputError(
        f"{target.name} could not be written: {error.strerror or error} ({error.filename or target.parent}).",
        "Check the disk, the permissions and --workspace.",
    )


def mib(size: int) -> str:
    """``"1,234.5 MiB"``."""
    return f"{size / 1024**2:,.1f} MiB"
