"""The stage *verify*, and what it remembers of every case so that no file is read twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffseg_nnunet.atomic import write_json
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.patients import SAME_PATIENT
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.planning.hardware import worker_count
from diffseg_nnunet.raw_dataset import RawDataset
from diffseg_nnunet.verification import (
    CaseRecord,
    CaseToCheck,
    DatasetExamination,
    Examination,
    Finding,
    examine_dataset,
    of_severity,
    shortened,
)

CACHE = "verification.json"
# what is stored is what these checks found: raise it when they, or the records, change
_CACHE_FORMAT = 1


class VerificationError(BadInputError):
    """The data set has errors.

    Attributes:
        findings: all of them, warnings and notes as well.
        records: of the cases that could be read.
    """

    _LISTED = 10

    def __init__(self, project: Project, findings: Iterable[Finding], records: Iterable[CaseRecord]):
        self.findings, self.records = list(findings), list(records)
        errors = of_severity(self.findings, "error")
        lines = [f"  {line}" for line in shortened(errors)]
        if len(lines) > self._LISTED:
            lines = [*lines[: self._LISTED], f"  … and more: `diffseg verify {project.id}` lists them"]
        listed = "\n".join(lines)
        super().__init__(f"{project.name} has {len(errors)} error(s):\n{listed}")


def verify(project: Project) -> list[Finding]:
    """Check every image and label; skipped where they passed before and are unchanged.

    Returns:
        The findings, of the earlier check where it is skipped; nnU-Net's own integrity check runs as well.

    Raises:
        VerificationError: a finding is an error, or nnU-Net's check failed.
    """
    with project.manifest.turn("verify", project.reporter.info):
        return _verify(project)


def _verify(project: Project) -> list[Finding]:
    if is_verified(project):
        return [Finding(**found) for found in project.manifest.stage("verify")["outputs"].get("findings", [])]
    raw = project.raw()
    with project.manifest.running("verify", _inputs(raw), {}) as run:
        examination = examined(project)
        findings = list(examination.findings)
        if not of_severity(findings, "error") and raw.labelled_cases():
            findings += _nnunet_check(project, raw)
        if of_severity(findings, "error"):
            raise VerificationError(project, findings, examination.records)
        run.outputs["findings"] = [asdict(finding) for finding in findings]
    return findings


def is_verified(project: Project) -> bool:
    """Whether the data set passed *verify* and is unchanged since."""
    return project.manifest.is_finished("verify", _inputs(project.raw()))


def examined(project: Project) -> DatasetExamination:
    """Findings and records of the data set; only those files are read that are new or have changed since."""
    path = project.results / CACHE
    stored = _read_cache(path)
    examination = examine_dataset(
        project.raw(),
        workers=worker_count(),
        known=lambda job: _remembered(stored, job),
        progress=lambda done, total: project.reporter.progress("verify", done, total),
    )
    cases = {
        _key(job): {"findings": [asdict(finding) for finding in found.findings], "record": found.record.to_json()}
        for job, found in examination.cases.items()
        if _may_be_remembered(job, found)
    }
    if cases != stored:
        write_json(path, {"format": _CACHE_FORMAT, "cases": cases})
    return examination


def remembered_records(project: Project) -> list[CaseRecord]:
    """Of the cases as the last verification found them, whatever has become of their files; nothing else is read."""
    found = []
    for entry in _read_cache(project.results / CACHE).values():
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            found.append(CaseRecord.from_json(entry["record"]))
    return found


def _remembered(stored: Mapping[str, Any], job: CaseToCheck) -> Examination | None:
    """What is stored of a case in the present state of its files; what cannot be understood is examined again."""
    try:
        entry = stored[_key(job)]
        return Examination(
            tuple(Finding(**finding) for finding in entry["findings"]), CaseRecord.from_json(entry["record"])
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _may_be_remembered(job: CaseToCheck, found: Examination) -> bool:
    """Not where something is wrong: it may be mended without a trace in the file, by permissions for example."""
    complete = found.record is not None and (job.case.label is None or found.record.label is not None)
    return complete and not of_severity(found.findings, "error")


def _read_cache(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    usable = isinstance(content, dict) and content.get("format") == _CACHE_FORMAT
    return content["cases"] if usable and isinstance(content.get("cases"), dict) else {}


def _key(job: CaseToCheck) -> str:
    """A digest of all that the examination of a case depends on; files by path, size and time of modification."""
    values = None if job.label_values is None else sorted(job.label_values)
    parts = [job.case.identifier, job.role, job.channel_count, values, job.case.label is not None]
    files = [*job.case.images, *([] if job.case.label is None else [job.case.label])]
    return _digest([*parts, *(_stamp(path) for path in files)])


def _stamp(path: Path) -> list[Any]:
    status = path.stat() if path.exists() else None
    return [str(path), None if status is None else [status.st_size, status.st_mtime_ns]]


def _inputs(raw: RawDataset) -> dict[str, str]:
    """What a verification depends on; test images do not belong to the content that a training depends on."""
    images = raw.image_files("imagesTs").values() if "file_ending" in raw.dataset_json else ()
    labels = raw.label_files("labelsTs").values() if "file_ending" in raw.dataset_json else ()
    test = [_stamp(path) for path in (*(path for files in images for path in files), *labels)]
    patients = {SAME_PATIENT: _digest([raw.dataset_json[SAME_PATIENT]])} if SAME_PATIENT in raw.dataset_json else {}
    return {"content": raw.content_signature(), "test": _digest(test), **patients}


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _nnunet_check(project: Project, raw: RawDataset) -> list[Finding]:
    """nnU-Net's integrity check, which is what its own commands would stop at."""
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    with project.log("verify"):
        try:
            verify_dataset_integrity(str(raw.folder), worker_count())
        except (AssertionError, RuntimeError) as error:
            message = f"nnU-Net's integrity check of {project.name} failed: {error}"
            mend = f"Its details are in {project.results / 'logs' / 'verify.log'}."
            return [Finding("nnunet_integrity", "", message, mend)]
    return []
