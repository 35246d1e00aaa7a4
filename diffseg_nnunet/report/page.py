"""A page of HTML that needs nothing beside it: texts, tables, pictures; no script, nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import jinja2

from diffseg_nnunet.atomic import write_text

_TEMPLATE = "page.html"
# a unit or an interval may follow; "3d_fullres" is a name, and "2026-11-30" a date
_NUMBER = re.compile(r"[+−-]?\d[\d.,]*(e[+-]?\d+)?([ %×[].*)?")


@dataclass(frozen=True)
class Paragraph:
    """A line of text; a warning stands out."""

    text: str
    warning: bool = False
    kind: str = "paragraph"


@dataclass(frozen=True)
class Table:
    """Rows of texts under a header; a column is set to the right where all its cells are like numbers.

    Attributes:
        folded: closed until the reader opens it, under its caption.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False
    kind: str = "table"

    @cached_property
    def numeric(self) -> list[bool]:
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.header)
        return [any(column) and all(map(_like_a_number, column)) for column in columns]


@dataclass(frozen=True)
class Picture:
    """A PNG, with what it shows."""

    caption: str
    png: bytes
    folded: bool = False
    kind: str = "picture"

    @property
    def source(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


Part = Paragraph | Table | Picture


@dataclass(frozen=True)
class Section:
    title: str
    parts: Sequence[Part]


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page; names from files and data sets are escaped."""
    text = resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(text).render(title=title, subtitle=subtitle, sections=sections)


def write_page(path: Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write the page, whole or not at all."""
    write_text(path, render(title, subtitle, sections))


def _like_a_number(cell: str) -> bool:
    return cell in ("", "–") or _NUMBER.fullmatch(cell) is not None
