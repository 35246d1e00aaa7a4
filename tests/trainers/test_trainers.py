"""Both trainers on a small phantom: reproducible, resumable, honest about what they saw, and stock in their results."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from matplotlib.image import imread
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy.ndimage import binary_erosion, map_coordinates
from torch import nn

from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.inference.pretrained import load_pretrained
from diffseg_nnunet.phantom import LABELS
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.trainers import DiffSegPretrainer, DiffSegTrainer, DiffSegTrainerScratch
from diffseg_nnunet.trainers.base import NOISE_STREAM

from .interruption import train_until

NewTrainer = Callable[..., Any]
Weights = dict[str, torch.Tensor]


def weights_of(trainer: Any) -> Weights:
    """All that was learned, with the moving averages."""
    phases = getattr(trainer, "phases", ())
    modules = {name: module for phase in phases for name, module in phase.modules.items()} or {
        "network": trainer.network
    }
    weights = {f"{name}.{key}": t.clone() for name, module in modules.items() for key, t in module.state_dict().items()}
    for phase in phases:
        for name, average in phase.ema.state_dict()["average"].items():
            weights |= {f"ema.{name}.{key}": tensor.clone() for key, tensor in average.items()}
    return weights


def trained(trainer: Any) -> Weights:
    trainer.initialize()
    trainer.run_training()
    return weights_of(trainer)


def resumed_from(stopped: Any, trainer: Any) -> Any:
    """`trainer`, initialised, where `stopped` was cut off."""
    assert stopped.latest_checkpoint.is_file()
    assert not stopped.final_checkpoint.exists()
    trainer.initialize()
    trainer.load_checkpoint(str(stopped.latest_checkpoint))
    return trainer


def assert_same(one: Weights, other: Weights) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.fixture
def pretrained(new_trainer: NewTrainer) -> DiffSegPretrainer:
    """Pretrained for some iterations; its final checkpoint is on the disk."""
    trainer = new_trainer(DiffSegPretrainer, iterations=3)
    trained(trainer)
    return trainer


# -- reproducible -----------------------------------------------------------------------------------------------------


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


# -- left and right ---------------------------------------------------------------------------------------------------


def middle(target: np.ndarray, label: str) -> np.ndarray:
    """Centre of a label in voxels."""
    return np.argwhere(target == LABELS[label]).mean(axis=0)


def test_augmentation_never_swaps_left_and_right(new_trainer: NewTrainer) -> None:
    """The phantoms' last array axis runs to the patient's left; whatever is augmented, the left kidney lies further."""
    trainer = new_trainer(DiffSegTrainer)
    trainer.initialize()
    loader, _ = trainer.build_loaders()
    assert trainer.inference_allowed_mirroring_axes == (0, 1)
    loader.start_at(0, 0, 0, 1)
    to_left, heart_side_up, spine_behind = [], [], []
    for _ in range(25):
        for target in next(loader)["target"][0][:, 0].numpy():
            found = {name for name, value in LABELS.items() if (target == value).sum() > 8}
            if {"left_kidney", "right_kidney"} <= found:
                to_left.append(middle(target, "left_kidney")[2] - middle(target, "right_kidney")[2])
            if {"lungs", "left_kidney"} <= found:
                heart_side_up.append(middle(target, "lungs")[0] > middle(target, "left_kidney")[0])
            if {"liver", "spine"} <= found:
                spine_behind.append(middle(target, "spine")[1] > middle(target, "liver")[1])
    assert len(to_left) > 15
    assert min(to_left) > 0
    # the other axes are mirrored, so the test sees mirroring where there is some
    assert {*heart_side_up} == {*spine_behind} == {True, False}


def test_2d_patches_are_not_swapped_either(new_trainer: NewTrainer) -> None:
    trainer = new_trainer(DiffSegTrainer, "2d")
    *_, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert axes == trainer.inference_allowed_mirroring_axes == (0,)


def test_prediction_is_told_which_axes_may_be_mirrored(new_trainer: NewTrainer) -> None:
    trainer = new_trainer(DiffSegTrainer, iterations=1)
    trained(trainer)
    # nnU-Net's own format, which stock prediction reads
    checkpoint = torch.load(trainer.final_checkpoint, weights_only=False)
    assert checkpoint["inference_allowed_mirroring_axes"] == (0, 1)
    assert checkpoint["trainer_name"] == "DiffSegTrainer"


# -- the pretrained checkpoint ----------------------------------------------------------------------------------------


def stock_network(trainer: Any, outputs: int) -> nn.Module:
    return nnUNetTrainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, outputs, enable_deep_supervision=False
    )


def test_pretrained_weights_are_a_stock_networks(pretrained: DiffSegPretrainer) -> None:
    content = torch.load(pretrained.final_checkpoint, weights_only=True)
    weights, own = content["network_weights"], stock_network(pretrained, len(LABELS)).state_dict()
    assert weights.keys() == own.keys()
    differing = {key for key in own if own[key].shape != weights[key].shape}
    assert differing == {key for key in own if ".seg_layers." in key}

    network = stock_network(pretrained, len(LABELS))
    before = network.decoder.seg_layers[-1].weight.clone()
    load_pretrained_weights(network, str(pretrained.final_checkpoint))
    state = network.state_dict()
    assert all(torch.equal(state[key], weights[key]) for key in state if ".seg_layers." not in key)
    assert torch.equal(network.decoder.seg_layers[-1].weight, before)


@torch.no_grad()
def test_pretrained_weights_are_the_averaged_denoiser_at_the_fold_timestep(pretrained: DiffSegPretrainer) -> None:
    patch = torch.randn((2, 1, *pretrained.patch_size), generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), pretrained.settings.diffusion.fold_timestep)
    with pretrained.phases[-1].ema.applied(), pretrained.denoiser.conditioning.at(t):
        expected = pretrained.network(patch)
    stock = stock_network(pretrained, 1)
    stock.load_state_dict(torch.load(pretrained.final_checkpoint, weights_only=True)["network_weights"], strict=True)
    assert (stock(patch) - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())
    assert not torch.equal(pretrained.network(patch), expected)


def cases_of(project: Project) -> tuple[list[str], list[str]]:
    """Labelled and unlabelled, as they lie in the raw data sets."""
    folder = project.workspace.raw / "Dataset902_Unlabelled" / "imagesUn"
    labelled = sorted(case.identifier for case in project.raw().labelled_cases())
    return labelled, sorted(path.name.removesuffix("_0000.nii.gz") for path in folder.iterdir())


@pytest.mark.parametrize("fold", [0, 1, 2, 3, 4, "all"])
def test_pools(new_trainer: NewTrainer, project: Project, fold: int | str) -> None:
    """A fold's validation cases are in no pool but that of all cases, and what is watched is them alone."""
    trainer = new_trainer(DiffSegPretrainer, "2d", fold=fold)
    trainer.initialize()
    labelled, unlabelled = cases_of(project)
    assert (len(labelled), len(unlabelled)) == (6, 4)
    training, validation = trainer.do_split()
    if fold != "all":
        assert sorted([*training, *validation]) == labelled
        assert not set(training) & set(validation)
    others = {"Dataset902_Unlabelled": unlabelled}
    for pool, expected in (
        ("unlabeled", others),
        ("training", {"Dataset901_Phantom": sorted(training), **others}),
        ("all", {"Dataset901_Phantom": labelled, **others}),
    ):
        trainer.settings = replace(trainer.settings, pool=pool)
        loader, watched = trainer.build_loaders()
        assert trainer.pool_record == expected
        # it is what the patches come from, not only what is written down
        assert set(loader.indices) == {f"{source}/{case}" for source, cases in expected.items() for case in cases}
        assert set(watched.indices) == {f"Dataset901_Phantom/{case}" for case in validation}
        if pool != "all" and fold != "all":
            assert not set(loader.indices) & set(watched.indices)


