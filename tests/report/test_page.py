"""A page: what is on it can be found by a parser, names are escaped, and nothing is fetched from elsewhere."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

import pytest

from diffseg_nnunet.report.page import Paragraph, Picture, Section, Table, render, write_page

PNG = b"\x89PNG\r\n\x1a\nnot really"


class Seen(HTMLParser):
    """Cells, headers, sources and addresses of a page, and whether what is opened is closed in its order."""

    def __init__(self, page: str):
        super().__init__()
        self.cells: list[str] = []
        self.numeric: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag in ("td", "th"):
            (self.numeric if ("class", "number") in attrs else self.cells).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_tables_pictures_and_texts_are_on_the_page() -> None:
    parts = (
        Paragraph("All is well."),
        Paragraph("Look here.", warning=True),
        Table("Scores", ("case", "DSC"), [["a", "0.5"], ["b", "–"]]),
        Picture("Curves", PNG, folded=True),
    )
    page = render("Title", "below it", [Section("First", parts), Section("Second", ())])
    seen = Seen(page)
    assert {"a", "0.5", "b", "–"} <= set(seen.cells)
    assert '<p class="warning">Look here.</p>' in page
    assert seen.sources == ["#section-1", "#section-2", f"data:image/png;base64,{base64.b64encode(PNG).decode()}"]
    assert seen.tags.count("details") == 1


def test_what_comes_from_files_is_escaped() -> None:
    name = '<script>alert("x")</script> & co'
    parts = (Paragraph(name), Table(name, (name,), [[name]]), Picture(name, PNG), Table(name, (name,), [], folded=True))
    page = render(name, name, [Section(name, parts)])
    assert "<script" not in page
    assert name in Seen(page).cells


def test_the_page_may_load_nothing() -> None:
    page = render("Title", "", [])
    assert "default-src 'none'" in page
    assert "http://" not in page
    assert "https://" not in page


@pytest.mark.parametrize(
    ("cells", "numeric"),
    [
        (["0.812 [0.790, 0.830]", "–", ""], True),
        (["+7.5%", "-0.2", "1e-05"], True),
        (["40 × 56 × 40", "10 min"], True),
        (["3d_fullres", "2d"], False),
        (["2026-11-30 16:00:00"], False),
        (["12", "twelve"], False),
        ([], False),
    ],
)
def test_which_columns_are_numbers(cells: list[str], numeric: bool) -> None:
    assert Table("", ("column",), [[cell] for cell in cells]).numeric == [numeric]


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    write_page(tmp_path / "new" / "page.html", "Ünicode", "", [])
    assert "Ünicode" in (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
