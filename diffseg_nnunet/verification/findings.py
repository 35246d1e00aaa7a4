"""What a check has found, and how it is put into words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        code: what kind of thing, for machines, e.g. 'label_values'.
        case: the case identifier, '' where the data set as a whole is meant.
        message: what is wrong, in which file, and why that matters.
        mend: what to do about it.
        severity: an 'error' stops a conversion or a training, a 'warning' does not but should be looked into, a 'note'
            is good to know.
    """

    code: str
    case: str
    message: str
    mend: str
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.message} {self.mend}"


def of_severity(findings: Iterable[Finding], severity: Severity) -> list[Finding]:
    """The findings of one severity, in their order."""
    return [finding for finding in findings if finding.severity == severity]


def grouped(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Findings of one severity and code together, the gravest first; else in their order.

    A defect of the export is a defect of a thousand cases: who shows findings shows the first of each group.
    """
    groups: dict[tuple[int, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[SEVERITIES.index(finding.severity), finding.code].append(finding)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def shortened(findings: Sequence[Finding], limit: int = 3) -> list[str]:
    """Findings in words, of each severity and code the first `limit`, and how many are like them."""
    lines = []
    for group in grouped(findings):
        lines += [str(finding) for finding in group[:limit]]
        if len(group) > limit:
            lines.append(f"{len(group) - limit} more finding(s) like the last one ({group[0].code}).")
    return lines


def listed(values: Iterable[Any], limit: int = 10) -> str:
    """``'1, 2, 3'``; of more than `limit` values the first ones, and how many follow."""
    values = list(values)
    shown = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values[:limit])
    return shown + (f", and {len(values) - limit} more" if len(values) > limit else "")


def numbers(values: Iterable[float]) -> str:
    """``'(1, 2.5)'``."""
    return "(" + ", ".join(f"{value:.7g}" for value in values) + ")"