def test_pool_is_in_the_checkpoint(pretrained: DiffSegPretrainer, project: Project) -> None:
    pool = torch.load(pretrained.final_checkpoint, weights_only=True)["pool"]
    training, _ = pretrained.do_split()
    assert pool == {"Dataset901_Phantom": sorted(training), "Dataset902_Unlabelled": cases_of(project)[1]}


def test_a_resumed_run_forgets_no_case(new_trainer: NewTrainer, pretrained: DiffSegPretrainer) -> None:
    """Here of a fold whose training cases were others when it was interrupted."""
    resumed = new_trainer(DiffSegPretrainer, fold=1, iterations=3)
    resumed.load_checkpoint(str(pretrained.final_checkpoint))
    resumed.build_loaders()
    name = "Dataset901_Phantom"
    assert resumed.pool_record[name] == sorted({*pretrained.pool_record[name], *resumed.do_split()[0]})
    assert len(resumed.pool_record[name]) > len(pretrained.pool_record[name])


def test_settings_and_plan_are_in_the_checkpoint(pretrained: DiffSegPretrainer, project: Project) -> None:
    content = torch.load(pretrained.final_checkpoint, weights_only=True)
    assert content["settings"] == pretrained.settings.to_json()
    assert content["plans"] == project.plans()
    assert (content["configuration"], content["fold"], content["current_epoch"]) == ("3d_fullres", 0, 3)
    assert len(content["history"]) == 3


