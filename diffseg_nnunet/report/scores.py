"""An evaluation on a page: the table of structures, all cases, and how it compares with another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from diffseg_nnunet.evaluation.comparison import Comparison
from diffseg_nnunet.evaluation.statistics import Evaluation
from diffseg_nnunet.evaluation.tables import UNDEFINED, comparison_rows, summary_rows
from diffseg_nnunet.report.page import Paragraph, Part, Section, Table, write_page

PAGE = "report.html"


def write_evaluation_page(folder: Path, evaluation: Evaluation, comparison: Comparison | None = None) -> Path:
    """Write ``report.html`` into the folder of an evaluation's report.

    Args:
        comparison: with other predictions of the same cases.
    """
    sections = [Section("Scores", list(score_parts(evaluation)))]
    if comparison is not None:
        sections.append(Section("Prediction minus against", [Table(*comparison_rows(comparison))]))
    protocol = evaluation.settings["protocol"]
    rules = protocol["name"] + (f", revision {protocol['revision']}" if protocol["revision"] else "")
    path = folder / PAGE
    write_page(path, f"Evaluation of {len(evaluation.case_means)} case(s)", f"Protocol {rules}", sections)
    return path


def score_parts(evaluation: Evaluation) -> Iterator[Part]:
    """Means with their intervals and rules, what is to be looked at, and each case, worst first."""
    for failure in evaluation.failures:
        yield Paragraph(f"{failure.case} was set aside: {failure.reason}", warning=True)
    caption, header, rows = summary_rows(evaluation)
    yield Table(caption, header, rows)
    if evaluation.official:
        official = "; ".join(f"{name}: {mean:.4f}" for name, mean in evaluation.official.items())
        yield Paragraph(f"By the official rules: {official}.")
    for side, names in evaluation.settings.get("unmatched", {}).items():
        if names:
            yield Paragraph(f"Not scored, of the {side}: {', '.join(names)}.")
    for remark in evaluation.remarks:
        yield Paragraph(f"{remark.case}, {remark.structure}: {remark.text}", warning=True)
    yield _cases(evaluation)


def _cases(evaluation: Evaluation) -> Table:
    structures = [summary.structure for summary in evaluation.structures]
    scores = {(row.case, row.structure): row.dsc for row in evaluation.rows}
    means = sorted(evaluation.case_means, key=lambda mean: (mean.dsc != mean.dsc, mean.dsc))
    rows = [
        [
            mean.case,
            *map(_shown, (mean.dsc, mean.nsd)),
            *(_shown(scores.get((mean.case, structure), float("nan"))) for structure in structures),
        ]
        for mean in means
    ]
    return Table(f"DSC of all {len(rows)} cases, worst first", ["case", "mean", "NSD", *structures], rows, folded=True)


def _shown(score: float) -> str:
    return UNDEFINED if score != score else f"{score:.3f}"
