"""The course of a pretraining as a table and as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from diffseg_nnunet.training.history import History


def course(epochs: int) -> History:
    history = History()
    for epoch in range(epochs):
        losses = {f"{part}_loss": np.float32(3 - epoch) for part in ("training", "validation")}
        history.add({"epoch": epoch, **losses})
    return history


def test_rows_are_plain_numbers_and_can_be_continued(tmp_path: Path) -> None:
    history = course(2)
    assert all(type(value) is float for row in history.rows for value in row.values())
    resumed = History(history.rows)
    resumed.add({"epoch": 2, "training_loss": 1, "validation_loss": 1})
    resumed.write(tmp_path)
    table = pd.read_csv(tmp_path / "history.csv")
    assert table["epoch"].tolist() == [0, 1, 2]
    assert table["training_loss"].tolist() == [3, 2, 1]
    assert len(history.rows) == 2


def test_plot(tmp_path: Path) -> None:
    course(3).plot(tmp_path / "progress.png")
    with Image.open(tmp_path / "progress.png") as picture:
        assert np.asarray(picture).std() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["progress.png"]
