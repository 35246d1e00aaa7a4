"""The pictures of a benchmark: DSC over the number of labelled cases, and the course of every training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

from diffseg_nnunet.atomic import write_file
from diffseg_nnunet.benchmarking.curves import LearningCurve
from diffseg_nnunet.benchmarking.protocol import TWIN
from diffseg_nnunet.benchmarking.published import PublishedFigure
from diffseg_nnunet.benchmarking.results import Group
from diffseg_nnunet.benchmarking.runs import Run
from diffseg_nnunet.budgets.budget import LabelBudget
from diffseg_nnunet.report.style import plain_style

Style = dict[str, str]
_DOTS_PER_INCH = 120
_COLUMNS = 3


@plain_style()
def draw_budget_curve(path: Path, groups: Sequence[Group], title: str, beside: Sequence[PublishedFigure] = ()) -> None:
    """Write a PNG of the mean DSC over labelled cases, one line a strategy, with the range of its seeds.

    Budgets of slices or voxels, which no number of cases tells apart, stand side by side in a panel of their own.
    """
    whole = [each for each in groups if not LabelBudget.parse(each.labels).is_sparse]
    sparse = [each for each in groups if LabelBudget.parse(each.labels).is_sparse]
    styles = _styles(each.strategy for each in groups)
    panels = [panel for panel in ((whole, _draw_cases), (sparse, _draw_sparse)) if panel[0]]
    if not panels:
        return
    figure = Figure(figsize=(1.5 + 4.5 * len(panels), 4.2), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    for axes, (members, draw) in zip(
        figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True
    ):
        draw(axes, members, styles)
        if members is whole:
            for each in beside:
                axes.plot([each.labelled_cases], [each.dsc / 100], "k*")
                axes.annotate(each.method, (each.labelled_cases, each.dsc / 100), fontsize="x-small", ha="right")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mean DSC of the test cases (bars: range of the seeds)")
    figure.axes[0].legend(fontsize="small")
    write_file(path, lambda temporary: figure.savefig(temporary, dpi=_DOTS_PER_INCH))


def _draw_cases(axes: Axes, groups: Sequence[Group], styles: Mapping[str, Style]) -> None:
    counts = sorted({each.labelled_cases for each in groups})
    for strategy, own in _by_strategy(groups).items():
        own = sorted(own, key=lambda each: each.labelled_cases)
        _line(axes, [each.labelled_cases for each in own], own, styles[strategy])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("labelled cases")


def _draw_sparse(axes: Axes, groups: Sequence[Group], styles: Mapping[str, Style]) -> None:
    labels = list(dict.fromkeys(each.labels for each in groups))
    for strategy, own in _by_strategy(groups).items():
        _line(axes, [labels.index(each.labels) for each in own], own, styles[strategy])
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_xlabel("labels in part of the cases")


def _line(axes: Axes, positions: Sequence[float], groups: Sequence[Group], style: Style) -> None:
    means = [each.evaluation.overall.dsc.mean for each in groups]
    ranges = [each.spread("dsc").range for each in groups]
    below = [max(0.0, mean - low) for mean, (low, _) in zip(means, ranges, strict=True)]
    above = [max(0.0, high - mean) for mean, (_, high) in zip(means, ranges, strict=True)]
    axes.errorbar(positions, means, yerr=(below, above), marker="o", capsize=3, **style)


def _styles(strategies: Iterable[str]) -> dict[str, Style]:
    """Strategy -> how its lines are drawn; the twin is black and dashed."""
    others = [strategy for strategy in dict.fromkeys(strategies) if strategy != TWIN]
    styles: dict[str, Style] = {name: {"color": f"C{number}", "label": name} for number, name in enumerate(others)}
    return styles | {TWIN: {"color": "black", "linestyle": "--", "label": f"{TWIN} (twin)"}}


def _by_strategy(groups: Sequence[Group]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for each in groups:
        found.setdefault(each.strategy, []).append(each)
    return found


@plain_style()
def draw_learning_curves(path: Path, curves: Mapping[Run, LearningCurve]) -> None:
    """Write a PNG of the smoothed pseudo DSC over iterations: a panel a budget, a line a run, a colour a strategy."""
    budgets = list(dict.fromkeys(run.labels for run in curves))
    if not budgets:
        return
    columns = min(_COLUMNS, len(budgets))
    rows = -(-len(budgets) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    styles = _styles(run.strategy for run in curves)
    for axes, labels in zip(panels, budgets, strict=False):
        for run, curve in curves.items():
            if run.labels == labels:
                axes.plot(curve.iteration, curve.smoothed_pseudo_dsc, linewidth=1, **styles[run.strategy])
        axes.set_title(labels, fontsize="small")
        axes.set(xlabel="iteration", ylabel="pseudo DSC")
        axes.grid(alpha=0.3)
        lines, names = axes.get_legend_handles_labels()
        once = dict(zip(names, lines, strict=True))  # a strategy has a line for each seed
        axes.legend(once.values(), once, fontsize="x-small")
    write_file(path, lambda temporary: figure.savefig(temporary, dpi=_DOTS_PER_INCH))
