"""The coordinate head that stays on in fine-tuning: what it adds, where it begins, and what it leaves as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.inference.predictor import load_predictor
from diffseg_nnunet.phantom import LABELS
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.stages import stage_inputs
from diffseg_nnunet.trainers import (
    DiffSegPretrainer,
    DiffSegTrainer,
    DiffSegTrainerDecoder,
    DiffSegTrainerScratch,
)
from diffseg_nnunet.trainers.regulariser import grouped, paired_loss
from diffseg_nnunet.training.settings import SegmentationSettings
from diffseg_nnunet.workspace import Workspace

from .interruption import train_until

NewTrainer = Callable[..., Any]
KEEPING = {"iterations": 2, "optimizer": "adamw", "precision": "float32", "keep_coordinates": 0.5}
TRAINERS = (DiffSegTrainer, DiffSegTrainerDecoder, DiffSegTrainerScratch)
UNIT_MM = 300


@pytest.fixture(scope="module")
def pretrained(phantom_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The checkpoint of a short pretraining; each made once."""
    made: dict[tuple, Path] = {}
    folder = tmp_path_factory.mktemp("pretrained")

    def of(new_trainer: NewTrainer, configuration: str = "3d_fullres", **coordinates: str) -> Path:
        key = (configuration, *coordinates.items())
        if key not in made:
            trainer = new_trainer(DiffSegPretrainer, configuration, iterations=2, coordinates=coordinates)
            trainer.initialize()
            trainer.run_training()
            made[key] = Path(shutil.copy(trainer.final_checkpoint, folder / f"{len(made)}.pth"))
        return made[key]

    return of


@pytest.fixture
def started(new_trainer: NewTrainer, pretrained: Callable[..., Path]) -> NewTrainer:
    """Builds an initialised trainer that keeps the coordinates of the pretrained network."""

    def build(trainer_class: type, configuration: str = "3d_fullres", **settings: Any) -> Any:
        content = torch.load(pretrained(new_trainer, configuration), weights_only=True)
        trainer = new_trainer(trainer_class, configuration, **{**KEEPING, **settings})
        trainer.initialize()
        trainer.start_from(content["network_weights"], "pretrained")
        assert trainer.regulariser.take(content) is None
        return trainer

    return build


