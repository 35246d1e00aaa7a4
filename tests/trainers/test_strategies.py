"""The strategies on a small phantom: what is frozen stays so to the bit, and what is trained is found again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from diffseg_nnunet import registry
from diffseg_nnunet.cli.arguments import STRATEGIES
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.inference.predictor import load_predictor
from diffseg_nnunet.inference.pretrained import load_pretrained
from diffseg_nnunet.inference.validation import validate_fold
from diffseg_nnunet.phantom import LABELS
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.starting import start
from diffseg_nnunet.probing.cache import FeatureCache
from diffseg_nnunet.trainers import (
    DiffSegPretrainer,
    DiffSegTrainer,
    DiffSegTrainerDecoder,
    DiffSegTrainerLinear,
    DiffSegTrainerNonlinear,
    DiffSegTrainerPixelEnsemble,
    DiffSegTrainerScratch,
)
from diffseg_nnunet.trainers.probes import ProbeTrainer
from diffseg_nnunet.training.settings import Strategy
from diffseg_nnunet.workspace import Workspace

from .interruption import train_until

NewTrainer = Callable[..., Any]
Weights = dict[str, torch.Tensor]
FROZEN = (DiffSegTrainerDecoder, DiffSegTrainerLinear, DiffSegTrainerNonlinear, DiffSegTrainerPixelEnsemble)
STEPS = (50, 400)
NOISED = {"time_steps": STEPS, "noisy": True}
every_frozen = pytest.mark.parametrize("trainer_class", FROZEN)
one_epoch = {"iterations": 2, "optimizer": "adamw", "precision": "float32"}


@pytest.fixture(scope="module")
def pretrained(phantom_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a short pretraining of a configuration; made once."""
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("pretrained")

    def of(new_trainer: NewTrainer, configuration: str) -> Path:
        if configuration not in made:
            trainer = new_trainer(DiffSegPretrainer, configuration, iterations=2)
            trainer.initialize()
            with torch.enable_grad():  # tests may compare without
                trainer.run_training()
            made[configuration] = Path(shutil.copy(trainer.final_checkpoint, folder / f"{configuration}.pth"))
        return made[configuration]

    return of


@pytest.fixture
def started(new_trainer: NewTrainer, pretrained: Callable) -> NewTrainer:
    """Builds an initialised trainer that starts from the pretrained network."""

    def build(trainer_class: type, configuration: str = "3d_fullres", **settings: Any) -> Any:
        source = pretrained(new_trainer, configuration)
        trainer = new_trainer(trainer_class, configuration, **{**one_epoch, **settings})
        trainer.initialize()
        trainer.start_from(torch.load(source, weights_only=True)["network_weights"], str(source))
        return trainer

    return build


def state_of(module: torch.nn.Module) -> Weights:
    return {key: tensor.clone() for key, tensor in module.state_dict().items() if isinstance(tensor, torch.Tensor)}


def differing(one: Weights, other: Weights) -> set[str]:
    assert one.keys() == other.keys()
    return {key for key in one if not torch.equal(one[key], other[key])}


def test_every_strategy_is_registered_and_described() -> None:
    assert set(STRATEGIES) == set(get_args(Strategy)) == {*registry.names("trainers")} - {"pretrain", "refine"}
    assert {registry.load("trainers", name).strategy for name in STRATEGIES} == set(STRATEGIES)


@pytest.mark.parametrize(
    ("trainer_class", "configuration"),
    [*((each, "2d") for each in FROZEN), (DiffSegTrainerDecoder, "3d_fullres"), (DiffSegTrainerLinear, "3d_fullres")],
)
def test_frozen_means_frozen(started: NewTrainer, trainer_class: type, configuration: str) -> None:
    """Of weights and norms no bit, no gradient, nothing in the optimiser; all else is trained."""
    trainer = started(trainer_class, configuration)
    planned, before = trainer.planned_network, state_of(trainer.network)
    trainer.run_training()

    def is_frozen(key: str) -> bool:
        if key.startswith(("head.", "time_steps.")):
            return False
        return trainer_class is not DiffSegTrainerDecoder or "encoder." in key

    changed = differing(before, state_of(trainer.network))
    assert not {key for key in changed if is_frozen(key)}
    parameters = dict(trainer.network.named_parameters())
    in_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for key, parameter in parameters.items():
        assert parameter.requires_grad == (id(parameter) in in_optimizer) == (not is_frozen(key)), key
        assert not (is_frozen(key) and parameter.grad is not None), key
        # the output of the coarsest scale has no weight in nnU-Net's loss
        assert is_frozen(key) or "seg_layers.0." in key or parameter.grad is not None, key
    assert len(in_optimizer) == sum(p.requires_grad for p in parameters.values()) > 0
    assert {key for key in changed if key.endswith("weight")}
    source = torch.load(trainer.final_checkpoint, weights_only=False)["network_weights"]
    assert planned.state_dict().keys() <= source.keys()


