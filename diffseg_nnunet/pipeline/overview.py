"""What is in a data set: its summary, and contact sheets of its cases. Reads only what *verify* has not read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.verifying import examined
from diffseg_nnunet.planning.hardware import worker_count
from diffseg_nnunet.raw_dataset import Case
from diffseg_nnunet.verification import CaseRecord, Finding, in_threads, of_severity, read_volume
from diffseg_nnunet.verification.dataset import channel_names
from diffseg_nnunet.verification.summary import DatasetSummary, summarise


@dataclass(frozen=True)
class Overview:
    """A data set's summary.

    Attributes:
        summary: over the cases that could be read.
        records: of these cases: training, unlabelled, test; each by identifier.
        errors: of cases, which may have no record then, and of dataset.json.
        files: (role, case identifier) -> its files.
    """

    summary: DatasetSummary
    records: tuple[CaseRecord, ...]
    errors: tuple[Finding, ...]
    files: dict[tuple[str, str], Case]


def overview(project: Project) -> Overview:
    """Summarise a data set.

    Raises:
        BadInputError: dataset.json lacks what is needed, or no case can be read.
    """
    raw = project.raw()
    examination = examined(project)
    errors = of_severity(examination.findings, "error")
    if not examination.records:
        raise BadInputError(
            f"{project.name} has no case that can be read.", f"`diffseg verify {project.id}` says what is wrong."
        )
    summary = summarise(examination.records, channel_names(raw), raw.labels)
    files = {(job.role, job.case.identifier): job.case for job in examination.cases}
    return Overview(summary, examination.records, tuple(errors), files)


def contact_sheets(project: Project, seen: Overview, path: Path, most_pages: int) -> tuple[list[Path], int]:
    """Write contact sheets of the cases, evenly chosen where the pages do not hold all.

    Args:
        path: of the first page; the others have -2, -3, ... before the ending.

    Returns:
        The files, and how many cases were left out.
    """
    from diffseg_nnunet.report.contact_sheet import (
        TILES_A_PAGE,
        Tile,
        case_tile,
        contact_sheet,
        page_paths,
        spread_evenly,
    )

    labels = {label.name: label.values for label in seen.summary.labels}
    chosen = spread_evenly(seen.records, most_pages * TILES_A_PAGE)
    pages = [chosen[start : start + TILES_A_PAGE] for start in range(0, len(chosen), TILES_A_PAGE)]
    left_out = len(seen.records) - len(chosen)

    def tile(record: CaseRecord) -> Tile:
        case = seen.files[record.role, record.case]
        label = None if record.label is None or case.label is None else read_volume(case.label)
        return case_tile(record, read_volume(case.images[0]), label, labels)

    paths = page_paths(path, len(pages))
    for number, (page_path, page) in enumerate(zip(paths, pages, strict=True)):
        tiles = in_threads(tile, page, worker_count(), _from(project, number * TILES_A_PAGE, len(chosen)))
        title = f"{project.name}: {len(chosen)} of {len(seen.records)} cases"
        title += f", page {number + 1} of {len(pages)}" if len(pages) > 1 else ""
        contact_sheet(page_path, tiles, labels, title + (f" ({left_out} left out)" if left_out else ""))
    return paths, left_out


def _from(project: Project, before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: project.reporter.progress("pictures", before + done, total)