def state_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Of network and head."""
    head = {f"head.{key}": value for key, value in trainer.regulariser.head.state_dict().items()}
    return {key: value.clone() for key, value in {**trainer.network.state_dict(), **head}.items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {key for key in one if not torch.equal(one[key], other[key])}


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_patches_of_one_scan_go_two_by_two() -> None:
    assert grouped([7, 8, 7, 9, 7, 7, 7]) == ([[0, 2], [4, 5]], [[1], [3], [6]])
    assert grouped([1, 2]) == ([], [[0], [1]])


def test_the_loss_is_that_of_its_pairs() -> None:
    """Against all pairs written out, for three scans, one of them with two patches and some points outside."""
    rng = np.random.default_rng(0)
    said, places = rng.normal(size=(4, 5, 3)), rng.normal(1e4, 100, (4, 5, 3))
    inside, scans = rng.random((4, 5)) < 0.8, [3, 5, 3, 6]
    expected = 0.0
    for patches in ([0, 2], [1], [3]):
        c, p = said[patches].reshape(-1, 3), places[patches].reshape(-1, 3)
        weight = inside[patches].reshape(-1)
        errors = [
            weight[i] * weight[j] * np.abs((c[i] - c[j]) - (p[i] - p[j]) / UNIT_MM).mean()
            for i in range(len(c))
            for j in range(len(c))
        ]
        expected += len(patches) / 4 * np.mean(errors)
    found = paired_loss(torch.tensor(said).float(), torch.tensor(places), torch.tensor(inside), scans)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_the_gradient_reaches_what_is_trained(
    started: NewTrainer, new_trainer: NewTrainer, trainer_class: type, configuration: str
) -> None:
    """Of the coordinates alone: head, decoder and encoder, but no part that is frozen."""
    if trainer_class is DiffSegTrainerScratch:
        trainer = new_trainer(trainer_class, configuration, **KEEPING)
        trainer.initialize()
    else:
        trainer = started(trainer_class, configuration)
    trainer.on_train_epoch_start()
    loader, _ = trainer.build_loaders()
    batch = next(loader.start_at(0, 0, 0, 1))
    with trainer.regulariser.asked(batch):
        trainer.network(batch["data"])
        trainer.regulariser.added_to(torch.zeros(())).backward()
    network, frozen = trainer.network, trainer_class is DiffSegTrainerDecoder
    first = next(p for key, p in network.named_parameters() if key.startswith("encoder.") and key.endswith("weight"))
    assert (first.grad is None) if frozen else first.grad.abs().sum() > 0
    last = [p for p in network.decoder.stages[-1].parameters() if p.ndim > 1]
    assert all(p.grad.abs().sum() > 0 for p in last)
    assert all(p.grad.abs().sum() > 0 for p in trainer.regulariser.head.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in network.decoder.seg_layers.parameters())


def test_the_step_is_of_both_losses(started: NewTrainer) -> None:
    """The gradient is that of nnU-Net's loss and the weighted coordinates; what is noted is each by itself."""
    weight = 0.5
    trainer = started(DiffSegTrainer, keep_coordinates=weight)
    trainer.on_train_epoch_start()
    loader, _ = trainer.build_loaders()
    batch = next(loader.start_at(0, 0, 0, 1))
    name, watched = next((n, p) for n, p in trainer.network.named_parameters() if n.endswith("conv.weight"))
    gradients = []
    with trainer.regulariser.asked(batch):
        trainer.loss(trainer.network(batch["data"]), batch["target"]).backward()
        gradients.append(watched.grad.clone())
        terms = {key: value.item() for key, value in trainer.regulariser.terms.items()}
        trainer.network.zero_grad(set_to_none=True)
        trainer.network(batch["data"])
        trainer.regulariser.added_to(torch.zeros(())).backward()
        coordinates = watched.grad.clone() / weight
    trainer.network.zero_grad(set_to_none=True)
    stock = trainer.loss(trainer.network(batch["data"]), batch["target"])  # as in validation: nothing is added
    stock.backward()
    assert stock.item() == pytest.approx(terms["loss"])
    torch.testing.assert_close(gradients[0], watched.grad + weight * coordinates, rtol=1e-3, atol=1e-6, msg=name)
    noted = trainer.train_step(batch)
    assert {key: value.item() for key, value in noted.items()} == pytest.approx(terms)


# -- off --------------------------------------------------------------------------------------------------------------


def test_off_leaves_no_trace(new_trainer: NewTrainer, project: Project) -> None:
    """In the checkpoint; and what is kept is part of what a result depends on."""
    inputs = [
        stage_inputs(project, "2d", {"train": [], "val": []}, SegmentationSettings(keep_coordinates=weight))
        for weight in (0, 0.1, 0.2)
    ]
    assert inputs[0] != inputs[1] != inputs[2]
    trainer = new_trainer(DiffSegTrainer, "2d", iterations=1, precision="float32")
    trainer.initialize()
    trainer.run_training()
    assert trainer.regulariser is None
    assert "coordinate_regulariser" not in torch.load(trainer.final_checkpoint, weights_only=False)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_no_weight(weight: float) -> None:
    with pytest.raises(ValueError, match="is no weight from 0"):
        SegmentationSettings(keep_coordinates=weight)


# -- where it begins --------------------------------------------------------------------------------------------------


def test_the_head_is_the_pretraineds_average(
    started: NewTrainer, new_trainer: NewTrainer, pretrained: Callable[..., Path]
) -> None:
    content = torch.load(pretrained(new_trainer), weights_only=True)
    phase = content["phases"]["denoiser"]
    head = started(DiffSegTrainer).regulariser.head.state_dict()
    assert not differing(head, phase["denoiser_ema_state"]["average"]["coordinate_head"])
    assert differing(head, phase["coordinate_head_state"])


def test_without_a_head_that_fits_it_begins_at_random(new_trainer: NewTrainer, pretrained: Callable[..., Path]) -> None:
    trainer = new_trainer(DiffSegTrainer, **KEEPING)
    trainer.initialize()
    before = state_of(trainer)
    take = trainer.regulariser.take
    for mode in ("none", "guidance"):
        content = torch.load(pretrained(new_trainer, mode=mode), weights_only=True)
        assert take(content) == "the checkpoint has none"
    assert take({"network_weights": {}}) == "the checkpoint has none"
    content = torch.load(pretrained(new_trainer, objective="distance"), weights_only=True)
    assert "by the objective 'distance'" in take(content)
    content = torch.load(pretrained(new_trainer), weights_only=True)
    content["phases"]["denoiser"]["denoiser_ema_state"]["average"]["coordinate_head"].popitem()
    assert "other features" in take(content)
    assert not differing(before, state_of(trainer))


