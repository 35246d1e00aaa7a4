"""``diffseg dataset``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffseg_nnunet.cli.arguments import DatasetId, Workspace
from diffseg_nnunet.cli.console import news_to_standard_error, open_project

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from diffseg_nnunet.verification.summary import DatasetSummary, LabelSummary, Spread

_NAMED = 6

Pictures = Annotated[
    Path | None,
    typer.Option(metavar="FILE.png", help="Write a contact sheet: the slice of each case that has most label."),
]
Pages = Annotated[int, typer.Option(min=1, help="At most so many pages of 48 cases; more are chosen evenly.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="The same as one JSON object on standard output; news go to standard error.")
]


def dataset(
    dataset_id: DatasetId,
    pictures: Pictures = None,
    pages: Pages = 1,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Show what is in a data set: sizes, spacings, intensities, labels, and cases unlike the rest.

    What `diffseg verify` has read is not read again.
    """
    answer = None
    with (
        news_to_standard_error(as_json),
        open_project(workspace, dataset_id, news=sys.stderr if as_json else None) as project,
    ):
        from diffseg_nnunet.errors import BadInputError
        from diffseg_nnunet.pipeline.overview import contact_sheets, overview

        if pictures is not None and pictures.suffix.lower() != ".png":
            raise BadInputError(f"--pictures {pictures} does not end in .png.", "Name it FILE.png.")
        seen = overview(project)
        if as_json:
            answer = json.dumps({"dataset": project.name, **seen.summary.to_json()}, indent=2)
        else:
            counts = ", ".join(f"{count} {role}" for role, count in seen.summary.cases.items() if count)
            project.reporter.info(f"{project.name}: {counts} case(s)")
            cases = {record.case for record in seen.records}
            groups = [there for group in project.same_patient() if len(there := cases.intersection(group)) > 1]
            if groups:
                count = sum(map(len, groups))
                project.reporter.info(f"{count} of them show {len(groups)} patient(s) who have several scans")
            for table in tables(seen.summary):
                project.reporter.console.print(table, soft_wrap=False)
            for line in _remarks(seen.summary):
                project.reporter.info(line)
        if seen.errors:
            project.reporter.warn(
                f"{len(seen.errors)} error(s) were found; images that cannot be read are left out. "
                f"`diffseg verify {project.id}` lists them."
            )
        if pictures is not None:
            paths, left_out = contact_sheets(project, seen, pictures, pages)
            rest = f"; {left_out} case(s) left out, which a higher --pages shows" if left_out else ""
            project.reporter.info(f"pictures: {', '.join(map(str, paths))}{rest}")
    if answer is not None:
        sys.stdout.write(answer + "\n")


def tables(summary: DatasetSummary) -> Iterator[Table]:
    """Cases and geometry, channels, and, where there are any, labels."""
    from rich.markup import escape
    from rich.table import Table

    geometry = Table("", "z", "y", "x", title=escape("geometry; median [range] over cases"))
    geometry.add_row("size, voxels", *(_shown(summary.size[axis]) for axis in "zyx"))
    geometry.add_row("spacing, mm", *(_shown(summary.spacing_mm[axis]) for axis in "zyx"))
    yield geometry
    title = escape("intensities of a case; median [range] over cases")
    channels = Table("channel", "minimum", "0.5 %", "median", "99.5 %", "maximum", "stored as", title=title)
    for channel in summary.channels:
        spreads = (channel.minimum, channel.percentile_00_5, channel.median, channel.percentile_99_5, channel.maximum)
        kinds = ", ".join(f"{count} {kind}" for kind, count in channel.pixel_types.items())
        channels.add_row(escape(channel.name), *map(_shown, spreads), kinds)
    yield channels
    if summary.labels and summary.labelled:
        title = f"labels of {summary.labelled} training case(s); volume over the cases that have it"
        labels = Table("label", "value", "cases", escape("ml, median [range]"), "outliers (ml)", title=title)
        for label in summary.labels:
            values = ", ".join(map(str, label.values))
            spread = "–" if label.volume_ml is None else _shown(label.volume_ml)
            labels.add_row(escape(label.name), values, str(label.cases), spread, escape(_outliers(label)))
        yield labels


def _shown(spread: Spread) -> str:
    from rich.markup import escape

    if spread.lowest == spread.highest:
        return f"{spread.median:.4g}"
    return escape(f"{spread.median:.4g} [{spread.lowest:.4g}, {spread.highest:.4g}]")


def _outliers(label: LabelSummary) -> str:
    from diffseg_nnunet.verification import listed

    return listed((f"{case} ({volume:.3g})" for case, volume in label.outliers), _NAMED)


def _remarks(summary: DatasetSummary) -> Iterator[str]:
    from diffseg_nnunet.verification import listed
    from diffseg_nnunet.verification.summary import OUTLIER_RULE

    codes = ", ".join(f"{count} {code}" for code, count in summary.orientations.items())
    yield f"orientation (where x, y, z point to): {codes}"
    for what, outliers in (("size", summary.size_outliers), ("spacing", summary.spacing_outliers)):
        if outliers:
            named = listed((f"{case} ({', '.join(axes)})" for case, axes in outliers.items()), _NAMED)
            yield f"outliers in {what}: {named}"
    yield OUTLIER_RULE
