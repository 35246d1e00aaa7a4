"""What TensorBoard is told, read back by TensorBoard's own reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffseg_nnunet.trainers import DiffSegPretrainer, DiffSegTrainer

pytest.importorskip("tensorboard")


def scalars(folder: Path) -> dict[str, list[int]]:
    """Steps of each scalar in the event files of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize(
    ("trainer_class", "expected"),
    [
        (DiffSegPretrainer, {"training_loss", "validation_denoising", "learning_rate"}),
        (DiffSegTrainer, {"train_losses", "val_losses", "lrs", "ema_fg_dice"}),
    ],
)
def test_curves_are_written(new_trainer: Callable[..., Any], trainer_class: type, expected: set[str]) -> None:
    trainer = new_trainer(trainer_class, iterations=2)
    trainer.initialize()
    trainer.run_training()
    found = scalars(Path(trainer.output_folder) / "tensorboard")
    assert expected <= set(found)
    assert all(found[name] == [0, 1] for name in expected)
