"""The refiner's trainer: who learns in which half-step, resuming, its checkpoint, and its predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.trainers import DiffSegRefinerTrainer, DiffSegTrainerScratch
from diffseg_nnunet.training.checkpoint import load_safely

NewTrainer = Callable[..., Any]
Weights = dict[str, Tensor]
RECORD = {"strategy": "scratch", "sha256": "0" * 64, "checkpoint": "here"}


class InterruptedRunError(Exception):
    """Stands in for Ctrl-C, which would end pytest."""


@pytest.fixture
def segmentor(new_trainer: NewTrainer) -> Weights:
    """Of a fold that was trained for a moment."""
    trainer = new_trainer(DiffSegTrainerScratch, optimizer="adamw")
    trainer.initialize()
    trainer.run_training()
    return copies(trainer.network)


def copies(module: torch.nn.Module) -> Weights:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def changed(before: Weights, module: torch.nn.Module) -> set[str]:
    return {key for key, tensor in module.state_dict().items() if not torch.equal(tensor, before[key])}


@pytest.fixture
def new_refiner(new_trainer: NewTrainer, segmentor: Weights) -> NewTrainer:
    def build(configuration: str = "3d_fullres", **settings: Any) -> DiffSegRefinerTrainer:
        trainer = new_trainer(DiffSegRefinerTrainer, configuration, **{"width": 8, "batch_size": 2, **settings})
        trainer.initialize()
        trainer.take_segmentor(segmentor, "a checkpoint", RECORD)
        return trainer

    return build


def learnt(trainer: DiffSegRefinerTrainer) -> Weights:
    parts = {"segmentor": trainer.network, "refiner": trainer.refiner}
    weights = {f"{name}.{key}": t for name, module in parts.items() for key, t in copies(module).items()}
    return weights | {f"ema.{index}": t.clone() for index, t in enumerate(trainer.ema.tensors())}


@pytest.mark.parametrize("binary", [False, True])
def test_a_frozen_segmentor_stays_the_same_bit_for_bit(
    new_refiner: NewTrainer, segmentor: Weights, binary: bool
) -> None:
    trainer = new_refiner(binary=binary)
    before = copies(trainer.refiner)
    trainer.run_training()
    assert not changed(segmentor, trainer.network)
    assert "out.weight" in changed(before, trainer.refiner)
    stored = load_safely(trainer.final_checkpoint)
    assert all(torch.equal(stored["network_weights"][key], tensor) for key, tensor in segmentor.items())


def test_each_half_step_changes_exactly_its_own_parameters(new_refiner: NewTrainer) -> None:
    trainer = new_refiner(segmentor="alternate", precision="float32")
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    # zero at first, so that nothing behind it is heard
    torch.nn.init.normal_(trainer.refiner.out.weight, std=0.1)
    batch = trainer._moved(next(trainer.dataloader_train))
    segmentor, refiner = copies(trainer.network), copies(trainer.refiner)
    average = [tensor.clone() for tensor in trainer.ema.tensors()]
    trainer._refiner_step(*batch)
    assert not changed(segmentor, trainer.network)
    assert changed(refiner, trainer.refiner)
    assert trainer.ema.updates == 1
    assert not all(map(torch.equal, trainer.ema.tensors(), average))
    refiner = copies(trainer.refiner)
    trainer._segmentor_step(*batch)
    assert not changed(refiner, trainer.refiner)
    assert trainer.ema.updates == 1
    # every layer but the coarsest supervised output, which nnU-Net leaves out
    unchanged = set(segmentor) - changed(segmentor, trainer.network)
    assert all(".seg_layers.0." in key for key in unchanged)
    assert all(parameter.grad is None for parameter in trainer.refiner.parameters())


def test_the_diffusion_loss_reaches_the_segmentor(new_refiner: NewTrainer) -> None:
    """With a weight it ends elsewhere than without."""
    ends = []
    for weight in (0.0, 1.0):
        trainer = new_refiner(segmentor="alternate", segmentor_weight=weight, precision="float32")
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        torch.nn.init.normal_(trainer.refiner.out.weight, std=0.1)
        trainer._segmentor_step(*trainer._moved(next(trainer.dataloader_train)))
        ends.append(copies(trainer.network))
    assert changed(ends[0], trainer.network)


@pytest.mark.parametrize("mode", ["frozen", "alternate"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(new_refiner: NewTrainer, mode: str) -> None:
    """22 iterations are 11 epochs of two; the interruption falls into the third, whose first iteration is lost."""
    settings = {"iterations": 22, "segmentor": mode, "diffusion": {"timesteps": 2}}
    whole = new_refiner(**settings)
    whole.run_training()
    expected = learnt(whole)
    whole.final_checkpoint.unlink()

    stopped = new_refiner(**settings)

    def progress(done: int, _total: int, news: str) -> None:
        if done == 5 and not news:
            raise InterruptedRunError

    stopped.progress = progress
    with pytest.raises(InterruptedRunError):
        stopped.run_training()
    resumed = new_refiner(**settings)
    resumed.load_checkpoint(str(stopped.latest_checkpoint))
    assert resumed.current_epoch == 2
    assert resumed.segmentor_record == RECORD
    resumed.run_training()
    found = learnt(resumed)
    assert [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])] == []


def test_the_seed_decides_every_bit(new_refiner: NewTrainer) -> None:
    runs = []
    for seed in (3, 3, 4):
        trainer = new_refiner(seed=seed, iterations=1)
        trainer.run_training()
        runs.append(learnt(trainer))
    first, same, other = runs
    assert all(torch.equal(tensor, same[key]) for key, tensor in first.items())
    assert not torch.equal(first["refiner.stem.weight"], other["refiner.stem.weight"])


def test_a_segmentor_of_another_plan_is_refused(new_trainer: NewTrainer, segmentor: Weights) -> None:
    trainer = new_trainer(DiffSegRefinerTrainer, "2d", width=8)
    trainer.initialize()
    with pytest.raises(BadInputError, match="does not fit the plan"):
        trainer.take_segmentor(segmentor, "a checkpoint", RECORD)
    trainer = new_trainer(DiffSegRefinerTrainer, width=8)
    trainer.initialize()
    key = next(key for key in segmentor if key.endswith("seg_layers.0.bias"))
    with pytest.raises(BadInputError, match=r"seg_layers.0.bias: \(1,\) in the checkpoint"):
        trainer.take_segmentor(segmentor | {key: segmentor[key][:1]}, "a checkpoint", RECORD)


def test_training_ends_where_gradients_stay_infinite(new_refiner: NewTrainer) -> None:
    trainer = new_refiner(skip_limit=2, precision="float32")
    with torch.no_grad():
        trainer.refiner.out.weight.fill_(torch.nan)
    with pytest.raises(StageFailedError, match="2 steps in a row"):
        trainer.run_training()


def test_2d(new_trainer: NewTrainer) -> None:
    trainer = new_trainer(DiffSegRefinerTrainer, "2d", width=8, batch_size=2, iterations=1)
    trainer.initialize()
    trainer.run_training()
    assert trainer.final_checkpoint.is_file()
