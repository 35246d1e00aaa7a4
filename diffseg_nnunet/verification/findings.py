"""What a check has found, and how it is put into words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        code: what kind of thing, for machines, e.g. 'label_values'.
        case: the case identifier, '' where the data set as a whole is meant.
        message: what is wrong, in which file, and why that matters.
        mend: what to do about it.
        severity: an 'error' stops a conversion or a training, a 'warning' does not.
    """

    code: str
    case: str
    message: str
    mend: str
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.message} {self.mend}"


def listed(values: Iterable[Any], limit: int = 10) -> str:
    """``'1, 2, 3'``; of more than `limit` values the first ones, and how many follow."""
    values = list(values)
    shown = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values[:limit])
    return shown + (f", and {len(values) - limit} more" if len(values) > limit else "")


def numbers(values: Iterable[float]) -> str:
    """``'(1, 2.5)'``."""
    return "(" + ", ".join(f"{value:.7g}" for value in values) + ")"
