"""Settings take the plan's values, can be changed one by one, and survive JSON."""

from __future__ import annotations

import json

import pytest

from diffseg_nnunet.coordinates.head import CoordinateSettings
from diffseg_nnunet.diffusion.gaussian import DiffusionSettings
from diffseg_nnunet.training.settings import PretrainingSettings, TrainingSettings

SECTION = {
    "diffusion": DiffusionSettings(timesteps=50, schedule="cosine", fold_timestep=7).to_json(),
    "coordinates": CoordinateSettings(mode="none").to_json(),
    "backbone": "plain",
}


def test_default_length_is_nnunets() -> None:
    assert (TrainingSettings().epochs.epochs, TrainingSettings().epochs.iterations_per_epoch) == (1000, 250)


def test_pretraining_takes_what_the_plan_states() -> None:
    chosen = PretrainingSettings.from_plan(json.loads(json.dumps(SECTION)), iterations=30, seed=4)
    assert chosen.diffusion == DiffusionSettings(timesteps=50, schedule="cosine", fold_timestep=7)
    assert chosen.coordinates.mode == "none"
    assert (chosen.iterations, chosen.seed) == (30, 4)
    assert chosen.ema_decay == PretrainingSettings().ema_decay


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(TypeError, match="batch"):
        PretrainingSettings.from_plan(SECTION, batch=3)


@pytest.mark.parametrize("chosen", [TrainingSettings(seed=3), PretrainingSettings.from_plan(SECTION, workers=2)])
def test_settings_survive_json(chosen: TrainingSettings) -> None:
    stored = json.loads(json.dumps(chosen.to_json()))
    for name, kind in (("diffusion", DiffusionSettings), ("coordinates", CoordinateSettings)):
        if name in stored:
            stored[name] = kind(**stored[name])
    assert type(chosen)(**stored) == chosen
