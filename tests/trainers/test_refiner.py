"""The refiner's trainer: who learns in which half-step, resuming, its checkpoint, and its predictions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.inference.refining import RefineOptions, RefiningPredictor
from diffseg_nnunet.inference.validation import predictor_of
from diffseg_nnunet.pipeline.prediction import predict
from diffseg_nnunet.pipeline.prediction_request import PredictionRequest
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.planners.refining import fit_refiner, refined_shape, refiner_memory, refining_steps
from diffseg_nnunet.planning.memory import kept_for_backward
from diffseg_nnunet.refinement.sampling import entropy_bits
from diffseg_nnunet.refinement.sizing import WIDTHS
from diffseg_nnunet.trainers import DiffSegRefinerTrainer, DiffSegTrainerScratch
from diffseg_nnunet.training.checkpoint import load_safely
from diffseg_nnunet.training.refining import RefinementSettings, Targets
from diffseg_nnunet.training.seeding import random_stream
from diffseg_nnunet.workspace import Workspace

from .conftest import train_in_two_processes
from .interruption import train_until

NewTrainer = Callable[..., Any]
Weights = dict[str, Tensor]
RECORD = {"strategy": "scratch", "sha256": "0" * 64, "checkpoint": "here"}


@pytest.fixture
def segmentor(new_trainer: NewTrainer) -> Weights:
    """The planned network as it begins; that it has learnt something matters to nothing here."""
    trainer = new_trainer(DiffSegTrainerScratch)
    trainer.initialize()
    return copies(trainer.network)


def copies(module: torch.nn.Module) -> Weights:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def changed(before: Weights, module: torch.nn.Module) -> set[str]:
    return {key for key, tensor in module.state_dict().items() if not torch.equal(tensor, before[key])}


@pytest.fixture
def new_refiner(new_trainer: NewTrainer, segmentor: Weights) -> NewTrainer:
    def build(configuration: str = "3d_fullres", **settings: Any) -> DiffSegRefinerTrainer:
        trainer = new_trainer(
            DiffSegRefinerTrainer, configuration, **{"width": 8, "batch_size": 2, "samples": 1, **settings}
        )
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
    trainer = new_refiner(segmentor="frozen", binary=binary)
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


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_refiner_alone_learns_from_worse_priors_and_reads_the_image_as_it_is(
    new_refiner: NewTrainer, share: float
) -> None:
    settings = {"segmentor": "alternate", "precision": "float32", "diffusion": {"timesteps": 2}}
    trainer = new_refiner(degrade=share, **settings)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    image, target = trainer._moved(batch := trainer.random_batch())
    given: list[tuple[Any, ...]] = []
    trainer.refiner.register_forward_pre_hook(lambda _, arguments: given.append(arguments))

    def expected() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            said = trainer.collaboration.says(image)
        return said.prior, said.features[0]

    def read() -> tuple[Tensor, Tensor]:
        _, _, prior, seen, features = given.pop()
        assert torch.equal(seen, image)
        return prior.detach(), features[0].detach()

    before = expected()
    trainer._refiner_step(image, target)
    assert all(torch.equal(*pair) == (not share) for pair in zip(read(), before, strict=True))
    trainer._segmentor_step(image, target)
    torch.testing.assert_close(read(), before)
    trainer.on_validation_epoch_start()
    trainer.set_deep_supervision_enabled(False)
    with torch.no_grad():
        outcome = trainer.validation_step(batch)
    torch.testing.assert_close(read(), expected())
    trainer.on_validation_epoch_end([outcome])
    logged = Path(trainer.log_file).read_text()
    assert "of the priors that the refiner learnt from 0." in logged


@pytest.mark.parametrize("mode", ["frozen", "alternate"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(new_refiner: NewTrainer, mode: str) -> None:
    """22 iterations are 11 epochs of two; the interruption falls into the third, whose first iteration is lost."""
    settings = {"iterations": 22, "segmentor": mode, "diffusion": {"timesteps": 2}}
    whole = new_refiner(**settings)
    whole.run_training()
    expected = learnt(whole)
    whole.final_checkpoint.unlink()

    stopped = new_refiner(**settings)
    train_until(stopped, iteration=5)
    resumed = new_refiner(**settings)
    resumed.load_checkpoint(str(stopped.latest_checkpoint))
    assert resumed.current_epoch == 2
    assert resumed.segmentor_record == RECORD
    assert resumed._cpu_precision == stopped._cpu_precision is not None
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
    with pytest.raises(StageFailedError, match=r"The refiner's gradient is not finite at .*, 2 steps in a row"):
        trainer.run_training()


def test_each_learner_has_its_own_count_of_skipped_steps(new_refiner: NewTrainer) -> None:
    """The refiner's steps, which are taken, do not hide that none of the segmentor's is."""
    trainer = new_refiner(segmentor="alternate", skip_limit=2, precision="float32")
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    batch, own_loss = trainer.random_batch(), trainer.loss
    trainer.loss = lambda *given: own_loss(*given) * torch.nan
    trainer.train_step(batch)
    with pytest.raises(StageFailedError, match=r"The segmentor's gradient is not finite at .*, 2 steps in a row"):
        trainer.train_step(batch)
    assert trainer.ema.updates == 2


@pytest.mark.parametrize("mode", ["frozen", "alternate"])
def test_a_prior_that_is_not_finite_skips_the_step(new_refiner: NewTrainer, mode: str) -> None:
    trainer = new_refiner(segmentor=mode, skip_limit=2, precision="float32", diffusion={"timesteps": 2})
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    good, bad = (trainer.random_batch() for _ in range(2))
    bad["data"][0] = torch.nan
    before = learnt(trainer)
    assert all(np.isnan(loss) for loss in trainer.train_step(bad).values())
    assert all(torch.equal(tensor, before[key]) for key, tensor in learnt(trainer).items())
    assert all(np.isfinite(loss) for loss in trainer.train_step(good).values())
    trainer.train_step(bad)
    with pytest.raises(StageFailedError, match=r"The refiner's prior is not finite at .*, 2 steps in a row"):
        trainer.train_step(bad)
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        outcome = trainer.validation_step(bad)
    assert np.isnan(outcome["loss"])
    assert np.isfinite(outcome["tp_hard"]).all()


_NOT_FINITE = r"not finite in \d+ window\(s\)\. Look at the scan with"


def test_an_image_of_which_nothing_finite_is_said_is_told_and_others_are_refined(new_refiner: NewTrainer) -> None:
    trainer = taught(new_refiner(diffusion={"timesteps": 2}))
    trainer.build_loaders()
    trainer.set_deep_supervision_enabled(False)
    predictor = trainer.predictor()
    image = torch.randn(1, 26, 30, 40, generator=torch.Generator().manual_seed(0))
    for threshold in (None, 0.5):
        predictor.options = replace(predictor.options, threshold_bits=threshold)
        with pytest.raises(BadInputError, match=_NOT_FINITE):
            predictor.predict_sliding_window_return_logits(torch.full_like(image, torch.nan))
        assert predictor.predict_sliding_window_return_logits(image).isfinite().all()
    with torch.no_grad():
        trainer.refiner.out.bias.fill_(torch.nan)
    with pytest.raises(BadInputError, match=_NOT_FINITE):
        predictor.predict_sliding_window_return_logits(image)


def test_2d(new_trainer: NewTrainer) -> None:
    trainer = new_trainer(DiffSegRefinerTrainer, "2d", width=8, batch_size=2, iterations=1)
    trainer.initialize()
    with pytest.raises(BadInputError, match=r"was given none\. Run `diffseg refine`, not nnUNetv2_train"):
        trainer.run_training()
    trainer.take_segmentor(trainer.network.state_dict(), "its own", RECORD)
    trainer.run_training()
    assert trainer.final_checkpoint.is_file()


def test_two_processes_learn_the_same(phantom_workspace: Workspace, tmp_path: Path) -> None:
    settings = {"iterations": 2, "workers": 0, "width": 8, "batch_size": 4, "segmentor": "alternate"}
    run = {"trainer": "DiffSegRefinerTrainer", "settings": settings | {"precision": "float32"}}
    (report, one), (_, other) = train_in_two_processes(phantom_workspace, {"refining": run}, tmp_path)["refining"]
    assert (one == other).all()
    assert np.isfinite(one).all()
    assert report["batch_size"] == 2
    assert [path.parts[-4] for path in (tmp_path / "refining").rglob("checkpoint_final.pth")] == ["Dataset901_Phantom"]
    assert not list((tmp_path / "refining" / "rank_1").rglob("*.pth"))


# -- what it predicts -------------------------------------------------------------------------------------------------


def logits_of(trainer: DiffSegRefinerTrainer, **options: Any) -> tuple[Tensor, Tensor, RefiningPredictor]:
    """The segmentor's and the refined logits of an image of several windows, and the refining predictor."""
    trainer.build_loaders()  # says which axes are mirrored
    trainer.set_deep_supervision_enabled(False)
    image = torch.randn(1, 26, 30, 40, generator=torch.Generator().manual_seed(0))
    refining = trainer.predictor()
    refining.options = replace(refining.options, **options)
    plain = predictor_of(trainer).predict_sliding_window_return_logits(image)
    return plain, refining.predict_sliding_window_return_logits(image), refining