def test_an_unlabelled_data_set_can_be_pretrained_on(new_trainer: NewTrainer) -> None:
    trainer = new_trainer(DiffSegPretrainer, fold="all", dataset=902, iterations=1)
    trained(trainer)
    pool = torch.load(trainer.final_checkpoint, weights_only=True)["pool"]
    assert {source: len(cases) for source, cases in pool.items()} == {"Dataset902_Unlabelled": 4}


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_pretraining_without_coordinates(new_trainer: NewTrainer, configuration: str) -> None:
    trainer = new_trainer(DiffSegPretrainer, configuration, iterations=1, coordinates={"mode": "none"})
    trained(trainer)
    assert "coordinate_head_state" not in torch.load(trainer.final_checkpoint, weights_only=True)["phases"]["denoiser"]
    assert "affine" not in next(trainer.dataloader_train)


def test_2d_pretraining_with_coordinates(new_trainer: NewTrainer) -> None:
    trainer = new_trainer(DiffSegPretrainer, "2d", iterations=2)
    trained(trainer)
    assert "coordinate_head_state" in torch.load(trainer.final_checkpoint, weights_only=True)["phases"]["denoiser"]
    assert np.isfinite([row["validation_coordinates"] for row in trainer.history.rows]).all()


@pytest.mark.parametrize("augment", [False, True])
def test_patches_lie_where_the_scan_says(new_trainer: NewTrainer, project: Project, augment: bool) -> None:
    """The brightness of the raw scan at each voxel's position is the brightness of the patch."""
    trainer = new_trainer(DiffSegPretrainer, augment=augment)
    trainer.initialize()
    loader, _ = trainer.build_loaders()
    loader.start_at(0, 0, 0, 1)
    for _ in range(4):
        batch = next(loader)
        for index, key in enumerate(batch["keys"]):
            source, case = key.split("/")
            folder = "imagesTr" if source == project.name else "imagesUn"
            raw = sitk.ReadImage(str(project.workspace.raw / source / folder / f"{case}_0000.nii.gz"))
            voxels = np.argwhere(binary_erosion(batch["mask"][index, 0].numpy(), np.ones((3, 3, 3))))[::5]
            affine = batch["affine"][index].numpy()
            positions = voxels @ affine[:, :3].T + affine[:, 3]
            patch = batch["data"][index, 0].numpy()[tuple(voxels.T)]

            def alike(offset_mm: tuple[float, ...], positions=positions, raw=raw, patch=patch) -> float:
                places = [raw.TransformPhysicalPointToContinuousIndex(p) for p in (positions + offset_mm).tolist()]
                there = map_coordinates(sitk.GetArrayFromImage(raw).astype(float), np.asarray(places).T[::-1], order=1)
                return np.corrcoef(there, patch)[0, 1]

            # brighter or darker, and interpolated once more, the sharpest likeness may be off by a part of a voxel
            here, far = alike((0, 0, 0)), 10 if augment else 4
            assert here > (0.85 if augment else 0.95)
            for axis in range(3):
                for side in (-far, far):
                    assert alike(tuple(side * (axis == other) for other in range(3))) < here


# -- guidance ---------------------------------------------------------------------------------------------------------


