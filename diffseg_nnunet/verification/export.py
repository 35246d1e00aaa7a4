"""Findings and records for machines."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from diffseg_nnunet.verification.findings import SEVERITIES, Finding, of_severity
from diffseg_nnunet.verification.records import CaseRecord


def findings_json(dataset: str, findings: Sequence[Finding], records: Sequence[CaseRecord]) -> dict[str, Any]:
    """The data set's name, how many findings each severity has, the findings, and a record of every readable case."""
    return {
        "dataset": dataset,
        "counts": {severity: len(of_severity(findings, severity)) for severity in SEVERITIES},
        "findings": [asdict(finding) for finding in findings],
        "cases": [record.to_json() for record in records],
    }


def findings_csv(findings: Sequence[Finding]) -> str:
    """A header, and a row for each finding."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Finding)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(finding) for finding in findings)
    return text.getvalue()
