"""What the terminal, and a page, show of an evaluation and of a comparison."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.markup import escape  # else intervals and names in square brackets would be read as markup
from rich.table import Table

from diffseg_nnunet.evaluation.comparison import Comparison, PairedScore
from diffseg_nnunet.evaluation.statistics import ALL_STRUCTURES, Estimate, Evaluation, Summary

UNDEFINED = "–"
_SHOWN_METRICS = {"dsc": ("DSC", 3), "nsd": ("NSD", 3), "hd95_mm": ("HD95 (mm)", 1)}


def summary_table(evaluation: Evaluation) -> Table:
    """A row per structure, then the mean over structures; rules and failures below it."""
    caption, header, rows = summary_rows(evaluation)
    n_cases = len(evaluation.case_means)
    table = _table(f"Evaluation of {n_cases} case{'s' * (n_cases != 1)}{_by_protocol(evaluation)}", caption)
    for heading in header[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows[:-1]:
        table.add_row(*map(escape, row))
    table.add_section()
    table.add_row(*map(escape, rows[-1]))
    return table


def summary_rows(evaluation: Evaluation) -> tuple[str, list[str], list[list[str]]]:
    """Of the table of structures: what its figures are, its header, and a row per structure, their mean last."""
    settings = evaluation.settings
    n_cases, n_failures = len(evaluation.case_means), len(evaluation.failures)
    caption = f"Means over cases [{settings['interval']['confidence']:.0%} confidence interval]. "
    caption += " ".join(_rules(evaluation))
    if n_failures:
        caption += f" Failed and left out: {n_failures} of {n_cases + n_failures} cases."
    tolerance = settings["tolerance_mm"]
    own_tolerances = tolerance is None
    header = ["structure", "DSC", "NSD" if own_tolerances else f"NSD at {tolerance:g} mm"]
    header += ["tolerance (mm)"] * own_tolerances + ["HD95 (mm)", "ASSD (mm)", "volume error"]
    some_undefined = evaluation.overall.n_undefined_hd95 > 0
    rows = []
    for summary in (*evaluation.structures, evaluation.overall):
        cells = _cells(summary)
        if own_tolerances:
            structure = settings["structures"].get(summary.structure)
            cells.insert(3, f"{structure['tolerance_mm']:g}" if structure else "")
        rows.append(cells if some_undefined else cells[:-1])
    return caption, [*header, "no HD95"] if some_undefined else header, rows


def comparison_table(comparison: Comparison) -> Table:
    """A row per structure and shown score: difference, p and who wins; the mean over structures last."""
    n = len(comparison.cases)
    caption, header, rows = comparison_rows(comparison)
    table = _table(f"Prediction minus against, {n} case{'s' * (n != 1)}", caption)
    for heading in header[1:]:
        table.add_column(heading, justify="left" if heading == "score" else "right", no_wrap=True)
    for row in rows:
        if row[0] == ALL_STRUCTURES:
            table.add_section()
        table.add_row(*map(escape, row))
    return table


def comparison_rows(comparison: Comparison) -> tuple[str, list[str], list[list[str]]]:
    """Of the table of differences: how they are tested, its header, and a row per structure and shown score; the
    structure's name stands in its first row."""
    caption = comparison.method
    if comparison.left_out:
        caption += f" Failed on one side and left out: {', '.join(comparison.left_out)}."
    rows, previous = [], None
    for score in comparison.scores:
        if score.metric not in _SHOWN_METRICS:
            continue
        rows.append(["" if score.structure == previous else score.structure, *_comparison_cells(score)])
        previous = score.structure
    return caption, ["structure", "score", "difference", "p", "p (Holm)", "effect", "wins/ties/losses"], rows


def _table(title: str, caption: str) -> Table:
    table = Table(title=title, caption=escape(caption), caption_justify="left", box=SIMPLE_HEAD)
    table.add_column("structure", overflow="fold", min_width=12)
    return table


def _rules(evaluation: Evaluation) -> list[str]:
    protocol = evaluation.settings.get("protocol")  # reports of version 0.1 have none
    return protocol["rules"] if protocol else [evaluation.settings["absent_structures"]]


def _by_protocol(evaluation: Evaluation) -> str:
    protocol = evaluation.settings.get("protocol")
    if protocol is None or protocol["name"] == "plain":
        return ""
    return f" by {protocol['name']}" + (f", revision {protocol['revision']}" if protocol["revision"] else "")


def _cells(summary: Summary) -> list[str]:
    scores = [
        estimate_text(summary.dsc, 3),
        estimate_text(summary.nsd, 3),
        estimate_text(summary.hd95_mm, 1),
        _mean(summary.assd_mm, "{:.2f}"),
        _mean(summary.volume_error_relative, "{:+.1%}"),
    ]
    return [summary.structure, *scores, str(summary.n_undefined_hd95)]


def _comparison_cells(score: PairedScore) -> tuple[str, ...]:
    heading, digits = _SHOWN_METRICS[score.metric]
    effect = UNDEFINED if score.rank_biserial is None else f"{score.rank_biserial:+.2f}"
    counts = f"{score.wins}/{score.ties}/{score.losses}"
    return heading, estimate_text(score.difference, digits, "+"), p_text(score.p), p_text(score.p_holm), effect, counts


def p_text(p: float | None) -> str:
    """A p-value, or UNDEFINED."""
    if p is None:
        return UNDEFINED
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _mean(estimate: Estimate, form: str) -> str:
    return form.format(estimate.mean) if estimate.n else UNDEFINED


def estimate_text(estimate: Estimate, digits: int, sign: str = "") -> str:
    """Mean and interval, "0.812 [0.790, 0.830]"; UNDEFINED where nothing is defined."""
    if estimate.n == 0:
        return UNDEFINED
    mean = f"{estimate.mean:{sign}.{digits}f}"
    if estimate.ci_low is None or estimate.ci_high is None:
        return mean
    return f"{mean} [{estimate.ci_low:{sign}.{digits}f}, {estimate.ci_high:{sign}.{digits}f}]"