def test_guidance_trains_the_regressor_then_the_denoiser(new_trainer: NewTrainer) -> None:
    trainer = new_trainer(DiffSegPretrainer, iterations=4, coordinates={"mode": "guidance", "regressor_share": 0.5})
    trainer.initialize()
    start = weights_of(trainer)
    snapshots = []
    trainer.progress = lambda _done, _total, news: None if news else snapshots.append(weights_of(trainer))
    trainer.run_training()

    def changed(one: Weights, other: Weights, module: str) -> bool:
        return any(not torch.equal(one[key], other[key]) for key in one if key.startswith(module))

    for index, (before, after) in enumerate(zip([start, *snapshots], snapshots, strict=False)):
        # epoch 2 is the first of the denoiser; from there on the regressor is what its average was
        assert changed(before, after, "regressor.") == (index < 3), index
        assert changed(before, after, "ema.regressor.") == (index < 2), index
        assert changed(before, after, "network.") == changed(before, after, "ema.network.") == (index >= 2), index
        assert changed(before, after, "conditioning.") == (index >= 2), index
    end = snapshots[-1]
    averages = [key for key in end if key.startswith("ema.regressor.")]
    assert all(torch.equal(end[key.removeprefix("ema.")], end[key]) for key in averages)

    rows = trainer.history.rows
    assert ["validation_denoising" in row for row in rows] == [False, False, True, True]
    assert ["validation_coordinates" in row for row in rows] == [True, True, False, False]


def test_guidance_leaves_a_stock_network(new_trainer: NewTrainer) -> None:
    trainer = new_trainer(DiffSegPretrainer, iterations=3, coordinates={"mode": "guidance"})
    trained(trainer)
    content = torch.load(trainer.final_checkpoint, weights_only=True)
    assert content["phases"].keys() == {"regressor", "denoiser"}
    stock = stock_network(trainer, 1)
    stock.load_state_dict(content["network_weights"], strict=True)
    patch = torch.randn((2, 1, *trainer.patch_size), generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), trainer.settings.diffusion.fold_timestep)
    with torch.no_grad(), trainer.phases[-1].ema.applied():
        expected = trainer.denoiser(patch, t)  # no map
        guided = trainer.denoiser(patch, t, trainer.denoiser.coordinate_map(patch))
    spread = expected.max() - expected.min()
    with torch.no_grad():
        assert (stock(patch) - expected).abs().max() <= 1e-4 * spread
    assert (guided - expected).abs().max() > 1e-3 * spread
    load_pretrained_weights(stock_network(trainer, len(LABELS)), str(trainer.final_checkpoint))


# -- used again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "auxiliary", "guidance"])
def test_loaded_model_is_the_average(new_trainer: NewTrainer, mode: str) -> None:
    trainer = new_trainer(DiffSegPretrainer, "2d", iterations=3, coordinates={"mode": mode})
    trained(trainer)
    assert_loaded_as_averaged(trainer)


