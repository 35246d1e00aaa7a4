"""What a conversion tells: conversion.json and conversion.csv in the data set, or in a folder of the user's choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffseg_nnunet.atomic import write_json, write_text
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.verification import Finding, of_severity
from diffseg_nnunet.verification.export import findings_csv

from .description import ConversionPlan
from .selection import label_table
from .writer import IMAGE_FOLDERS

REPORT_JSON, REPORT_CSV = "conversion.json", "conversion.csv"
EXIT_WARNED = 1
SHOWN_FINDINGS = 10
_PACKAGES = ("diffseg_nnunet", "SimpleITK", "numpy")


@dataclass(frozen=True)
class ConversionReport:
    """What has been written.

    Attributes:
        folder: the new data set.
        plan: what it was made of, without the cases that were skipped.
        cases: how many cases each role has.
        files: how many files were 'linked', 'copied' or 'encoded' (re-encoded, merged, or split from 4D).
        findings: of all cases; errors are those of the cases that were skipped.
        notes: the plan's, and the engine's.
    """

    folder: Path
    plan: ConversionPlan
    cases: dict[str, int]
    files: dict[str, int]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that did not stop the conversion."""
        return tuple(of_severity(self.findings, "warning"))

    @property
    def skipped(self) -> tuple[str, ...]:
        """Identifiers of the cases that were left out."""
        return tuple(dict.fromkeys(finding.case for finding in of_severity(self.findings, "error")))

    @property
    def exit_code(self) -> int:
        """0: nothing to tell; 1: something was mended, skipped or is worth a look."""
        return EXIT_WARNED if any(finding.severity != "note" for finding in self.findings) else 0

    def as_json(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The content of conversion.json; `record` has what only the caller knows."""
        return {
            **record,
            **described_plan(self.plan),
            "skipped": list(self.skipped),
            "files": self.files,
            "notes": list(self.notes),
        }


class ConversionRefusedError(BadInputError):
    """Cases have errors, and nothing was written.

    Attributes:
        findings: all of them, warnings included.
    """

    def __init__(self, findings: Sequence[Finding]):
        self.findings = tuple(findings)
        errors = of_severity(findings, "error")
        cases = len({finding.case for finding in errors})
        lines = [f"{len(errors)} problem(s) in {cases} case(s), no data set was written:"]
        lines += [f"- {finding.case}: {finding}" for finding in errors[:SHOWN_FINDINGS]]
        if len(errors) > SHOWN_FINDINGS:
            lines.append(f"- and {len(errors) - SHOWN_FINDINGS} more")
        mend = "Mend or remove these cases, then convert again; or leave them out with --skip-bad."
        super().__init__("\n".join(lines) + "\n", mend)


def described_plan(plan: ConversionPlan) -> dict[str, Any]:
    """What was to be written, as JSON values: name, versions, label mapping, cases of each role, splits."""
    scheme = plan.splits[0] if plan.splits else None
    return {
        "name": plan.name,
        "versions": {package: version(package) for package in _PACKAGES},
        "labels": [
            dict(zip(("source_value", "source_name", "value", "name"), row, strict=True)) for row in label_table(plan)
        ],
        "cases": {role: [case.identifier for case in plan.cases if case.role == role] for role in IMAGE_FOLDERS},
        "splits": {"name": scheme.name, "source": scheme.source, "folds": len(scheme.folds)} if scheme else None,
    }


def write_report(folder: Path, content: Mapping[str, Any], findings: Sequence[Finding]) -> None:
    """Write conversion.json, and the findings as conversion.csv, one line each."""
    write_json(folder / REPORT_JSON, {**content, "findings": [asdict(finding) for finding in findings]})
    write_text(folder / REPORT_CSV, findings_csv(findings))
