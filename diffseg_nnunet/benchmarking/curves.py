"""The course of a training, by which one sees whether a network was trained until it learned no more."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from diffseg_nnunet.atomic import write_text

CURVE_CSV = "learning_curve.csv"
CURVE_METHOD = (
    "Pseudo DSC is nnU-Net's: over patches of the validation part, which here are the test cases; it is watched, and "
    "chooses nothing: what is tested is always the last network. The gain is its mean over the last fifth of the "
    "epochs minus that over the fifth before, as it was measured; the picture shows it smoothed (0.9), as nnU-Net's "
    "own does. A twin that still gains is not trained to its end."
)
_LAST_SHARE = 0.2
_LOGGED = {
    "training_loss": "train_losses",
    "validation_loss": "val_losses",
    "pseudo_dsc": "mean_fg_dice",
    "smoothed_pseudo_dsc": "ema_fg_dice",
}
"""Our names -> nnU-Net's logger's."""


@dataclass(frozen=True)
class LearningCurve:
    """One value an epoch, each; `iteration` is that at the epoch's end."""

    iteration: tuple[float, ...]
    training_loss: tuple[float, ...]
    validation_loss: tuple[float, ...]
    pseudo_dsc: tuple[float, ...]
    smoothed_pseudo_dsc: tuple[float, ...]

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any], iterations_per_epoch: int) -> LearningCurve:
        """Of a trained checkpoint, in nnU-Net's format."""
        logged = {name: [float(value) for value in checkpoint["logging"][key]] for name, key in _LOGGED.items()}
        epochs = min(map(len, logged.values()))
        iteration = tuple(float(iterations_per_epoch * (epoch + 1)) for epoch in range(epochs))
        return cls(iteration, **{name: tuple(values[:epochs]) for name, values in logged.items()})

    @property
    def last_gain(self) -> float | None:
        """Mean pseudo DSC of the last fifth of the epochs minus that of the fifth before; None where that is no epoch.

        Not of the smoothed one: its lag of ten epochs would show a rise where there is none any more.
        """
        values, last = self.pseudo_dsc, round(_LAST_SHARE * len(self.pseudo_dsc))
        return fmean(values[-last:]) - fmean(values[-2 * last : -last]) if last else None

    def write(self, folder: Path) -> None:
        """One row an epoch."""
        names = [each.name for each in fields(self)]
        rows = zip(*(getattr(self, name) for name in names), strict=True)
        lines = [",".join(names), *(",".join(f"{value:.6g}" for value in row) for row in rows)]
        write_text(folder / CURVE_CSV, "\n".join(lines) + "\n")

    @classmethod
    def read(cls, folder: Path) -> LearningCurve | None:
        """None where there is none."""
        path = folder / CURVE_CSV
        if not path.is_file():
            return None
        with open(path, encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        return cls(**{each.name: tuple(float(row[each.name]) for row in rows) for each in fields(cls)})
