"""A benchmark's result as Markdown for readers and as rows for machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffseg_nnunet.benchmarking.curves import CURVE_METHOD, LearningCurve
from diffseg_nnunet.benchmarking.protocol import TWIN
from diffseg_nnunet.benchmarking.published import PublishedFigure
from diffseg_nnunet.benchmarking.results import SHOWN_METRICS, Group
from diffseg_nnunet.benchmarking.runs import Run
from diffseg_nnunet.evaluation.statistics import ALL_STRUCTURES, Estimate
from diffseg_nnunet.evaluation.tables import UNDEFINED, estimate_text, p_text

CSV_COLUMNS = (
    *("strategy", "labels", "labelled_cases", "seeds", "structure", "metric", "mean", "ci_low", "ci_high", "cases"),
    *("undefined", "seed_deviation", "seed_min", "seed_max"),
    *("difference", "difference_ci_low", "difference_ci_high", "p", "p_holm_budgets", "p_holm_structures"),
    *("rank_biserial", "wins", "ties", "losses"),
)
MAIN_HEADER = (
    *("labels", "labelled cases", "strategy", "seeds", "DSC", "over seeds", "NSD", "HD95 (mm)"),
    *("DSC minus twin", "p", "p (Holm)", "wins/ties/losses"),
)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def main_table(groups: Sequence[Group]) -> str:
    """The means over structures, as Markdown."""
    return markdown_table(MAIN_HEADER, main_rows(groups))


def main_rows(groups: Sequence[Group]) -> list[list[str]]:
    """Cells under MAIN_HEADER, a row for each budget and strategy."""
    return [_main_row(each) for each in by_budget(groups)]


def _main_row(each: Group) -> list[str]:
    overall, paired = each.evaluation.overall, each.paired("dsc")
    comparison = [UNDEFINED] * 4
    if paired is not None:
        p_holm = (each.p_holm or {}).get("dsc")
        counts = f"{paired.wins}/{paired.ties}/{paired.losses}"
        comparison = [estimate_text(paired.difference, 3, "+"), p_text(paired.p), p_text(p_holm), counts]
    spread = each.spread("dsc")
    low, high = spread.range
    over_seeds = UNDEFINED if spread.deviation is None else f"± {spread.deviation:.3f} ({low:.3f} to {high:.3f})"
    return [
        each.labels,
        f"{each.labelled_cases:g}",
        f"{each.strategy} (twin)" if each.strategy == TWIN else each.strategy,
        ", ".join(map(str, each.seeds)),
        estimate_text(overall.dsc, 3),
        over_seeds,
        estimate_text(overall.nsd, 3),
        estimate_text(overall.hd95_mm, 1),
        *comparison,
    ]


def structure_tables(groups: Sequence[Group]) -> Iterator[tuple[str, str]]:
    """(budget, table of the DSC: a row a structure, a column a strategy, and its difference to the twin)."""
    for labels in dict.fromkeys(each.labels for each in by_budget(groups)):
        own = [each for each in groups if each.labels == labels]
        header = ["structure"]
        for each in own:
            header += [each.strategy] if each.strategy == TWIN else [each.strategy, "minus twin"]
        names = [summary.structure for summary in own[0].evaluation.structures]
        yield labels, markdown_table(header, [_structure_row(name, own) for name in (*names, ALL_STRUCTURES)])


def _structure_row(name: str, groups: Sequence[Group]) -> list[str]:
    cells = [name]
    for each in groups:
        summaries = (*each.evaluation.structures, each.evaluation.overall)
        cells.append(next(estimate_text(summary.dsc, 3) for summary in summaries if summary.structure == name))
        if each.strategy != TWIN:
            paired = each.paired("dsc", name)
            cells.append(UNDEFINED if paired is None else estimate_text(paired.difference, 3, "+"))
    return cells


def published_section(beside: Sequence[PublishedFigure], apart: Sequence[tuple[PublishedFigure, str]]) -> Iterator[str]:
    """What stands beside our figures, and why the rest does not."""
    if beside:
        rows = [[f"{each.labelled_cases}", f"{each.dsc:.2f}", each.method, each.source, each.remark] for each in beside]
        yield "Same split, organs, rules and number of labelled cases as ours:"
        yield markdown_table(("labelled cases", "DSC (%)", "method", "source", "remark"), rows)
    else:
        yield "No published figure that is known here has this split, these organs, these rules and these labels."
    if apart:
        rows = [[each.method, reason, each.source] for each, reason in apart]
        yield "Not comparable, and so not quoted:"
        yield markdown_table(("method", "why", "source"), rows)


def curve_section(curves: Mapping[Run, LearningCurve]) -> Iterator[str]:
    """By how much each training still gained towards its end."""
    rows: dict[tuple[str, str], list[float]] = {}
    for run, curve in curves.items():
        if (gain := curve.last_gain) is not None:
            rows.setdefault((run.labels, run.strategy), []).append(gain)
    if rows:
        cells = [[*key, f"{min(own):+.3f} to {max(own):+.3f}"] for key, own in rows.items()]
        yield markdown_table(("labels", "strategy", "gain in the last fifth, lowest to highest"), cells)
    yield CURVE_METHOD


def csv_rows(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """One row for each strategy, budget, structure and score, in the columns CSV_COLUMNS."""
    for each in by_budget(groups):
        for summary in (*each.evaluation.structures, each.evaluation.overall):
            for metric in SHOWN_METRICS:
                yield _csv_row(each, summary.structure, metric, getattr(summary, metric))


def _csv_row(each: Group, structure: str, metric: str, found: Estimate) -> dict[str, Any]:
    spread, paired = each.spread(metric, structure), each.paired(metric, structure)
    low, high = spread.range
    row = {
        "strategy": each.strategy,
        "labels": each.labels,
        "labelled_cases": each.labelled_cases,
        "seeds": len(each.seeds),
        "structure": structure,
        "metric": metric,
        "mean": found.mean,
        "ci_low": found.ci_low,
        "ci_high": found.ci_high,
        "cases": found.n,
        "undefined": found.n_undefined,
        "seed_deviation": spread.deviation,
        "seed_min": low,
        "seed_max": high,
    }
    if paired is None:
        return row
    return row | {
        "difference": paired.difference.mean,
        "difference_ci_low": paired.difference.ci_low,
        "difference_ci_high": paired.difference.ci_high,
        "p": paired.p,
        "p_holm_budgets": (each.p_holm or {}).get(metric) if structure == ALL_STRUCTURES else None,
        "p_holm_structures": paired.p_holm,
        "rank_biserial": paired.rank_biserial,
        "wins": paired.wins,
        "ties": paired.ties,
        "losses": paired.losses,
    }


def by_budget(groups: Sequence[Group]) -> list[Group]:
    """In the order of the budgets, the twin first within each."""
    budgets = list(dict.fromkeys(each.labels for each in groups))
    return sorted(groups, key=lambda each: (budgets.index(each.labels), each.strategy != TWIN))