def test_the_twin_differs_in_its_initial_weights_alone(started: NewTrainer, new_trainer: NewTrainer) -> None:
    """Same batches, same rates; given the same weights, fine-tuning and its twin end in the same bits."""
    settings = {**one_epoch, "initial_lr": 1e-3, "seed": 4}
    twin = new_trainer(DiffSegTrainerScratch, **settings)
    twin.initialize()
    finetuned = started(DiffSegTrainer, **settings)
    heads = {key for key in finetuned.network.state_dict() if ".seg_layers." in key}
    assert heads
    assert not differing(state_of(twin.network), state_of(finetuned.network)) & heads
    assert differing(state_of(twin.network), state_of(finetuned.network))
    twin.network.load_state_dict(finetuned.network.state_dict())
    for trainer in (twin, finetuned):
        trainer.run_training()
    assert not differing(state_of(twin.network), state_of(finetuned.network))


@every_frozen
def test_strategies_learn_from_the_twins_batches(started: NewTrainer, trainer_class: type) -> None:
    """Those that augment."""
    batches = []
    for strategy in (DiffSegTrainer, trainer_class):
        probing = {"augment": True} if issubclass(strategy, ProbeTrainer) else {}
        trainer = started(strategy, "2d", seed=4, **probing)
        trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
        batches.append([next(trainer.dataloader_train), next(trainer.dataloader_val)])
        assert len(trainer.optimizer.param_groups) == 1
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one["data"], other["data"])
        target = other["target"] if isinstance(other["target"], torch.Tensor) else other["target"][0]
        assert torch.equal(one["target"][0], target)


@pytest.mark.parametrize(
    ("trainer_class", "settings"),
    [(DiffSegTrainerLinear, {}), (DiffSegTrainerNonlinear, NOISED)],
)
def test_features_are_computed_once_where_nothing_augments(
    started: NewTrainer, trainer_class: type, settings: dict
) -> None:
    """And the probe that is trained with them is the one that would be trained without keeping any."""
    settings = {**settings, "iterations": 12}
    probes = [started(trainer_class, **settings) for _ in range(2)]
    kept, computed = probes
    computed.network.cache = FeatureCache(0)
    passes = []
    for trainer in probes:
        counted: list[int] = []
        trainer.network.encoder.register_forward_hook(
            lambda module, inputs, _, counted=counted, network=trainer.network: (
                counted.append(len(inputs[0])) if network.training else None
            )
        )
        trainer.run_training()
        passes.append(sum(counted))
    steps = kept.settings.probe.passes
    assert passes[0] == len(kept.network.cache) * steps
    assert passes[1] == 12 * computed.batch_size * steps > passes[0]
    assert not differing(state_of(kept.network), state_of(computed.network))
    assert kept.inference_allowed_mirroring_axes is None, "what was never mirrored in training"


@pytest.mark.parametrize(
    ("trainer_class", "settings"),
    [
        (DiffSegTrainerDecoder, {}),
        (DiffSegTrainerLinear, {}),
        (DiffSegTrainerNonlinear, NOISED),
        (DiffSegTrainerPixelEnsemble, NOISED),
    ],
)
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@torch.no_grad()
def test_the_predictor_restores_the_model(
    started: NewTrainer, trainer_class: type, settings: dict, configuration: str
) -> None:
    """nnU-Net's own, which builds the network by the trainer's name and loads it strictly."""
    trainer = started(trainer_class, configuration, **settings)
    trainer.on_train_start()  # writes what a model folder needs
    trainer.save_checkpoint(str(trainer.final_checkpoint))
    predictor = load_predictor(
        trainer.results_folder.parent, (0,), torch.device("cpu"), False, trainer.final_checkpoint.name
    )
    patch = torch.randn((1, 1, *trainer.configuration_manager.patch_size), generator=torch.Generator().manual_seed(0))
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor.network.eval()
    found, expected = predictor.network(patch), trainer.network(patch)
    assert found.shape == (1, len(LABELS), *patch.shape[2:])
    assert torch.equal(found, expected)
    if trainer_class is DiffSegTrainerDecoder:
        stock = nnUNetTrainer.build_network_architecture(
            trainer.plans_manager, trainer.configuration_manager, 1, len(LABELS), enable_deep_supervision=False
        )
        content = torch.load(trainer.final_checkpoint, weights_only=False)
        stock.load_state_dict(content["network_weights"], strict=True)
        assert torch.equal(stock.eval()(patch), expected)


