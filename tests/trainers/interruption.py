"""Trainings that are stopped in the middle of an epoch."""

from __future__ import annotations

from typing import Any

import pytest


class InterruptedRunError(Exception):
    """Stands in for Ctrl-C, which would end pytest."""


def train_until(trainer: Any, iteration: int) -> None:
    """Train an initialised trainer, which is stopped after an iteration as if by Ctrl-C."""

    def progress(done: int, _total: int, news: str) -> None:
        if done == iteration and not news:
            raise InterruptedRunError

    trainer.progress = progress
    with pytest.raises(InterruptedRunError):
        trainer.run_training()
