"""The course of a pretraining: one row an epoch, as CSV and as a picture."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from diffseg_nnunet.atomic import write_file


class History:
    """Rows of floats, one an epoch; part of the checkpoint, so that a resumed run has the whole course."""

    def __init__(self, rows: list[dict[str, float]] | None = None):
        self.rows = list(rows or [])

    def add(self, row: dict[str, float]) -> None:
        self.rows.append({key: float(value) for key, value in row.items()})

    def write(self, folder: Path) -> None:
        """``history.csv`` in `folder`, atomically."""
        write_file(folder / "history.csv", lambda path: pd.DataFrame(self.rows).to_csv(path, index=False))

    def plot(self, path: Path) -> None:
        """One panel for each quantity, training and validation, over epochs."""
        from matplotlib.figure import Figure

        table = pd.DataFrame(self.rows)
        names = [column.removeprefix("training_") for column in table if column.startswith("training_")]
        figure = Figure(figsize=(8, 2.6 * len(names)), layout="constrained")
        for axes, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
            for part in ("training", "validation"):
                axes.plot(table["epoch"], table[f"{part}_{name}"], label=part)
            axes.set(xlabel="epoch", ylabel=name)
            axes.legend()
        write_file(path, lambda temporary: figure.savefig(temporary, dpi=100))
