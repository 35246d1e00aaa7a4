"""Tables and means in the form in which the FLARE challenges' own scripts give them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from diffseg_nnunet.atomic import write_file
from diffseg_nnunet.evaluation.protocols import Protocol
from diffseg_nnunet.evaluation.statistics import ScoreRow

OFFICIAL_CSV = "official.csv"
_MEASURES = ("dsc", "nsd")


def official_table(rows: Sequence[ScoreRow], protocol: Protocol) -> pd.DataFrame:
    """A row per case: Name, then <organ>_DSC and <organ>_NSD of all organs, as FLARE's scripts name them.

    Undefined scores, and organs that the labels lack, are NaN; Name is the case without the file's ending.
    """
    columns = dict(zip(protocol.structures, protocol.official_names, strict=True))
    names = [f"{column}_{measure.upper()}" for measure in _MEASURES for column in columns.values()]
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        of_case = table.setdefault(row.case, {})
        of_case |= {f"{columns[row.structure]}_{measure.upper()}": getattr(row, measure) for measure in _MEASURES}
    frame = pd.DataFrame(list(table.values()), columns=names, dtype=float)
    frame.insert(0, "Name", list(table))
    return frame


def official_means(rows: Sequence[ScoreRow], protocol: Protocol) -> dict[str, float]:
    """FLARE23's means: of each column over the cases, and of the organs' means without the lesion's, all rounded.

    Empty for protocols without such means. Where the labels lack an organ, or a score is undefined, the rest is
    averaged, which the official script would not do.
    """
    if protocol.organ_mean_without is None or not rows or protocol.digits is None:
        return {}
    table = official_table(rows, protocol).drop(columns="Name").dropna(axis=1, how="all")
    # numpy's mean and rounding, as the official script has them: pandas sums in another order
    means = {name: _mean(table[name].dropna().to_numpy(), protocol.digits) for name in table}
    columns = dict(zip(protocol.structures, protocol.official_names, strict=True))
    left_out = {columns[name] for name in protocol.organ_mean_without}
    for measure in ("DSC", "NSD"):
        of_organs = [means[name] for name in means if name.endswith(measure) and name.split("_")[0] not in left_out]
        if of_organs:
            means[f"Organ_{measure}"] = _mean(of_organs, protocol.digits)
    return means


def write_official_table(rows: Sequence[ScoreRow], protocol: Protocol, folder: Path) -> Path:
    """Write `official_table` as ``official.csv``."""
    path = folder / OFFICIAL_CSV
    frame = official_table(rows, protocol)
    write_file(path, lambda temporary: frame.to_csv(temporary, index=False))
    return path


def _mean(values: Sequence[float] | np.ndarray, digits: int) -> float:
    return float(np.round(np.mean(values), digits))