@pytest.mark.parametrize("noisy", [True, False])
@torch.no_grad()
def test_time_steps_are_those_of_the_pretraining(
    started: NewTrainer, pretrained: Callable, new_trainer: NewTrainer, noisy: bool
) -> None:
    trainer = started(DiffSegTrainerLinear, "2d", time_steps=STEPS, noisy=noisy)
    model = load_pretrained(pretrained(new_trainer, "2d"), torch.device("cpu"))
    denoiser, probed = model.assembly.denoiser, trainer.network
    patch = torch.randn((2, 1, *model.patch_size), generator=torch.Generator().manual_seed(0))
    expected = []
    bottleneck = denoiser.network.encoder.stages[-1]
    handle = bottleneck.register_forward_hook(lambda *arguments: expected.append(arguments[2]))
    for step in STEPS:
        t = torch.full((2,), step)
        read = denoiser.diffusion.add_noise(patch, probed.time_steps.noise.expand_as(patch), t) if noisy else patch
        denoiser(read, t)
    handle.remove()
    torch.testing.assert_close(probed.features(patch)[0], torch.cat(expected, 1), rtol=1e-4, atol=1e-4)
    # stored with the model, and found when it is gone on from
    other = new_trainer(DiffSegTrainerLinear, "2d", **one_epoch, time_steps=STEPS, noisy=noisy)
    trainer.on_train_start()
    trainer.save_checkpoint(str(trainer.latest_checkpoint))
    other.initialize()
    other.load_checkpoint(str(trainer.latest_checkpoint))
    assert not differing(state_of(other.network), state_of(probed))


def test_a_time_step_there_is_not(started: NewTrainer) -> None:
    with pytest.raises(BadInputError, match=r"2d\.pth was pretrained with 1000 time steps, there is none 1000"):
        started(DiffSegTrainerLinear, "2d", time_steps=(50, 1000))


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_the_encoder_alone_is_transferred(
    started: NewTrainer, new_trainer: NewTrainer, pretrained: Callable, configuration: str
) -> None:
    twin = new_trainer(DiffSegTrainerScratch, configuration, **one_epoch)
    twin.initialize()
    trainer = started(DiffSegTrainer, configuration, transfer="encoder")
    source = torch.load(pretrained(new_trainer, configuration), weights_only=True)["network_weights"]
    own, random = state_of(trainer.network), state_of(twin.network)
    assert {key for key in own if "encoder." in key} == {key for key in own if torch.equal(own[key], source[key])}
    assert not {key for key in differing(own, random) if "encoder." not in key}


def test_another_time_step_is_folded_in(project: Project, new_trainer: NewTrainer, pretrained: Callable) -> None:
    source = pretrained(new_trainer, "2d")
    trainer = new_trainer(DiffSegTrainer, "2d", **one_epoch, fold_timestep=400, transfer="all")
    trainer.initialize()
    start(project, "2d", trainer, source, adapts=False)
    denoiser = load_pretrained(source, torch.device("cpu")).assembly.denoiser
    own = state_of(trainer.network)
    for step, equal in ((400, True), (100, False)):
        folded = {key: tensor for key, tensor in denoiser.folded(step).items() if ".seg_layers." not in key}
        assert all(torch.equal(own[key], tensor) for key, tensor in folded.items()) == equal
    none = new_trainer(DiffSegTrainer, "2d", **one_epoch, fold_timestep=1000)
    none.initialize()
    with pytest.raises(BadInputError, match="there is none 1000"):
        start(project, "2d", none, source, adapts=False)


@pytest.mark.parametrize("trainer_class", [DiffSegTrainerDecoder, DiffSegTrainerNonlinear, DiffSegTrainerPixelEnsemble])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    started: NewTrainer, new_trainer: NewTrainer, trainer_class: type
) -> None:
    """Four epochs of one iteration, stopped in the third; the head's norms have a state of their own."""
    settings = {**one_epoch, "iterations": 4, "seed": 1}
    uninterrupted = started(trainer_class, "2d", **settings)
    uninterrupted.run_training()
    uninterrupted.final_checkpoint.unlink()

    stopped = started(trainer_class, "2d", **settings)
    train_until(stopped, iteration=3)
    resumed = new_trainer(trainer_class, "2d", **settings)
    resumed.initialize()
    resumed.load_checkpoint(str(stopped.latest_checkpoint))
    assert resumed.current_epoch == 2
    resumed.run_training()
    assert not differing(state_of(resumed.network), state_of(uninterrupted.network))


# -- few labels -------------------------------------------------------------------------------------------------------


@every_frozen
def test_one_case_and_a_class_it_lacks(
    started: NewTrainer, project: Project, trainer_class: type, tmp_path: Path
) -> None:
    """Slices of one volume, and a label that no case has: it is trained and predicted all the same."""
    copied = tmp_path / "preprocessed"
    shutil.copytree(project.preprocessed, copied)
    cases = sorted(project.labelled_preprocessed("2d"))
    (copied / "splits_final.json").write_text(json.dumps([{"train": cases[:1], "val": cases[1:2]}]))
    unicorn = max(LABELS.values()) + 1
    trainer = started(trainer_class, "2d", further_labels={"unicorn": unicorn})
    trainer.preprocessed_dataset_folder_base = str(copied)
    assert trainer.do_split() == (cases[:1], cases[1:2])
    trainer.run_training()
    assert trainer.label_manager.num_segmentation_heads == len(LABELS) + 1
    assert all(torch.isfinite(tensor).all() for tensor in state_of(trainer.network).values())
    summary = validate_fold(trainer, save_probabilities=False)
    assert str(unicorn) in {str(label) for label in summary["mean"]}
    assert [path.name for path in (trainer.results_folder / "validation").glob("*.nii.gz")] == [f"{cases[1]}.nii.gz"]
