"""Batches of noise have the form of the loaders' own, so that steps on them take the memory of real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffseg_nnunet.trainers import DiffSegPretrainer, DiffSegTrainer


def form(value: Any) -> Any:
    """Shapes and dtypes, in the value's own nesting; of texts their number."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return {key: form(each) for key, each in value.items()}
    if isinstance(value, list) and isinstance(value[0], torch.Tensor):
        return [form(each) for each in value]
    return len(value)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize(
    ("trainer_class", "settings"),
    [
        (DiffSegTrainer, {}),
        (DiffSegTrainer, {"keep_coordinates": 1.0}),
        (DiffSegPretrainer, {}),
        (DiffSegPretrainer, {"coordinates": {"mode": "none"}}),
    ],
)
def test_noise_has_the_form_of_a_real_batch(
    new_trainer: Callable[..., Any], trainer_class: type, settings: dict[str, Any], configuration: str
) -> None:
    trainer = new_trainer(trainer_class, configuration, **settings)
    trainer.initialize()
    loader, _ = trainer.build_loaders()
    real = next(loader.start_at(0, 0, 0, 1))
    noise = trainer.random_batch()
    assert form(noise) == form(real)
    if trainer_class is DiffSegPretrainer:
        assert noise["scan"].tolist() == real["scan"].tolist()
