"""Iterations that fail, checkpoints that cannot be written, and the rates of learning."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.trainers import DiffSegPretrainer, DiffSegTrainer, DiffSegTrainerScratch

from .learning import NewTrainer, Weights, assert_same, weights_of


def test_an_iteration_that_is_not_finite_is_skipped(new_trainer: NewTrainer) -> None:
    """Weights, averages and the optimizer's moments stay; after `skip_limit` such iterations in a row it is over."""
    trainer = new_trainer(DiffSegPretrainer, iterations=20, skip_limit=3)
    trainer.initialize()
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    news = []
    trainer.progress = lambda _done, _total, text: news.append(text) if text else None

    def state() -> Weights:
        moments = trainer.optimizer.state_dict()["state"]
        return weights_of(trainer) | {f"{i}.{k}": torch.as_tensor(v) for i, m in moments.items() for k, v in m.items()}

    good = next(trainer.dataloader_train)
    bad = {**good, "data": good["data"].clone()}
    bad["data"][0, 0, 3, 3, 3] = torch.nan
    trainer.train_step(good)
    before = {key: tensor.clone() for key, tensor in state().items()}
    for _ in range(2):
        trainer.train_step(bad)
    assert_same(state(), before)
    for line in (news[-1], Path(trainer.log_file).read_text()):
        assert all(case in line for case in bad["keys"])
        assert "iteration 2" in line
    # a good one between starts the count anew
    losses = trainer.train_step(good)
    assert np.isfinite(losses["loss"])
    before = {key: tensor.clone() for key, tensor in state().items()}
    for _ in range(2):
        trainer.train_step(bad)
    with pytest.raises(StageFailedError) as failed:
        trainer.train_step(bad)
    message = str(failed.value)
    assert "not finite at iteration 6, 3 times in a row by now" in message
    assert all(case in message for case in bad["keys"])
    assert "diffseg verify" in message
    assert_same(state(), before)


def test_finetuning_starts_from_the_pretrained_weights(new_trainer: NewTrainer, pretrained: DiffSegPretrainer) -> None:
    weights = torch.load(pretrained.final_checkpoint, weights_only=True)["network_weights"]
    trainer = new_trainer(DiffSegTrainer, transfer="all")
    trainer.initialize()
    before = {key: tensor.clone() for key, tensor in trainer.network.state_dict().items()}
    taken = trainer.start_from(weights, "pretrained")
    state = trainer.network.state_dict()
    assert taken == sum(".seg_layers." not in key for key in state)
    for key, tensor in state.items():
        assert torch.equal(tensor, before[key] if ".seg_layers." in key else weights[key])


def test_weights_of_another_plan_are_refused_with_a_list(
    new_trainer: NewTrainer, pretrained: DiffSegPretrainer
) -> None:
    weights = torch.load(pretrained.final_checkpoint, weights_only=True)["network_weights"]
    first = "encoder.stages.0.0.convs.0.conv.weight"
    weights[first] = torch.zeros(16, 1, 3, 3, 3)
    del weights["encoder.stages.1.0.convs.0.norm.bias"]
    trainer = new_trainer(DiffSegTrainer)
    trainer.initialize()
    before = weights_of(trainer)
    with pytest.raises(BadInputError) as refused:
        trainer.start_from(weights, "other.pth")
    message = str(refused.value)
    assert "other.pth does not fit the plan, 2 tensors differ" in message
    assert f"{first}: (16, 1, 3, 3, 3) in the checkpoint, (8, 1, 3, 3, 3) in the plan" in message
    assert "encoder.stages.1.0.convs.0.norm.bias: missing in the checkpoint" in message
    assert_same(weights_of(trainer), before)


@pytest.mark.parametrize("trainer_class", [DiffSegPretrainer, DiffSegTrainer])
def test_checkpoints_are_whole_or_not_written(new_trainer: NewTrainer, trainer_class: type) -> None:
    trainer = new_trainer(trainer_class)
    trainer.initialize()
    if trainer_class is DiffSegPretrainer:
        trainer.build_loaders()
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    whole, names = path.read_bytes(), sorted(p.name for p in path.parent.iterdir())
    assert not [name for name in names if "partial" in name]
    # something that cannot be written, after most has been
    if trainer_class is DiffSegPretrainer:
        trainer.dataset_json = {**trainer.dataset_json, "last": lambda: None}
    else:
        trainer.my_init_kwargs = {**trainer.my_init_kwargs, "last": lambda: None}
    with pytest.raises((pickle.PicklingError, AttributeError)):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == whole
    assert sorted(p.name for p in path.parent.iterdir()) == names


@pytest.mark.parametrize(
    ("trainer_class", "optimizer", "rate"),
    [
        (DiffSegTrainer, "sgd", 1e-3),
        (DiffSegTrainerScratch, "sgd", 1e-2),
        (DiffSegTrainer, "adamw", 2e-3),
        (DiffSegTrainerScratch, "adamw", 2e-3),
    ],
)
def test_rates_warm_up_and_decay(new_trainer: NewTrainer, trainer_class: type, optimizer: str, rate: float) -> None:
    trainer = new_trainer(trainer_class, iterations=100, optimizer=optimizer, warmup_share=0.2)
    trainer.initialize()
    rates = []
    for epoch in range(trainer.num_epochs):
        trainer.lr_scheduler.step(epoch)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert len(rates) == 20
    np.testing.assert_allclose(rates[:4], rate * np.array([1, 2, 3, 4]) / 5)
    np.testing.assert_allclose(rates[4:], rate * (1 - np.arange(16) / 16) ** 0.9)
    if optimizer == "sgd":
        stock = trainer.optimizer.param_groups[0]
        assert (stock["momentum"], stock["nesterov"], stock["weight_decay"]) == (0.99, True, 3e-5)


def test_initial_rate_can_be_chosen(new_trainer: NewTrainer) -> None:
    trainer = new_trainer(DiffSegTrainer, initial_lr=0.5, warmup_share=0.0)
    trainer.initialize()
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5
