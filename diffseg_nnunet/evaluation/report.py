"""Write an evaluation as JSON and CSV, and read it again; `tables` has what the terminal shows."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pandas as pd

from diffseg_nnunet.atomic import write_file, write_json
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.evaluation.comparison import Comparison
from diffseg_nnunet.evaluation.official import OFFICIAL_CSV, write_official_table
from diffseg_nnunet.evaluation.protocols import find_protocol
from diffseg_nnunet.evaluation.statistics import (
    METRICS,
    CaseFailure,
    CaseMean,
    Estimate,
    Evaluation,
    Remark,
    ScoreRow,
    Summary,
    WorstCase,
)

SCORES_JSON = "scores.json"
SCORES_CSV = "scores.csv"
SUMMARY_CSV = "summary.csv"
COMPARISON_JSON = "comparison.json"
COMPARISON_CSV = "comparison.csv"
_FIRST_METRICS, _LATER_METRICS = METRICS[:3], METRICS[3:]
_PARTS = ("mean", "ci_low", "ci_high", "n")
_SUMMARY_COLUMNS = (
    "structure",
    *(f"{metric}_{part}" for metric in _FIRST_METRICS for part in _PARTS),
    "n_undefined_hd95",
    "n_both_empty",
    # Later ones come last: who reads by column number finds the earlier ones where they were.
    *(f"{metric}_{part}" for metric in _LATER_METRICS for part in _PARTS),
)


def write_report(evaluation: Evaluation, folder: Path | str) -> dict[str, Path]:
    """Write the files, each whole or not at all; files of an earlier report are replaced, its comparison removed.

    - ``scores.json``: the whole `Evaluation`, undefined values as null.
    - ``scores.csv``: a row per case and structure, undefined values empty.
    - ``summary.csv``: a row per structure with means and confidence intervals, undefined values empty.
    - ``official.csv``: under an official protocol, its own table.

    Returns:
        File name to path.
    """
    folder = Path(folder)
    rows = pd.DataFrame([asdict(row) for row in evaluation.rows], columns=[field.name for field in fields(ScoreRow)])
    summaries = pd.DataFrame([_summary_row(summary) for summary in evaluation.structures], columns=_SUMMARY_COLUMNS)
    paths = {name: folder / name for name in (SCORES_JSON, SCORES_CSV, SUMMARY_CSV)}
    for outdated in (OFFICIAL_CSV, COMPARISON_CSV, COMPARISON_JSON):
        (folder / outdated).unlink(missing_ok=True)
    write_file(paths[SCORES_CSV], lambda temporary: rows.to_csv(temporary, index=False))
    write_file(paths[SUMMARY_CSV], lambda temporary: summaries.to_csv(temporary, index=False))
    settings = evaluation.settings["protocol"]
    protocol = find_protocol(settings["name"], settings["revision"])
    if protocol.official_names:
        paths[OFFICIAL_CSV] = write_official_table(evaluation.rows, protocol, folder)
    # Last: who finds scores.json finds all of them.
    write_json(paths[SCORES_JSON], as_plain(evaluation))
    return paths


def write_comparison(comparison: Comparison, folder: Path | str) -> dict[str, Path]:
    """Write ``comparison.csv``, a row per structure and score, and ``comparison.json``, all of it.

    Returns:
        File name to path.
    """
    folder = Path(folder)
    paths = {name: folder / name for name in (COMPARISON_CSV, COMPARISON_JSON)}
    table = pd.DataFrame([_flat(asdict(score)) for score in comparison.scores])
    write_file(paths[COMPARISON_CSV], lambda temporary: table.to_csv(temporary, index=False))
    write_json(paths[COMPARISON_JSON], _without_nan(asdict(comparison)))
    return paths


def _flat(score: dict[str, Any]) -> dict[str, Any]:
    """The difference's parts as columns of their own."""
    parts = {f"difference_{part}": value for part, value in score["difference"].items()}
    flat: dict[str, Any] = {}
    for key, value in score.items():
        flat |= parts if key == "difference" else {key: value}
    return flat


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
            worst_cases=tuple(WorstCase(**worst) for worst in content.get("worst_cases", ())),
            remarks=tuple(Remark(**remark) for remark in content.get("remarks", ())),
            official=_with_nan(content.get("official", {})),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInputError(f"{path} is no report of an evaluation: {error}.", "Evaluate again.") from error


def _summary(content: dict[str, Any]) -> Summary:
    def estimate(plain: dict[str, Any]) -> Estimate:
        return Estimate(**{**plain, "mean": math.nan if plain["mean"] is None else plain["mean"]})

    return Summary(**{**content, **{metric: estimate(content[metric]) for metric in METRICS if metric in content}})


def _with_nan(content: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in content.items()}


def as_plain(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation as dicts, lists, strings and numbers that JSON knows; NaN becomes None."""
    return _without_nan(asdict(evaluation))


def _summary_row(summary: Summary) -> dict[str, Any]:
    row: dict[str, Any] = {"structure": summary.structure}
    for metric in METRICS:
        estimate: Estimate = getattr(summary, metric)
        row |= {f"{metric}_{part}": getattr(estimate, part) for part in _PARTS}
    return row | {"n_undefined_hd95": summary.n_undefined_hd95, "n_both_empty": summary.n_both_empty}


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