def taught(trainer: DiffSegRefinerTrainer) -> DiffSegRefinerTrainer:
    """As if it had learnt something."""
    with random_stream(1):
        torch.nn.init.normal_(trainer.refiner.out.weight, std=0.5)
    return trainer


@pytest.mark.parametrize("binary", [False, True])
def test_a_refiner_that_returns_the_prior_changes_nothing(new_refiner: NewTrainer, binary: bool) -> None:
    plain, refined, predictor = logits_of(new_refiner(binary=binary, diffusion={"timesteps": 2}), samples=2)
    assert predictor.share == 1
    assert torch.equal(plain, refined)


def test_what_is_certain_keeps_its_logits(new_refiner: NewTrainer) -> None:
    trainer = taught(new_refiner(diffusion={"timesteps": 2}))
    plain, everywhere, _ = logits_of(trainer)
    assert not torch.equal(plain.argmax(0), everywhere.argmax(0))
    bits = entropy_bits(plain[None].float().softmax(1), exclusive=True)
    _, partly, predictor = logits_of(trainer, threshold_bits=float(bits.median()))
    assert 0.2 < predictor.share < 0.8
    assert 0 < (partly != plain).any(0).float().mean() < 1
    plain, nowhere, predictor = logits_of(trainer, threshold_bits=9.0)
    assert predictor.share == 0
    assert torch.equal(plain, nowhere)


