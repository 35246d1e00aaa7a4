"""The training steps of both stages as the trainers make them, built to be counted on fake tensors.

Networks and losses are nnU-Net's, the pretraining's parts are the pretrainer's own; only what loads, draws and logs is
left out, which takes no GPU memory worth counting.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from diffseg_nnunet.coordinates.guidance import MAP_CHANNELS
from diffseg_nnunet.coordinates.head import CoordinateRegressor
from diffseg_nnunet.planning.autocast_rules import CudaAutocast
from diffseg_nnunet.planning.hardware import GIB
from diffseg_nnunet.planning.memory import Step, StorageLog
from diffseg_nnunet.training.assembly import assemble
from diffseg_nnunet.training.draws import Draws
from diffseg_nnunet.training.ema import ExponentialMovingAverage
from diffseg_nnunet.training.objective import DenoisingObjective, RegressionObjective
from diffseg_nnunet.training.settings import PretrainingSettings

TRAINING_DTYPE = torch.float16  # what nnU-Net's autocast takes on CUDA
PRETRAINING_DTYPE = torch.bfloat16

_RATE, _MOMENTUM, _WEIGHT_DECAY = 1e-2, 0.99, 3e-5  # nnU-Net's; the values cost nothing, the states do


@dataclass(frozen=True)
class Shape:
    """What a step is of.

    Attributes:
        architecture: nnU-Net's entry of a configuration: class name, arguments, which of them are imported.
        channels: of the image, and of a previous stage's segmentation where there is one.
        heads: outputs of the segmentation network.
        patch: voxels.
        batch: patches.
        regions: whether the heads are regions, which may overlap.
        ignore: whether there is an ignore label, whose voxels the loss leaves out.
    """

    architecture: Mapping[str, Any]
    channels: int
    heads: int
    patch: tuple[int, ...]
    batch: int
    regions: bool = False
    ignore: bool = False

    def network(self, outputs: int, deep_supervision: bool, thinner: int = 1) -> nn.Module:
        """The planned network, not initialised; with `thinner` times less features, as the trainer thins it."""
        arguments = dict(self.architecture["arch_kwargs"])
        if thinner > 1:
            arguments["features_per_stage"] = [max(4, n // thinner) for n in arguments["features_per_stage"]]
        return get_network_from_plans(
            self.architecture["network_class_name"],
            arguments,
            self.architecture["_kw_requires_import"],
            self.channels,
            outputs,
            allow_init=False,
            deep_supervision=deep_supervision,
        )

    @property
    def deep_supervision_patches(self) -> list[tuple[int, ...]]:
        """Patch of each output of the training network, from fine to coarse."""
        strides = np.cumprod(np.vstack(self.architecture["arch_kwargs"]["strides"]), axis=0)[:-1]
        return [tuple(int(n) for n in np.array(self.patch) // stride) for stride in strides]


def autocast_of(dtype: torch.dtype | None) -> AbstractContextManager:
    """CUDA's autocast to `dtype`; nothing for None."""
    return nullcontext() if dtype is None else CudaAutocast(dtype)


def training_step(shape: Shape, dtype: torch.dtype | None = TRAINING_DTYPE) -> Step:
    """nnU-Net's training step: Dice and cross entropy with deep supervision, SGD with momentum."""
    network = shape.network(shape.heads, deep_supervision=True)
    optimizer = torch.optim.SGD(
        network.parameters(), _RATE, weight_decay=_WEIGHT_DECAY, momentum=_MOMENTUM, nesterov=True
    )
    loss_function = training_loss(shape)

    def batch() -> tuple[Tensor, list[Tensor]]:
        kind, channels = (torch.bool, shape.heads + shape.ignore) if shape.regions else (torch.int16, 1)
        target = [torch.zeros((shape.batch, channels, *patch), dtype=kind) for patch in shape.deep_supervision_patches]
        return torch.zeros((shape.batch, shape.channels, *shape.patch)), target

    def loss(batch: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, Any]:
        data, target = batch
        with autocast_of(dtype):
            output = network(data)
            return loss_function(output, target), output  # nnU-Net holds the output until the step is over

    return Step([network], optimizer, batch, loss)


def training_loss(shape: Shape) -> nn.Module:
    """nnU-Net's loss of labels or regions, with deep supervision."""
    dice = {"batch_dice": True, "smooth": 1e-5, "ddp": False}
    if shape.regions:
        dice["do_bg"] = True
        loss = DC_and_BCE_loss({}, dice, use_ignore_label=shape.ignore, dice_class=MemoryEfficientSoftDiceLoss)
    else:
        ignored = shape.heads if shape.ignore else None
        loss = DC_and_CE_loss(
            {**dice, "do_bg": False}, {}, ignore_label=ignored, dice_class=MemoryEfficientSoftDiceLoss
        )
        loss = _Masked(loss) if shape.ignore else loss
    weights = np.array([0.5**level for level in range(len(shape.deep_supervision_patches))])
    weights[-1] = 0
    return DeepSupervisionWrapper(loss, weights / weights.sum())


