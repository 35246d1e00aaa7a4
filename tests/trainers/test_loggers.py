"""What TensorBoard is told, read back by TensorBoard's own reader; and when a run of W&B ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nnunetv2.training.logging.nnunet_logger import WandbLogger

from diffseg_nnunet.pipeline import jobs
from diffseg_nnunet.trainers import DiffSegPretrainer, DiffSegTrainer
from diffseg_nnunet.trainers.loggers import close, log_picture

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


class RecordedRun:
    """Keeps what a run of W&B is told, which takes nothing once it has ended."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.exit_codes: list[int] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        assert not self.exit_codes, "the run has ended"
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


class OfflineWandbLogger(WandbLogger):
    """nnU-Net's, with a run that stays here."""

    def __init__(self) -> None:
        self.run, self.resume, self.wandb_init_step = RecordedRun(), False, 0


@pytest.mark.parametrize("failed", [False, True])
def test_a_run_of_wandb_ends_with_its_training(failed: bool) -> None:
    logger = OfflineWandbLogger()
    close([logger, SimpleNamespace()], failed)
    assert logger.run.exit_codes == [int(failed)]


def test_a_run_of_wandb_ends_where_the_training_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next training of the process, as in `diffseg run`, would go on with it."""
    logger = OfflineWandbLogger()

    class Failing(SimpleNamespace):
        def apply(self, _settings: Any) -> None:
            raise KeyboardInterrupt

        def close_loggers(self, failed: bool = False) -> None:
            close([logger], failed)

    monkeypatch.setattr(jobs, "_build_trainer", lambda _job: Failing())
    with pytest.raises(KeyboardInterrupt):
        jobs._train(SimpleNamespace(settings=None))
    assert logger.run.exit_codes == [1]


def test_wandb_gets_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=lambda path: ("picture", path)))
    logger = OfflineWandbLogger()
    log_picture([logger, SimpleNamespace()], "denoising", Path("epoch_0003.png"), 3)
    assert logger.run.logged == [(3, {"denoising": ("picture", "epoch_0003.png")})]


@pytest.mark.parametrize("trainer_class", [DiffSegPretrainer, DiffSegTrainer])
def test_a_trained_trainer_has_ended_its_run(new_trainer: Callable[..., Any], trainer_class: type) -> None:
    trainer = new_trainer(trainer_class, iterations=1)
    logger = OfflineWandbLogger()
    trainer.logger.loggers.append(logger)
    trainer.initialize()
    trainer.run_training()
    assert logger.run.exit_codes == [0]
    assert {step for step, _ in logger.run.logged} == {0}