def test_the_seed_decides_a_prediction(new_refiner: NewTrainer) -> None:
    trainer = taught(new_refiner(diffusion={"timesteps": 2}))
    first, same, other = (logits_of(trainer, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_refiner_computes_as_in_its_training(new_refiner: NewTrainer, precision: str) -> None:
    trainer, formats = new_refiner(precision=precision, diffusion={"timesteps": 2}), set()
    trainer.refiner.stem.register_forward_hook(lambda _module, _arguments, output: formats.add(output.dtype))
    logits_of(trainer, samples=1)
    assert formats == {getattr(torch, precision)}


def test_validation_refines_as_predictions_will(new_refiner: NewTrainer) -> None:
    """With the settings in the checkpoint; one of before there were any has the default ones."""
    asked = {"samples": 3, "sampling_steps": 1, "sampler": "ancestral", "seed": 5}
    trainer = new_refiner(**asked)
    used = trainer.predictor().options
    assert used == RefineOptions(steps=1, samples=3, sampler="ancestral", seed=5)
    stored = json.loads(json.dumps(trainer.settings.to_json()))
    settings = RefinementSettings(**stored)
    assert RefineOptions(seed=5).completed(settings) == used
    assert RefineOptions(steps=4, samples=1, sampler="ddim").completed(settings) == RefineOptions(4, 1, "ddim")
    old = {name: value for name, value in stored.items() if name not in asked}
    assert RefineOptions().completed(RefinementSettings(**old)) == RefineOptions(1, 4, "ddim")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"samples": 0}, "0 samples are fewer than one"),
        ({"degrade": 1.5}, "degrade 1.5 is not in 0..1"),
        ({"sampling_steps": 11}, "sampling_steps 11 are not within 1..10"),
        ({"sampler": "ddpm"}, "ddpm is none of ddim, ancestral"),
    ],
)
def test_refining_that_cannot_be(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RefinementSettings(**setting)


def test_what_is_refused_leaves_finished_predictions_as_they_are(
    new_refiner: NewTrainer, project: Project, tmp_path: Path
) -> None:
    trainer = new_refiner(diffusion={"timesteps": 2})
    trainer.on_train_start()
    trainer.save_checkpoint(str(trainer.final_checkpoint))
    source, output = tmp_path / "images", tmp_path / "predictions"
    source.mkdir()
    image = min((project.raw().folder / "imagesTr").glob("*.nii.gz"))
    (source / image.name).symlink_to(image)
    request = PredictionRequest(
        ("3d_fullres",), (0,), "scratch", mirroring=False, refine=RefineOptions(steps=1, samples=1)
    )
    assert predict(project, request, source, output, "cpu") == []
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.iterdir()}
    assert len(list(output.glob("*.nii.gz"))) == 1
    refused = {
        "was trained with 2. Give --steps 1 to 2": {"refine": RefineOptions(steps=20)},
        "Give --samples 4, or predict without --uncertainty": {"uncertainty": True},
        "is of --strategy scratch": {"strategy": "finetune"},
        "There is no trained model .*DiffSegTrainerScratch": {"refined_structures": ("lungs",)},
        "-f 1` first": {"folds": (0, 1)},
    }
    for message, changes in refused.items():
        with pytest.raises(BadInputError, match=message):
            predict(project, replace(request, **changes), source, output, "cpu")
        assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.iterdir()} == files


