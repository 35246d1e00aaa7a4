"""A pretrained checkpoint as a network that denoises and tells place: averaged weights, ready to use."""

from __future__ import annotations

import pydoc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor

from diffseg_nnunet import registry
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.planning.section import stage_plan
from diffseg_nnunet.training import checkpoint as checkpoints
from diffseg_nnunet.training.assembly import Assembly, assemble
from diffseg_nnunet.training.ema import ExponentialMovingAverage
from diffseg_nnunet.training.settings import PretrainingSettings

_NETWORKS = ("dynamic_network_architectures.architectures.",) * 2
_LAYERS = ("torch.nn.", "torch.nn.modules.")
"""How names begin, and the package of the classes that they name."""


@dataclass(frozen=True)
class PretrainedModel:
    """What a pretrained checkpoint holds.

    Attributes:
        assembly: denoiser and coordinates, with averaged weights, in evaluation mode.
        settings: of the pretraining.
        plans, configuration: nnU-Net's managers, as pretrained with.
        configuration_name: 2d, 3d_fullres, …
        dataset_json: of the planned data set.
        channels: of the images.
        patch_size: of the pretraining, 2 or 3 axes.
        pool: source -> case ids it has seen.
        device: where the network lies.
    """

    assembly: Assembly
    settings: PretrainingSettings
    plans: PlansManager
    configuration: ConfigurationManager
    configuration_name: str
    dataset_json: Mapping[str, Any]
    channels: int
    patch_size: tuple[int, ...]
    pool: Mapping[str, list[str]]
    device: torch.device


def load_pretrained(path: Path | str, device: torch.device) -> PretrainedModel:
    """Load a checkpoint of ``diffseg pretrain``, finished or not; nothing in it is executed.

    Raises:
        BadInputError: the file is missing, or no such checkpoint.
    """
    content = checkpoints.load_safely(path)
    missing = [key for key in ("phases", "settings", "plans", "configuration", "dataset_json") if key not in content]
    if missing:
        raise BadInputError(
            f"{path} is no checkpoint of this version's `diffseg pretrain`: it has no {', '.join(missing)}.",
            "Give fold_X/checkpoint_final.pth of a DiffSegPretrainer folder, or pretrain again.",
        )
    try:
        return _built(content, path, device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadInputError(
            f"{path} is damaged, or of another version of `diffseg pretrain` ({type(error).__name__}: {error}).",
            "Pretrain again, or use the version that wrote it.",
        ) from error


def _built(content: Mapping[str, Any], path: Path | str, device: torch.device) -> PretrainedModel:
    settings = PretrainingSettings.from_json(content["settings"])
    plans = PlansManager(content["plans"])
    configuration = plans.get_configuration(content["configuration"])
    refuse_foreign_code(configuration.configuration["architecture"], path)
    channels = determine_num_input_channels(plans, configuration, content["dataset_json"])
    trainer = registry.load("trainers", "pretrain")
    regressor = None
    if settings.coordinates.mode == "guidance":
        regressor = trainer.build_regressor(plans, configuration, channels).to(device)
    network = trainer.build_network_architecture(plans, configuration, channels, channels, False).to(device)
    assembly = assemble(network, regressor, settings, device)
    parts = {"denoiser": assembly.modules} | ({"regressor": {"regressor": regressor}} if regressor else {})
    for name, modules in parts.items():
        _take_averages(modules, content["phases"][name], name)
    return PretrainedModel(
        assembly,
        settings,
        plans,
        configuration,
        content["configuration"],
        content["dataset_json"],
        channels,
        tuple(stage_plan(content["plans"], content["configuration"], "pretraining")["patch_size"]),
        content.get("pool", {}),
        device,
    )


def weights_at(model: PretrainedModel, time_steps: Sequence[int], source: str) -> list[dict[str, Tensor]]:
    """For each time step the weights of the stock network that equals the pretrained one there.

    Args:
        source: the checkpoint's name for the message.

    Raises:
        BadInputError: it was pretrained with fewer time steps.
    """
    there = model.settings.diffusion.timesteps
    if max(time_steps) >= there:
        raise BadInputError(
            f"{source} was pretrained with {there} time steps, there is none {max(time_steps)}.",
            f"Give time steps from 0 to {there - 1}.",
        )
    return [model.assembly.denoiser.folded(t) for t in time_steps]


def refuse_foreign_code(architecture: Mapping[str, Any], path: Path | str) -> None:
    """Plans name classes, which nnU-Net imports and calls: those of a file from outside could be any.

    Raises:
        BadInputError: one is not of the U-Nets nnU-Net plans.
    """
    arguments = architecture["arch_kwargs"]
    imported = [arguments[key] for key in architecture["_kw_requires_import"] if arguments[key] is not None]
    names = [(architecture["network_class_name"], *_NETWORKS), *((name, *_LAYERS) for name in imported)]
    foreign = [name for name, prefix, package in names if not _is_module_of(name, prefix, package)]
    if foreign:
        raise BadInputError(
            f"The plans in {path} name {', '.join(map(str, foreign))}, which is no part of a planned network.",
            "Use checkpoints from people you trust; those of `diffseg pretrain` name nnU-Net's networks alone.",
        )


def _is_module_of(name: Any, prefix: str, package: str) -> bool:
    """Whether nnU-Net would find a class of modules of the package by this name. The prefix alone does not tell: what
    begins with it may lead through imports to anything, ``torch.nn.….os.system``."""
    if not isinstance(name, str) or not name.startswith(prefix):
        return False
    try:
        found = pydoc.locate(name)  # as nnU-Net does
    except pydoc.ErrorDuringImport:
        return False
    return isinstance(found, type) and issubclass(found, torch.nn.Module) and found.__module__.startswith(package)


def _take_averages(modules: dict[str, torch.nn.Module], state: dict[str, Any], phase: str) -> None:
    for name, module in modules.items():
        module.load_state_dict(state[f"{name}_state"])
        module.eval()
    average = ExponentialMovingAverage(modules, decay=0.0)
    average.load_state_dict(state[f"{phase}_ema_state"])
    average.keep()