def test_the_twin_differs_in_its_initial_weights_alone(started: NewTrainer, new_trainer: NewTrainer) -> None:
    settings = {**KEEPING, "initial_lr": 1e-3, "seed": 4}
    twin = new_trainer(DiffSegTrainerScratch, **settings)
    twin.initialize()
    finetuned = started(DiffSegTrainer, **settings)
    changed = differing(state_of(twin), state_of(finetuned))
    assert any(key.startswith("head.") for key in changed)
    twin.network.load_state_dict(finetuned.network.state_dict())
    twin.regulariser.head.load_state_dict(finetuned.regulariser.head.state_dict())
    before = state_of(twin)
    for trainer in (twin, finetuned):
        trainer.run_training()
    assert not differing(state_of(twin), state_of(finetuned))
    assert {key for key in differing(before, state_of(twin)) if key.startswith("head.")}


# -- what it leaves as it was -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_the_result_is_a_stock_network_and_frozen_stays_frozen(started: NewTrainer, configuration: str) -> None:
    trainer = started(DiffSegTrainerDecoder, configuration)
    before = state_of(trainer)
    trainer.run_training()
    changed = differing(before, state_of(trainer))
    assert not {key for key in changed if "encoder." in key}
    assert {key for key in changed if key.startswith("decoder.stages")}
    assert {key for key in changed if key.startswith("head.")}
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in trainer.regulariser.head.parameters()} < trained

    content = torch.load(trainer.final_checkpoint, weights_only=False)
    record = content["coordinate_regulariser"]
    assert record["weight"] == KEEPING["keep_coordinates"]
    assert not differing(record["head"], trainer.regulariser.head.state_dict())
    stock = nnUNetTrainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, len(LABELS), enable_deep_supervision=False
    )
    stock.load_state_dict(content["network_weights"], strict=True)
    predictor = load_predictor(
        trainer.results_folder.parent, (0,), torch.device("cpu"), False, trainer.final_checkpoint.name
    )
    patch = torch.randn((1, 1, *trainer.configuration_manager.patch_size), generator=torch.Generator().manual_seed(0))
    trainer.set_deep_supervision_enabled(False)
    with torch.no_grad():
        outputs = [network.eval()(patch) for network in (stock, predictor.network, trainer.network)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_after_training_the_network_runs_alone(new_trainer: NewTrainer) -> None:
    trainer = new_trainer(DiffSegTrainer, "2d", **KEEPING)
    trainer.initialize()
    trainer.regulariser.close()
    trainer.network(trainer.random_batch()["data"])
    with pytest.raises(RuntimeError, match="no forward pass"):
        trainer.regulariser.added_to(torch.zeros(()))


def test_a_resumed_run_ends_as_an_uninterrupted_one(started: NewTrainer, new_trainer: NewTrainer) -> None:
    settings = {**KEEPING, "iterations": 4, "seed": 1}
    uninterrupted = started(DiffSegTrainer, "2d", **settings)
    uninterrupted.run_training()
    uninterrupted.final_checkpoint.unlink()
    stopped = started(DiffSegTrainer, "2d", **settings)
    train_until(stopped, iteration=3)
    resumed = new_trainer(DiffSegTrainer, "2d", **settings)
    resumed.initialize()
    resumed.load_checkpoint(str(stopped.latest_checkpoint))
    assert resumed.current_epoch == 2
    resumed.run_training()
    assert not differing(state_of(resumed), state_of(uninterrupted))


# -- data -------------------------------------------------------------------------------------------------------------


def test_scans_without_directions_are_refused(new_trainer: NewTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = new_trainer(DiffSegTrainerScratch, "2d", **KEEPING)
    trainer.initialize()
    dataset, _ = trainer.get_tr_and_val_datasets()
    load = dataset.load_case
    flat = {"spacing": (999, 1, 1)}  # what nnU-Net's reader of natural images records

    class Flat:
        identifiers = dataset.identifiers

        def load_case(self, case: str) -> Any:
            return *load(case)[:3], flat

    with pytest.raises(BadInputError, match=r"has no 3D direction cosines.*without --keep-coordinates"):
        trainer._training_loader(Flat())