# -- regions and ignored voxels ---------------------------------------------------------------------------------------


def test_masks_of_labels_and_of_regions() -> None:
    labels = torch.tensor([[[[0, 1, 2, 3]]]], dtype=torch.int16)
    clean, valid = Targets(3, regions=False, ignore=True).masks([labels])
    assert clean[0, :, 0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert valid.flatten().tolist() == [True, True, True, False]
    assert Targets(4, regions=False, ignore=False).masks(labels)[1] is None
    regions = torch.tensor([[[[1, 1, 0]], [[1, 0, 0]], [[0, 0, 1]]]], dtype=torch.bool)
    clean, valid = Targets(2, regions=True, ignore=True).masks(regions)
    assert clean[0, :, 0].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert valid.flatten().tolist() == [True, True, False]


@pytest.mark.parametrize("mode", ["frozen", "alternate"])
@pytest.mark.parametrize("regions", [False, True])
def test_regions_and_the_ignore_label(project: Project, mode: str, regions: bool) -> None:
    content = project.dataset_json()
    values = [value for value in content["labels"].values() if value]
    if regions:
        content["labels"] = {"background": 0, "all": values, "most": values[1:]}
        content["regions_class_order"] = values[:2]
    content["labels"]["ignore"] = max(values) + 1
    plans = {**project.plans(), "continue_training": False}
    trainer = DiffSegRefinerTrainer(plans, "3d_fullres", 0, content, device=torch.device("cpu"))
    trainer.apply(
        RefinementSettings(
            iterations=1, width=8, batch_size=2, segmentor=mode, diffusion={"timesteps": 2}, workers=0, samples=2
        )
    )
    trainer.initialize()
    assert trainer.refiner.architecture.classes == (2 if regions else len(values) + 1)
    taught(trainer)
    for _ in range(2):
        assert all(torch.isfinite(torch.tensor(loss)) for loss in trainer.train_step(trainer.random_batch()).values())
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        outcome = trainer.validation_step(trainer.random_batch())
    assert len(outcome["tp_hard"]) == (2 if regions else len(values))
    plain, refined, _ = logits_of(trainer)
    assert refined.isfinite().all()
    assert plain.shape == refined.shape


# -- memory -----------------------------------------------------------------------------------------------------------


def budgeted(plans: dict[str, Any], gib: float, batch_size: int) -> dict[str, Any]:
    plans = json.loads(json.dumps(plans))
    plans["diffseg"]["memory"]["budget_gib"] = gib
    plans["diffseg"]["configurations"]["2d"]["training"]["batch_size"] = batch_size
    return plans


def test_width_and_batch_fit_the_budget(project: Project) -> None:
    plans, content = project.plans(), project.dataset_json()
    settings = RefinementSettings(diffusion={"timesteps": 2})
    roomy = fit_refiner(budgeted(plans, 8, 4), "2d", content, settings)
    assert (roomy.width, roomy.batch_size) == (WIDTHS[0], 4)
    # room for less than four patches, at the same width
    tight = fit_refiner(budgeted(plans, roomy.memory.total_gib - 1e-4, 4), "2d", content, settings)
    assert tight.width == WIDTHS[0]
    assert tight.batch_size in (2, 3)
    narrow = fit_refiner(budgeted(plans, 8, 2), "2d", content, settings, width=8).memory.total_gib
    wide = fit_refiner(budgeted(plans, 8, 2), "2d", content, settings, width=32).memory.total_gib
    between = budgeted(plans, (narrow + wide) / 2, 2)
    assert fit_refiner(between, "2d", content, settings).width < WIDTHS[0]
    with pytest.raises(BadInputError, match=r"Refine with --width 8, which fits, or plan with --gpu-memory 0.\d or"):
        fit_refiner(between, "2d", content, settings, width=32)


def test_without_bfloat16_a_refiner_takes_more(project: Project) -> None:
    """Older GPUs compute its step in float32."""
    content, settings = project.dataset_json(), RefinementSettings(diffusion={"timesteps": 2})
    plans = budgeted(project.plans(), 8, 4)
    assert plans["diffseg"]["memory"]["bfloat16"]
    newer = fit_refiner(plans, "2d", content, settings, width=8).memory
    plans["diffseg"]["memory"]["bfloat16"] = False
    older = fit_refiner(plans, "2d", content, settings, width=8).memory
    shape, least = refined_shape(plans, "2d", content), replace(settings, width=8)
    assert older == refiner_memory(replace(shape, batch=4), least, None)
    assert older.total_gib > newer.total_gib


def test_a_learning_segmentor_takes_more(project: Project) -> None:
    plans, content = project.plans(), project.dataset_json()
    kinds = [RefinementSettings(segmentor=mode) for mode in ("frozen", "alternate")]
    frozen, alternate = (
        fit_refiner(budgeted(plans, 8, 6), "2d", content, kind, width=8).memory.total_gib for kind in kinds
    )
    assert alternate > frozen


def test_counted_as_it_is(project: Project) -> None:
    """Fake tensors keep for the backward pass what real ones keep."""
    shape = refined_shape(project.plans(), "3d_fullres", project.dataset_json())
    settings = RefinementSettings(width=8, segmentor="alternate")
    with FakeTensorMode():
        fake = [kept_for_backward(step) for step in refining_steps(shape, settings, None)]
    real = [kept_for_backward(step) for step in refining_steps(shape, settings, None)]
    assert fake == real