@torch.no_grad()
def assert_loaded_as_averaged(trainer: DiffSegPretrainer) -> None:
    model = load_pretrained(trainer.final_checkpoint, torch.device("cpu"))
    assert model.settings == trainer.settings
    assert (model.channels, list(model.patch_size)) == (1, list(trainer.patch_size))
    assert model.pool == trainer.pool_record
    patch = torch.randn((2, 1, *model.patch_size), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([50, 700])
    with trainer.phases[-1].ema.applied():
        expected_map = trainer.assembly.coordinate_map(patch)
        guide = trainer.denoiser.coordinate_map(patch)
        expected = trainer.denoiser.denoised(patch, t, guide)
    unaveraged = trainer.denoiser.denoised(patch, t, guide)
    found = model.assembly.denoiser.denoised(patch, t, model.assembly.denoiser.coordinate_map(patch))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (unaveraged - expected).abs().max() > 10 * (found - expected).abs().max()
    if trainer.settings.coordinates.mode == "none":
        assert model.assembly.coordinate_map(patch) is expected_map is None
    else:
        torch.testing.assert_close(model.assembly.coordinate_map(patch), expected_map, rtol=1e-4, atol=1e-5)
        assert expected_map.shape == (2, 3, *model.patch_size)
    assert not any(module.training for module in model.assembly.modules.values())


def test_other_checkpoints_are_no_pretrained_model(new_trainer: NewTrainer, tmp_path: Path) -> None:
    torch.save({"network_weights": {}, "settings": {}}, tmp_path / "other.pth")
    with pytest.raises(
        BadInputError, match=r"other\.pth is no checkpoint .* no phases, plans, configuration, dataset_json"
    ):
        load_pretrained(tmp_path / "other.pth", torch.device("cpu"))


def test_a_checkpoint_of_another_plan_is_not_resumed(new_trainer: NewTrainer, pretrained: DiffSegPretrainer) -> None:
    trainer = new_trainer(DiffSegPretrainer, "2d")
    trainer.initialize()
    before = weights_of(trainer)
    with pytest.raises(BadInputError) as refused:
        trainer.load_checkpoint(str(pretrained.final_checkpoint))
    message = str(refused.value)
    assert f"{pretrained.final_checkpoint} does not fit the plan" in message
    assert (
        "encoder.stages.0.0.convs.0.conv.weight: (8, 1, 3, 3, 3) in the checkpoint, (8, 1, 3, 3) in the plan" in message
    )
    assert_same(weights_of(trainer), before)


_NETWORKS = "dynamic_network_architectures.architectures"


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("network_class_name", "torch.hub.load"),
        ("conv_op", "torch.hub.load"),
        ("network_class_name", f"{_NETWORKS}.unet.np.load"),
        ("network_class_name", f"{_NETWORKS}.unet.nn.Sequential"),
        ("network_class_name", f"{_NETWORKS}.nothing"),
        ("nonlin", "torch.nn.parallel.distributed.os.system"),
        ("nonlin", "torch.nn.init.kaiming_normal_"),
        ("nonlin", "torch.nn.DataParallel"),
        ("nonlin", ["torch.nn.ReLU"]),
    ],
)
def test_plans_of_a_checkpoint_cannot_name_foreign_code(
    pretrained: DiffSegPretrainer, tmp_path: Path, place: str, name: object
) -> None:
    """nnU-Net imports and calls what plans name, and a module leads to all that it imports."""
    content = torch.load(pretrained.final_checkpoint, weights_only=True)
    architecture = content["plans"]["configurations"]["3d_fullres"]["architecture"]
    arguments = architecture["arch_kwargs"]
    (architecture if place == "network_class_name" else arguments)[place] = name
    arguments["nonlin_kwargs"] = {"command": f"touch {tmp_path / 'run'}"}
    torch.save(content, tmp_path / "foreign.pth")
    with pytest.raises(BadInputError, match=r"which is no part of a planned network") as refused:
        load_pretrained(tmp_path / "foreign.pth", torch.device("cpu"))
    assert f"name {name}" in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_version_is_refused_in_words(pretrained: DiffSegPretrainer, tmp_path: Path) -> None:
    content = torch.load(pretrained.final_checkpoint, weights_only=True)
    content["settings"]["of_tomorrow"] = 1
    torch.save(content, tmp_path / "newer.pth")
    with pytest.raises(BadInputError, match=r"newer.pth is damaged, or of another version of `diffseg pretrain`"):
        load_pretrained(tmp_path / "newer.pth", torch.device("cpu"))


@pytest.mark.parametrize("mode", ["none", "guidance"])
def test_a_checkpoint_of_another_mode_is_not_resumed(
    new_trainer: NewTrainer, pretrained: DiffSegPretrainer, mode: str
) -> None:
    trainer = new_trainer(DiffSegPretrainer, coordinates={"mode": mode})
    trainer.initialize()
    with pytest.raises(BadInputError, match=f"in mode 'auxiliary', this pretraining is in mode '{mode}'"):
        trainer.load_checkpoint(str(pretrained.final_checkpoint))


@pytest.mark.parametrize(("configuration", "mode"), [("2d", "none"), ("2d", "guidance"), ("3d_fullres", "auxiliary")])
def test_pictures_are_drawn_now_and_then(new_trainer: NewTrainer, configuration: str, mode: str) -> None:
    trainer = new_trainer(DiffSegPretrainer, configuration, iterations=4, pictures=2, coordinates={"mode": mode})
    weights, undrawn = (
        trained(trainer),
        new_trainer(DiffSegPretrainer, configuration, iterations=4, coordinates={"mode": mode}),
    )
    pictures = sorted((trainer.results_folder / "pictures").iterdir())
    assert [path.name for path in pictures] == ["epoch_0001.png", "epoch_0003.png"]
    columns = 3 if mode == "none" else 4
    for path in pictures:
        picture = imread(path)
        assert picture.ndim == 3
        assert picture.shape[1] > picture.shape[0] * columns / 3
        assert picture[..., :3].std() > 0.05
    # nothing is learned from drawing
    assert_same(trained(undrawn), weights)


# -- failures ---------------------------------------------------------------------------------------------------------


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


# -- rates ------------------------------------------------------------------------------------------------------------


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
