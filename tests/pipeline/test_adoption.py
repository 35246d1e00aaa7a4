"""Plans that start from a checkpoint of another data set, and trainings that do."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from rich.console import Console

from diffseg_nnunet import registry
from diffseg_nnunet.cli.plan import transfer_table
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline.adoption import read_source
from diffseg_nnunet.pipeline.planning import PlanRequest, plan, planned_source, require_planned
from diffseg_nnunet.pipeline.preprocessing import preprocess
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.run import run
from diffseg_nnunet.pipeline.run_request import RunRequest
from diffseg_nnunet.pipeline.stages import train, training_settings
from diffseg_nnunet.pipeline.starting import probed
from diffseg_nnunet.planning.gpus import MemoryBudget
from diffseg_nnunet.trainers import DiffSegPretrainer, DiffSegTrainer
from diffseg_nnunet.training.threads import single_threaded
from diffseg_nnunet.workspace import Workspace
from tests.process_state import environment_restored


class BeginningError(Exception):
    """A training was about to begin."""


class Lines:
    """Keeps what is reported, and ends a training that has its weights, before its first iteration."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)
        if text.startswith("starting from"):
            raise BeginningError

    warn = info

    def progress(self, *_: object) -> None:
        pass


def write_dataset(
    workspace: Workspace, number: int, name: str, channels: list[str], size: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    """Three labelled cases and their fingerprint; sizes and spacings are x, y, z."""
    folder, rng = workspace.raw / f"Dataset{number:03}_{name}", np.random.default_rng(number)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    shape = size[::-1]
    for case in range(3):
        label = (rng.random(shape) < 0.2).astype(np.uint8)
        volumes = {
            f"imagesTr/c{case}_{channel:04}": rng.normal(100 * number, 20, shape) for channel in range(len(channels))
        }
        for path, array in {**volumes, f"labelsTr/c{case}": label}.items():
            image = sitk.GetImageFromArray(array.astype(np.int16 if "images" in path else np.uint8))
            image.SetSpacing(spacing)
            sitk.WriteImage(image, str(folder / f"{path}.nii.gz"))
    content = {
        "channel_names": {str(index): channel for index, channel in enumerate(channels)},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    statistics = {"mean": 100.0 * number, "std": 20.0, "percentile_00_5": 0.0, "percentile_99_5": 400.0}
    fingerprint = {
        "spacings": [spacing[::-1]] * 3,
        "shapes_after_crop": [shape] * 3,
        "foreground_intensity_properties_per_channel": {str(index): statistics for index in range(len(channels))},
        "median_relative_size_after_cropping": 1.0,
    }
    (workspace.preprocessed / folder.name).mkdir()
    (workspace.preprocessed / folder.name / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """An isotropic CT data set (1), one like it of other intensities (2), and a coarse MR one of four channels (3)."""
    folder = tmp_path_factory.mktemp("adoption")
    with environment_restored(), single_threaded():
        workspace = Workspace(*(folder / name for name in ("raw", "preprocessed", "results"))).activate()
        write_dataset(workspace, 1, "Source", ["CT"], (40, 36, 34), (1.0, 1.0, 1.0))
        write_dataset(workspace, 2, "Alike", ["CT"], (30, 28, 20), (1.5, 1.5, 1.6))
        write_dataset(workspace, 3, "Coarse", ["T1", "T2", "FLAIR", "ADC"], (32, 32, 8), (0.8, 0.8, 6.0))
        yield workspace


def request_of(checkpoint: Path | None = None, **changes: Any) -> PlanRequest:
    source = {} if checkpoint is None else {"from_checkpoint": str(checkpoint)}
    return PlanRequest(**{"gpu_memory": "1", "backbone": "plain", "base_features": 4, **source, **changes})


def planned(workspace: Workspace, number: int, backbone: str = "plain", checkpoint: Path | None = None) -> dict:
    """Plans of a data set by its fingerprint."""
    name = workspace.dataset_name(number)
    source = None if checkpoint is None else read_source(checkpoint)
    planner = registry.load("planners", source.backbone if source else backbone)(number)
    planner.configure(budget=MemoryBudget(1.0, "test"), base_features=4, source=source)
    planner.plan_experiment()
    return json.loads((workspace.preprocessed / name / "DiffSegPlans.json").read_text())


@pytest.fixture(scope="module")
def checkpoint_of(workspace: Workspace) -> Callable[..., Path]:
    """Saves a checkpoint of the first data set, untrained, as its trainer does; each once."""
    made: dict[tuple, Path] = {}

    def make(
        trainer_class: type = DiffSegPretrainer, configuration: str = "3d_fullres", backbone: str = "plain"
    ) -> Path:
        wanted = (trainer_class, configuration, backbone)
        if wanted not in made:
            plans = {**planned(workspace, 1, backbone), "continue_training": False}
            project = Project.open(workspace, 1)
            # trainers look how the data are stored, which these never read
            data = project.preprocessed_folder(configuration)
            data.mkdir(exist_ok=True)
            (data / "c0.b2nd").touch()
            device = torch.device("cpu")
            trainer = trainer_class(plans, configuration, "all", project.dataset_json(), device=device)
            trainer.initialize()
            if trainer_class is DiffSegPretrainer:
                trainer.pool_record = {}
            path = workspace.results / f"{trainer_class.__name__}_{configuration}_{backbone}.pth"
            trainer.save_checkpoint(str(path))
            made[wanted] = path
        return made[wanted]

    return make


@pytest.mark.parametrize("trainer_class", [nnUNetTrainer, DiffSegPretrainer, DiffSegTrainer])
def test_checkpoints_of_every_trainer_are_read(
    workspace: Workspace, checkpoint_of: Callable[..., Path], trainer_class: type
) -> None:
    path = checkpoint_of(trainer_class)
    if trainer_class is not DiffSegPretrainer:  # a pickle of more than tensors and plain values
        content = torch.load(path, weights_only=False)
        content["logging"]["mean_fg_dice"] = [np.float64(0.5)]
        torch.save({**content, "_best_ema": np.float32(0.5)}, path)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path, weights_only=True)
    source = read_source(path)
    theirs = planned(workspace, 1)["configurations"]["3d_fullres"]
    assert (source.backbone, source.base_features, source.channels) == ("plain", 4, 1)
    assert source.architecture == theirs["architecture"]
    assert list(source.spacing) == theirs["spacing"]


@pytest.mark.filterwarnings("ignore:Detected old nnU-Net plans format")
def test_checkpoints_of_older_nnunet_are_read(
    workspace: Workspace, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Their plans state the network in other words, and numpy 1 pickled its numbers under another name."""
    path = checkpoint_of(nnUNetTrainer)
    content = torch.load(path, weights_only=False)
    configuration = content["init_args"]["plans"]["configurations"]["3d_fullres"]
    arguments = configuration.pop("architecture")["arch_kwargs"]
    configuration |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": arguments["features_per_stage"][0],
        "unet_max_num_features": 320,
        "n_conv_per_stage_encoder": arguments["n_conv_per_stage"],
        "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [3, 3, 3],
        "pool_op_kernel_sizes": arguments["strides"],
        "conv_kernel_sizes": arguments["kernel_sizes"],
    }
    newer, older = tmp_path / "newer.pth", tmp_path / "older.pth"
    torch.save({**content, "_best_ema": np.float32(0.5)}, newer)
    with zipfile.ZipFile(newer) as archive, zipfile.ZipFile(older, "w") as written:
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            written.writestr(name, data)
    source, same = read_source(older), read_source(path)
    assert (source.backbone, source.base_features) == ("plain", 4)
    for name in ("strides", "kernel_sizes", "features_per_stage", "n_conv_per_stage"):
        assert source.architecture["arch_kwargs"][name] == same.architecture["arch_kwargs"][name]


def test_a_plan_like_the_checkpoints(workspace: Workspace, checkpoint_of: Callable[..., Path]) -> None:
    """Spacing, normalisation, backbone and features are taken over, so that every parameter is loaded as it is."""
    checkpoint = checkpoint_of(nnUNetTrainer)
    theirs = planned(workspace, 1)
    project = Project.open(workspace, 2, Lines())
    plans = plan(project, request_of(checkpoint, backbone="resenc", base_features=32))
    ours, source = plans["configurations"]["3d_fullres"], plans["diffseg"]["source"]
    assert ours["spacing"] == theirs["configurations"]["3d_fullres"]["spacing"] == [1.0, 1.0, 1.0]
    assert ours["normalization_schemes"] == ["CTNormalization"]
    key = "foreground_intensity_properties_per_channel"
    assert plans[key] == theirs[key]
    # the file is needed for new plans, and by what starts from it
    assert planned_source(project, "3d_fullres") == checkpoint
    assert planned_source(project, "2d") is None  # its network is of other axes
    moved = checkpoint.rename(checkpoint.with_suffix(".moved"))
    require_planned(project)
    with pytest.raises(BadInputError, match=r"Alike is planned to start from .*, and that is not at .* any more"):
        planned_source(project, "3d_fullres")
    stored = PlanRequest.from_json(project.manifest.stage("plan")["settings"])
    assert plan(project, stored) == plans
    moved.rename(checkpoint)
    fingerprint = json.loads((project.preprocessed / "dataset_fingerprint.json").read_text())
    assert fingerprint[key]["0"]["mean"] > plans[key]["0"]["mean"] + 50  # its own data have others
    assert (plans["diffseg"]["backbone"], plans["diffseg"]["base_features"]) == ("plain", 4)
    assert source["checkpoint"] == checkpoint.name
    assert source["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert source["shares"] == {"3d_fullres": {"loaded": 1.0, "adapted": 0.0, "skipped": 0.0}}
    assert any("none of its code was run" in line for line in project.reporter.lines)
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    strides = np.prod(configuration.pool_op_kernel_sizes, axis=0)
    assert not np.any(np.array(configuration.patch_size) % strides)
    network = nnUNetTrainer.build_network_architecture(manager, configuration, 1, 2, enable_deep_supervision=False)
    with torch.no_grad():
        assert network(torch.zeros(1, 1, *configuration.patch_size)).shape == (1, 2, *configuration.patch_size)


@pytest.mark.parametrize("backbone", ["plain", "resenc"])
def test_a_plan_for_data_unlike_the_checkpoints(
    workspace: Workspace, checkpoint_of: Callable[..., Path], backbone: str
) -> None:
    """Four channels of MR, slices six times as thick: the rest is adapted."""
    plans = planned(workspace, 3, checkpoint=checkpoint_of(nnUNetTrainer, backbone=backbone))
    ours, source = plans["configurations"]["3d_fullres"], plans["diffseg"]["source"]
    assert plans["diffseg"]["backbone"] == backbone
    assert ours["spacing"] == [6.0, 1.0, 1.0]
    assert ours["normalization_schemes"] == ["ZScoreNormalization"] * 4
    assert ours["architecture"]["arch_kwargs"]["kernel_sizes"][0] == [1, 3, 3]
    assert ours["architecture"]["arch_kwargs"]["features_per_stage"][0] == 4
    shares = source["shares"]["3d_fullres"]
    assert shares["skipped"] == 0
    assert shares["adapted"] > 0
    hows = [row["how"] for row in source["transfer"]["3d_fullres"] if row["kind"] == "adapted"]
    assert "1 input channel(s) averaged for 4, kernels 3×3×3 to 1×3×3" in hows
    assert sum(row["share"] for row in source["transfer"]["3d_fullres"]) == pytest.approx(1, abs=1e-4)
    console = Console(file=io.StringIO(), width=160)
    console.print(transfer_table(source))
    shown = console.file.getvalue()
    for row in source["transfer"]["3d_fullres"]:
        (line,) = [line for line in shown.splitlines() if f"│ {row['how']} " in line]
        assert f" {row['kind']} " in line
        assert f" {row['share']:.1%} " in line


def test_a_2d_checkpoint_is_for_slices(workspace: Workspace, checkpoint_of: Callable[..., Path]) -> None:
    plans = planned(workspace, 3, checkpoint=checkpoint_of(DiffSegTrainer, "2d"))
    assert plans["configurations"]["2d"]["spacing"] == [1.0, 1.0]
    assert plans["configurations"]["3d_fullres"]["spacing"] == [6.0, 1.0, 1.0]
    assert set(plans["diffseg"]["source"]["shares"]) == {"2d"}
    assert plans["diffseg"]["source"]["shares"]["2d"]["skipped"] == 0


def test_a_training_starts_from_the_checkpoint(workspace: Workspace, checkpoint_of: Callable[..., Path]) -> None:
    """The one that was planned for, adapted; another must fit as it is."""
    checkpoint, other = checkpoint_of(nnUNetTrainer), checkpoint_of()
    plans = planned(workspace, 3, checkpoint=checkpoint)
    project = Project.open(workspace, 3, Lines())
    preprocess(project, ["3d_fullres"])
    with pytest.raises(BadInputError, match=r"give nnUNetTrainer_3d_fullres_plain\.pth, which was planned for"):
        train(project, "3d_fullres", "all", "cpu")
    with pytest.raises(BadInputError, match="does not fit the plan"):
        train(project, "3d_fullres", "all", "cpu", pretrained=other)
    with pytest.raises(BeginningError):
        train(project, "3d_fullres", "all", "cpu", pretrained=checkpoint)
    shares = plans["diffseg"]["source"]["shares"]["3d_fullres"]
    said = f"{shares['loaded']:.1%} loaded, {shares['adapted']:.1%} adapted, {shares['skipped']:.1%} skipped"
    assert said in project.reporter.lines[-1]


def test_a_run_starts_from_the_checkpoint(workspace: Workspace, checkpoint_of: Callable[..., Path]) -> None:
    """From the one that was planned for, in place of a pretraining."""
    checkpoint = checkpoint_of(nnUNetTrainer)
    project = Project.open(workspace, 2, Lines())
    plan(project, request_of(checkpoint))
    with pytest.raises(BeginningError):
        run(project, RunRequest(training={"iterations": 2}, predict_test=False))
    assert project.reporter.lines[-1].startswith(f"starting from {checkpoint}")
    assert not any("pretrain/" in line for line in project.reporter.lines)


def test_what_a_probe_reads_is_found_in_the_checkpoint(
    workspace: Workspace, checkpoint_of: Callable[..., Path]
) -> None:
    """Our own pretraining at time steps; a stock network, or one whose weights are adapted, as it is."""
    own, stock = checkpoint_of(), checkpoint_of(nnUNetTrainer)

    def read(number: int, source: Path, **settings: Any) -> tuple[tuple[int, ...] | None, list[str]]:
        project = Project.open(workspace, number, Lines())
        chosen = probed(project, "3d_fullres", training_settings("pixel-ensemble", **settings), source)
        assert chosen.noisy == bool(chosen.time_steps)
        return chosen.time_steps, project.reporter.lines

    planned(workspace, 1)
    assert read(1, own) == ((50, 150, 250), [])
    assert read(1, own, time_steps=(3,)) == ((3,), [])
    planned(workspace, 3)
    assert read(3, own) == ((50, 150, 250), []), "that it does not fit is said where it is started from"
    steps, lines = read(1, stock)
    assert (steps, len(lines)) == ((), 1)
    assert "nnUNetTrainer_3d_fullres_plain.pth is no checkpoint of `diffseg pretrain`" in lines[0]
    planned(workspace, 3, checkpoint=own)
    steps, lines = read(3, own)
    assert (steps, len(lines)) == ((), 1)
    assert "are adapted to this plan" in lines[0]
    for source, settings in ((stock, {}), (own, {"time_steps": ()}), (own, {})):
        with pytest.raises(BadInputError, match="say how time steps are read, and none is"):
            read(3, source, noisy=False, **settings)


def test_the_trainer_adapts_the_weights(workspace: Workspace, checkpoint_of: Callable[..., Path]) -> None:
    weights = read_source(checkpoint_of(nnUNetTrainer)).weights
    plans = {**planned(workspace, 3, checkpoint=checkpoint_of(nnUNetTrainer)), "continue_training": False}
    project = Project.open(workspace, 3)
    (project.preprocessed_folder("3d_fullres")).mkdir(exist_ok=True)
    (project.preprocessed_folder("3d_fullres") / "c0.b2nd").touch()
    trainer = DiffSegTrainer(plans, "3d_fullres", "all", project.dataset_json(), device=torch.device("cpu"))
    trainer.initialize()
    heads = {key: value.clone() for key, value in trainer.network.state_dict().items() if ".seg_layers." in key}
    adaptation = trainer.adapt_from(weights, "source.pth")
    ours = trainer.network.state_dict()
    key = "encoder.stages.0.0.convs.0.conv.weight"
    torch.testing.assert_close(ours[key], (weights[key].sum(2, keepdim=True) / 4).expand(-1, 4, -1, -1, -1))
    for key, value in ours.items():
        if ".seg_layers." in key:
            assert torch.equal(value, heads[key])
    loaded = [match.key for match in adaptation.matches if match.kind == "loaded" and "encoder" in match.key]
    assert loaded
    assert all(torch.equal(ours[key], weights[key]) for key in loaded)
    before = {key: value.clone() for key, value in ours.items()}
    with pytest.raises(BadInputError, match=r"Only 0\.0% of the parameters of 3d_fullres can start from none\.pth"):
        trainer.adapt_from({}, "none.pth")
    assert all(torch.equal(value, before[key]) for key, value in trainer.network.state_dict().items())


def test_refused_checkpoints(workspace: Workspace, checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    whole = torch.load(checkpoint_of(), weights_only=True)
    cut = {**whole, "network_weights": {k: v for k, v in whole["network_weights"].items() if "stages.0" in k}}
    foreign = {**whole, "plans": json.loads(json.dumps(whole["plans"]))}
    architecture = foreign["plans"]["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "os.system"
    other = {**whole, "plans": json.loads(json.dumps(whole["plans"]))}
    architecture = other["plans"]["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.primus.Primus"

    def damaged(part: str, **changes: Any) -> dict[str, Any]:
        plans = json.loads(json.dumps(whole["plans"]))
        configuration = plans["configurations"]["3d_fullres"]
        parts = {"configuration": configuration, "arguments": configuration["architecture"]["arch_kwargs"]}
        parts[part].update(changes)
        return {**whole, "plans": plans}

    cases: dict[str, tuple[Any, str]] = {
        "flat": (damaged("configuration", spacing=[0.0, 1.0, 1.0]), "plans in .* are not whole.*spacing"),
        "nowhere": (damaged("configuration", spacing=[float("nan"), 1.0, 1.0]), "plans in .* are not whole.*spacing"),
        "unmasked": (damaged("configuration", use_mask_for_norm=[]), "plans in .* are not whole.*normalisation"),
        "ragged": (damaged("arguments", strides=[[1, 1, 1]]), "plans in .* are not whole.*strides of 1 stages"),
        "text": ({**whole, "network_weights": {"encoder": "none"}}, "plans in .* are not whole.*no tensors"),
        "cut": (cut, r"Only .*% of the parameters of 3d_fullres can start from cut\.pth, less than 50%:\n.*skipped"),
        "no_plans": ({"network_weights": whole["network_weights"]}, "does not say what it was planned with"),
        "broken_plans": ({**whole, "configuration": "3d_none"}, "plans in .* are not whole"),
        "foreign": (foreign, "name os.system"),
        "other": (other, "is of a Primus, which is not planned here.*ResidualEncoderUNet, PlainConvUNet"),
        "weightless": ({"state_dict": {}}, "holds no 'network_weights'"),
    }
    project = Project.open(workspace, 2)
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        with pytest.raises(BadInputError, match=f"(?s){message}"):
            planned(workspace, 2, checkpoint=path)
    shutil.copy(workspace.raw / project.name / "dataset.json", tmp_path / "text.pth")
    for path, message in ((tmp_path / "text.pth", "cannot be read"), (tmp_path / "gone.pth", "There is no checkpoint")):
        with pytest.raises(BadInputError, match=message):
            plan(project, request_of(path))
