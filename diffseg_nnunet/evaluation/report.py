"""Write an evaluation as JSON, CSV and a table for the terminal."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from diffseg_nnunet.atomic import write_file, write_json
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.evaluation.statistics import CaseFailure, CaseMean, Estimate, Evaluation, ScoreRow, Summary

if TYPE_CHECKING:
    from rich.table import Table

SCORES_JSON = "scores.json"
SCORES_CSV = "scores.csv"
SUMMARY_CSV = "summary.csv"
_SCORES = ("dsc", "nsd", "hd95_mm")
_SUMMARY_COLUMNS = (
    "structure",
    *(f"{score}_{part}" for score in _SCORES for part in ("mean", "ci_low", "ci_high", "n")),
    "n_undefined_hd95",
    "n_both_empty",
)


def write_report(evaluation: Evaluation, folder: Path | str) -> dict[str, Path]:
    """Write the three files, each whole or not at all; files of an earlier report are replaced.

    - ``scores.json``: the whole `Evaluation`, undefined values as null.
    - ``scores.csv``: a row per case and structure, undefined values empty.
    - ``summary.csv``: a row per structure with means and confidence intervals, undefined values empty.

    Returns:
        File name to path.
    """
    folder = Path(folder)
    rows = pd.DataFrame([asdict(row) for row in evaluation.rows], columns=[field.name for field in fields(ScoreRow)])
    summaries = pd.DataFrame([_summary_row(summary) for summary in evaluation.structures], columns=_SUMMARY_COLUMNS)
    paths = {name: folder / name for name in (SCORES_JSON, SCORES_CSV, SUMMARY_CSV)}
    write_file(paths[SCORES_CSV], lambda temporary: rows.to_csv(temporary, index=False))
    write_file(paths[SUMMARY_CSV], lambda temporary: summaries.to_csv(temporary, index=False))
    # Last: who finds scores.json finds all three.
    write_json(paths[SCORES_JSON], as_plain(evaluation))
    return paths


def read_report(folder: Path | str) -> Evaluation:
    """The evaluation that `write_report` wrote into a folder; the inverse of `as_plain`.

    Raises:
        BadInputError: there is no such report, or it is none of ours.
    """
    path = Path(folder) / SCORES_JSON
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Evaluation(
            rows=tuple(ScoreRow(**_with_nan(row)) for row in content["rows"]),
            structures=tuple(_summary(summary) for summary in content["structures"]),
            case_means=tuple(CaseMean(**_with_nan(mean)) for mean in content["case_means"]),
            overall=_summary(content["overall"]),
            settings=content["settings"],
            failures=tuple(CaseFailure(**failure) for failure in content["failures"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInputError(f"{path} is no report of an evaluation: {error}.", "Evaluate again.") from error


def _summary(content: dict[str, Any]) -> Summary:
    def estimate(plain: dict[str, Any]) -> Estimate:
        return Estimate(**{**plain, "mean": math.nan if plain["mean"] is None else plain["mean"]})

    return Summary(**{**content, **{score: estimate(content[score]) for score in _SCORES}})


def _with_nan(content: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in content.items()}


def as_plain(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation as dicts, lists, strings and numbers that JSON knows; NaN becomes None."""
    return _without_nan(asdict(evaluation))


def summary_table(evaluation: Evaluation) -> Table:
    """A table for the terminal: a row per structure, then the mean over structures; rules and failures below it."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape  # else intervals and names in square brackets would be read as markup
    from rich.table import Table

    settings = evaluation.settings
    n_cases, n_failures = len(evaluation.case_means), len(evaluation.failures)
    caption = f"Means over cases [{settings['interval']['confidence']:.0%} confidence interval]. "
    caption += settings["absent_structures"]
    if n_failures:
        caption += f" Failed and left out: {n_failures} of {n_cases + n_failures} cases."
    title = f"Evaluation of {n_cases} case" + "s" * (n_cases != 1)
    table = Table(title=title, caption=escape(caption), caption_justify="left", box=SIMPLE_HEAD)
    table.add_column("structure", overflow="fold")
    headings = ["DSC", f"NSD at {settings['tolerance_mm']:g} mm", "HD95 (mm)"]
    some_undefined = evaluation.overall.n_undefined_hd95 > 0
    for heading in [*headings, "no HD95"] if some_undefined else headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for summary in (*evaluation.structures, evaluation.overall):
        if summary is evaluation.overall:
            table.add_section()
        cells = _cells(summary) if some_undefined else _cells(summary)[:-1]
        table.add_row(*map(escape, cells))
    return table


def _summary_row(summary: Summary) -> dict[str, Any]:
    row: dict[str, Any] = {"structure": summary.structure}
    for score in _SCORES:
        estimate: Estimate = getattr(summary, score)
        row |= {f"{score}_{part}": getattr(estimate, part) for part in ("mean", "ci_low", "ci_high", "n")}
    return row | {"n_undefined_hd95": summary.n_undefined_hd95, "n_both_empty": summary.n_both_empty}


def _cells(summary: Summary) -> tuple[str, ...]:
    scores = (_estimate(summary.dsc, 3), _estimate(summary.nsd, 3), _estimate(summary.hd95_mm, 1))
    return (summary.structure, *scores, str(summary.n_undefined_hd95))


def _estimate(estimate: Estimate, digits: int) -> str:
    if estimate.n == 0:
        return "–"
    mean = f"{estimate.mean:.{digits}f}"
    if estimate.ci_low is None or estimate.ci_high is None:
        return mean
    return f"{mean} [{estimate.ci_low:.{digits}f}, {estimate.ci_high:.{digits}f}]"


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