class _Masked(nn.Module):
    """nnU-Net's loss of labels some of which are ignored, without asking whether all of them are: fake tensors cannot
    tell."""

    def __init__(self, loss: DC_and_CE_loss):
        super().__init__()
        self.loss = loss

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        mask = target != self.loss.ignore_label
        dice = self.loss.dc(output, torch.where(mask, target, 0), loss_mask=mask)
        return self.loss.weight_ce * self.loss.ce(output, target[:, 0]) + self.loss.weight_dice * dice


def pretraining_steps(
    shape: Shape, settings: PretrainingSettings, dtype: torch.dtype | None = PRETRAINING_DTYPE
) -> Iterator[Step]:
    """The steps of a pretraining's phases, in order: one, or with guidance the regressor's and the denoiser's.

    A step is to be measured before the next is asked for, which freezes what it trained.
    """
    # the schedule's values need numbers, which fake tensors lack, and take the same memory for all schedules
    settings = replace(settings, diffusion=replace(settings.diffusion, schedule="linear_beta"))
    regressor, idle = None, []
    if settings.coordinates.mode == "guidance":
        regressor = CoordinateRegressor(shape.network(MAP_CHANNELS, deep_supervision=False, thinner=2))
        step = _step(
            shape, settings, dtype, {"regressor": regressor}, RegressionObjective(regressor, settings.coordinates)
        )
        yield step
        regressor.requires_grad_(False)
        # the phase is over, but what it trained with stays where it is
        idle = [*regressor.parameters(), *step.average]
        idle += [value for state in step.optimizer.state.values() for value in state.values()]
    network = shape.network(shape.channels, deep_supervision=False)
    assembly = assemble(network, regressor, settings, torch.device("cpu"))
    objective = DenoisingObjective(assembly.denoiser, settings.coordinates, assembly.head, assembly.tap)
    yield _step(shape, settings, dtype, assembly.modules, objective, idle)


def _step(
    shape: Shape,
    settings: PretrainingSettings,
    dtype: torch.dtype | None,
    trained: Mapping[str, nn.Module],
    objective: DenoisingObjective | RegressionObjective,
    idle: Sequence[Tensor] = (),
) -> Step:
    parameters = [p for module in trained.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, _RATE, weight_decay=settings.weight_decay)
    average = ExponentialMovingAverage(dict(trained), settings.ema_decay)

    def loss(batch: tuple[dict[str, Tensor], dict[str, Tensor]]) -> tuple[Tensor, Any]:
        loaded, drawn = batch
        with autocast_of(dtype):
            return objective.terms(loaded, Draws(**drawn)).loss, None

    return Step(
        modules=list(trained.values()),
        optimizer=optimizer,
        batch=lambda: pretraining_batch(shape, settings),
        loss=loss,
        average=average.tensors(),
        idle=idle,
        update_average=average.update,
        clip_norm=settings.gradient_clip,
        keeps_batch=False,
    )


def pretraining_batch(shape: Shape, settings: PretrainingSettings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch of the loader's form and what is drawn for it (the fields of Draws), of zeros."""
    data = torch.zeros((shape.batch, shape.channels, *shape.patch))
    points = settings.coordinates.points_per_patch if settings.coordinates.mode != "none" else 0
    flags = torch.zeros(shape.batch, dtype=torch.bool)
    batch = {
        "data": data,
        "mask": torch.ones((shape.batch, 1, *shape.patch), dtype=torch.bool),
        "affine": torch.zeros((shape.batch, 3, 4), dtype=torch.float64),
    }
    drawn = {
        "noise": torch.zeros_like(data),
        "t": torch.zeros(shape.batch, dtype=torch.int64),
        "clean": flags,
        "voxels": torch.zeros((shape.batch, points, 3), dtype=torch.int64),
        "dropped": flags.clone(),
    }
    return batch, drawn


def inference_window_gib(shape: Shape, dtype: torch.dtype | None = TRAINING_DTYPE) -> float:
    """Peak of predicting one window, GiB: the network's weights included, nothing kept for a backward pass."""
    network = shape.network(shape.heads, deep_supervision=False).eval()
    log = StorageLog()
    log.note([*network.parameters(), *network.buffers()])
    with log, torch.no_grad(), autocast_of(dtype):
        window = torch.zeros((1, shape.channels, *shape.patch))
        prediction = network(window)
        prediction += torch.flip(network(torch.flip(window, (2,))), (2,))  # mirrored copies are added up
    del window, prediction
    return sum(log.at_peak().values()) / GIB


def sliding_window_gib(shape: Shape, image: Sequence[int]) -> float:
    """What nnU-Net's sliding window keeps on the GPU beside a window, GiB.

    The image in float32, the logits it adds up and the count of windows a voxel lies in, both in float16.

    Args:
        image: voxels of the case, resampled; padded to a patch at least. Three axes, also in 2D.
    """
    patch = (1,) * (len(image) - len(shape.patch)) + shape.patch
    padded = math.prod(max(int(length), side) for length, side in zip(image, patch, strict=True))
    return padded * (4 * shape.channels + 2 * shape.heads + 2) / GIB
