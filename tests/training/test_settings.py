"""Settings take the plan's values, can be changed one by one, and survive JSON."""

from __future__ import annotations

import json

import pytest

from diffseg_nnunet.coordinates.head import CoordinateSettings
from diffseg_nnunet.diffusion.gaussian import DiffusionSettings
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline.stages import resolved, training_settings
from diffseg_nnunet.probing.settings import ProbeSettings
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


@pytest.mark.parametrize(
    ("strategy", "sgd", "adamw"), [("scratch", 1e-2, 2e-3), ("finetune", 1e-3, 2e-3), ("linear", 1e-2, 5e-2)]
)
def test_what_a_result_depends_on_has_the_rate_and_what_was_asked_for_has_not(
    strategy: str, sgd: float, adamw: float
) -> None:
    asked = training_settings(strategy, optimizer="adamw")
    assert asked.initial_lr is None
    assert resolved(asked, strategy).initial_lr == adamw
    assert resolved(training_settings(strategy), strategy).initial_lr == sgd
    assert resolved(training_settings(strategy, initial_lr=0.5), strategy).initial_lr == 0.5


def test_what_is_started_from_is_a_setting_of_those_that_start() -> None:
    assert training_settings("finetune").transfer == "encoder"
    assert training_settings("decoder").transfer == "all"
    for name, value in {"transfer": "all", "fold_timestep": 100}.items():
        assert getattr(training_settings("finetune", **{name: value}), name) == value
        for strategy in ("scratch", "linear"):
            with pytest.raises(BadInputError, match=f"does not go with --strategy {strategy}"):
                training_settings(strategy, **{name: value})


def test_probes_alone_may_leave_patches_as_they_are() -> None:
    assert not training_settings("linear").augment
    assert training_settings("pixel-ensemble", augment=True).augment
    with pytest.raises(BadInputError, match="--augment or --no-augment does not go with --strategy finetune"):
        training_settings("finetune", augment=False)


def test_what_a_probe_reads_is_scaled_to_the_diffusion_unless_it_was_asked_for() -> None:
    for strategy, noisy in (("linear", False), ("nonlinear", False), ("pixel-ensemble", True)):
        asked = training_settings(strategy)
        assert asked.time_steps is None, "with another network it means others"
        assert resolved(asked, strategy).probe == ProbeSettings((50, 150, 250), noisy)
        assert asked.reading(100).probe == ProbeSettings((5, 15, 25), noisy)
        assert asked.reading(None).probe == ProbeSettings(), "read clean, so that no option means nothing"
        assert asked.reading(None).noisy is False
        assert asked.reading(2).probe.time_steps == (0,), "each once"
        for given in ((), (400,)):
            assert training_settings(strategy, time_steps=given).reading(100).time_steps == given


@pytest.mark.parametrize("wrong", [(3, 3), (-1,), (0.5,)])
def test_time_steps_that_are_none(wrong: tuple) -> None:
    with pytest.raises(ValueError, match="time steps"):
        training_settings("linear", time_steps=wrong)
