"""How much of a fold's training cases is labelled, as a user writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from diffseg_nnunet.errors import BadInputError

Kind = Literal["cases", "share of cases", "slices", "voxels"]

_WRITTEN = re.compile(r"(?P<amount>\d+(\.\d+)?)(?P<unit>%?)\s*(?P<of>cases?|slices?|voxels?|)")
_KINDS: dict[tuple[str, str], Kind] = {
    ("", "case"): "cases",
    ("%", "case"): "share of cases",
    ("%", ""): "share of cases",
    ("", "slice"): "slices",
    ("%", "voxel"): "voxels",
}
_SUFFIXES: dict[Kind, str] = {"cases": "cases", "share of cases": "%", "slices": "slices", "voxels": "%voxels"}


@dataclass(frozen=True)
class LabelBudget:
    """A label budget.

    Attributes:
        kind: "cases": so many cases, labelled in whole; "share of cases": so many percent of them, rounded, at least
            one; "slices": so many slices in all, not of each case (the "four labelled CT slices" of arXiv
            2402.15216v2); "voxels": so many percent of the voxels of every case.
        amount: a count, or percent.
    """

    kind: Kind
    amount: float

    @classmethod
    def parse(cls, text: str) -> LabelBudget:
        """Of ``2cases``, ``10%``, ``4slices`` or ``0.5%voxels``.

        Raises:
            BadInputError: it is none of these, nothing, or more than everything.
        """
        match = _WRITTEN.fullmatch(text.strip().lower())
        kind = _KINDS.get((match["unit"], match["of"].removesuffix("s"))) if match else None
        whole = match is not None and (match["unit"] == "%" or "." not in match["amount"])
        amount = float(match["amount"]) if match else 0.0
        most = 100.0 if match and match["unit"] else float("inf")
        if kind is None or not whole or not 0 < amount <= most:
            raise BadInputError(
                f"'{text}' is no label budget.",
                "Write it like 2cases, 10% (of the fold's training cases), 4slices (in all) or 0.5%voxels (of each).",
            )
        return cls(kind, amount)

    def __str__(self) -> str:
        # never with an exponent, which cannot be read again
        written = f"{Decimal(f'{self.amount:.12g}'):f}{_SUFFIXES[self.kind]}"
        return written.removesuffix("s") if written in ("1cases", "1slices") else written

    @property
    def is_sparse(self) -> bool:
        """Whether cases are annotated in part."""
        return self.kind in ("slices", "voxels")

    def case_count(self, cases: int) -> int:
        """How many of `cases` a budget of cases labels; may exceed them."""
        return max(1, round(self.amount / 100 * cases)) if self.kind == "share of cases" else int(self.amount)
