"""Both trainers on a small phantom: the seed decides, a resumed run ends as an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffseg_nnunet.trainers import DiffSegPretrainer, DiffSegTrainer
from diffseg_nnunet.trainers.base import NOISE_STREAM

from .interruption import train_until
from .learning import NewTrainer, assert_same, resumed_from, trained, weights_of


@pytest.mark.parametrize("trainer_class", [DiffSegPretrainer, DiffSegTrainer])
def test_the_seed_decides_every_bit(new_trainer: NewTrainer, trainer_class: type) -> None:
    first, same, other = (trained(new_trainer(trainer_class, seed=seed)) for seed in (5, 5, 6))
    assert_same(same, first)
    key = "network.encoder.stages.0.0.convs.0.conv.weight"
    assert not torch.equal(other[key], first[key])


@pytest.mark.parametrize("trainer_class", [DiffSegPretrainer, DiffSegTrainer])
def test_two_threads_are_reproducible_too(new_trainer: NewTrainer, trainer_class: type) -> None:
    torch.set_num_threads(2)
    first, same = (trained(new_trainer(trainer_class, iterations=1)) for _ in range(2))
    assert_same(same, first)


@pytest.mark.parametrize("trainer_class", [DiffSegPretrainer, DiffSegTrainer])
def test_a_resumed_run_ends_as_an_uninterrupted_one(new_trainer: NewTrainer, trainer_class: type) -> None:
    """22 iterations are 11 epochs of two; the interruption falls into the third, whose first iteration is lost."""
    settings = {"iterations": 22, "seed": 1}
    uninterrupted = trained(new_trainer(trainer_class, **settings))

    stopped = new_trainer(trainer_class, **settings)
    stopped.final_checkpoint.unlink()
    stopped.initialize()
    train_until(stopped, iteration=5)
    resumed = resumed_from(stopped, new_trainer(trainer_class, **settings))
    assert resumed.current_epoch == 2
    resumed.run_training()
    assert_same(weights_of(resumed), uninterrupted)
    assert resumed.final_checkpoint.is_file()
    assert not resumed.latest_checkpoint.exists()
    if trainer_class is DiffSegPretrainer:
        assert [row["epoch"] for row in resumed.history.rows] == list(range(11))


@pytest.mark.parametrize("trainer_class", [DiffSegPretrainer, DiffSegTrainer])
def test_a_resumed_run_computes_in_the_format_it_began_with(new_trainer: NewTrainer, trainer_class: type) -> None:
    """Whatever a comparison would say by now: here, what is asked for."""
    stopped = new_trainer(trainer_class, iterations=22, precision="bfloat16")
    stopped.initialize()
    train_until(stopped, iteration=3)
    resumed = resumed_from(stopped, new_trainer(trainer_class, iterations=22, precision="float32"))
    train_until(resumed, iteration=5)
    with resumed.cpu_autocast():
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    assert "bfloat16: as before it was interrupted" in Path(resumed.log_file).read_text()


def test_guidance_resumes_in_and_between_its_phases(new_trainer: NewTrainer) -> None:
    """11 epochs of two iterations of two batches, the first three of them the regressor's; stopped in the second
    epoch, in the first of the denoiser, and later."""
    settings = {"iterations": 22, "seed": 1, "coordinates": {"mode": "guidance"}, "accumulate": 2}
    first = new_trainer(DiffSegPretrainer, **settings)
    uninterrupted = trained(first)
    assert [phase.epochs for phase in first.phases] == [range(3), range(3, 11)]
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in first.history.rows]
    first.final_checkpoint.unlink()

    trainer = new_trainer(DiffSegPretrainer, **settings)
    trainer.initialize()
    for iteration, epoch in ((3, 1), (7, 3), (12, 5)):
        train_until(trainer, iteration)
        trainer = resumed_from(trainer, new_trainer(DiffSegPretrainer, **settings))
        assert trainer.current_epoch == epoch
    trainer.run_training()
    assert_same(weights_of(trainer), uninterrupted)
    again = [{k: v for k, v in row.items() if k != "seconds"} for row in trainer.history.rows]
    assert str(again) == str(history)  # as text, since NaN is not NaN


def test_accumulated_batches_are_one_large_batch(new_trainer: NewTrainer) -> None:
    """The gradient of an iteration is the mean over its batches, which are the next ones of the stream."""
    single, double = (
        new_trainer(DiffSegPretrainer, accumulate=count, gradient_clip=1e9, precision="float32") for count in (1, 2)
    )
    for trainer in (single, double):
        trainer.initialize()
        trainer.on_train_start()
        trainer.on_train_epoch_start()
    phase = single.phases[0]
    losses = [single._losses(next(single.dataloader_train), NOISE_STREAM, index)["loss"] for index in range(2)]
    (sum(losses) / 2).backward()
    expected = [p.grad for p in phase.parameters if p.grad is not None]
    row = double.train_step(next(double.dataloader_train))
    assert row["loss"] == pytest.approx(sum(losses).item() / 2, rel=1e-5)
    found = [p.grad for p in double.phases[0].parameters if p.grad is not None]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    # the third and the fourth batch follow, with noise of their own
    for name, module in phase.modules.items():
        module.load_state_dict(double.phases[0].modules[name].state_dict())
    single.dataloader_train = single.get_dataloaders()[0]
    batches = [next(single.dataloader_train) for _ in range(4)]
    with torch.no_grad():
        losses = [single._losses(batches[index], NOISE_STREAM, index)["loss"].item() for index in (2, 3)]
    assert double.train_step(next(double.dataloader_train))["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("trainer_class", [DiffSegPretrainer, DiffSegTrainer])
def test_progress_counts_every_iteration(new_trainer: NewTrainer, trainer_class: type) -> None:
    trainer = new_trainer(trainer_class, iterations=3)
    reports = []
    trainer.progress = lambda *report: reports.append(report)
    trained(trainer)
    assert [done for done, _, news in reports if not news] == [1, 2, 3]
    assert {total for _, total, _ in reports} == {3}
    news = [news for _, _, news in reports if news]
    assert [line.split()[:2] for line in news] == [["epoch", f"{epoch}/3"] for epoch in (1, 2, 3)]
