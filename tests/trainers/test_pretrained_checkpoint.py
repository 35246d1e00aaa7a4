"""The pretrained checkpoint: stock nnU-Net's weights, honest about what was seen, and used again as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.inference.pretrained import load_pretrained
from diffseg_nnunet.phantom import LABELS
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.trainers import DiffSegPretrainer

from .learning import NewTrainer, assert_same, stock_network, trained, weights_of


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
