"""A refiner that fits the budget its segmentor was planned for: its step is counted as the planned ones are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from diffseg_nnunet.diffusion.bernoulli import BernoulliDiffusion
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.planning.memory import Allowances, PeakMemory, Step, peak_of
from diffseg_nnunet.planning.nnunet_rules import LEAST_BATCH
from diffseg_nnunet.planning.section import diffseg_section, stage_plan
from diffseg_nnunet.refinement.network import Refiner
from diffseg_nnunet.refinement.sizing import WIDTHS, planned_refiner
from diffseg_nnunet.training.ema import ExponentialMovingAverage
from diffseg_nnunet.training.refining import Collaboration, RefinementSettings, Targets

from .steps import PRETRAINING_DTYPE, Shape, autocast_of, training_loss


@dataclass(frozen=True)
class FittedRefiner:
    """What a refiner is trained with.

    Attributes:
        width: channels of its first stage.
        batch_size: patches.
        memory: what a step takes.
        planned_batch_size: of the segmentor's training.
    """

    width: int
    batch_size: int
    memory: PeakMemory
    planned_batch_size: int

    def as_stage(self, patch_size: Sequence[int]) -> dict[str, Any]:
        """In the form of a planned stage of a plans file."""
        parts = {name: round(gib, 3) for name, gib in self.memory.parts().items()}
        return {
            "patch_size": list(patch_size),
            "batch_size": self.batch_size,
            "predicted_peak_gib": round(self.memory.total_gib, 3),
            "memory_gib": parts,
        }


def refining_steps(
    shape: Shape, settings: RefinementSettings, dtype: torch.dtype | None = PRETRAINING_DTYPE
) -> Iterator[Step]:
    """The half-steps of a batch: the refiner's, and where the segmentor learns, too, its own.

    A step is to be measured before the next is asked for.
    """
    segmentor = shape.network(shape.heads, deep_supervision=settings.segmentor == "alternate")
    arguments = shape.architecture["arch_kwargs"]
    refiner = Refiner(planned_refiner(arguments, shape.channels, shape.heads, settings.width, settings.binary))
    # a schedule that is made without asking tensors for numbers, which fake ones lack
    diffusion = BernoulliDiffusion(replace(settings.diffusion, schedule="linear_alpha_bar"))
    together = Collaboration(segmentor, refiner, diffusion, Targets(shape.heads, shape.regions, shape.ignore), settings)
    average = ExponentialMovingAverage({"refiner": refiner}, settings.ema_decay)
    optimizer = torch.optim.AdamW(refiner.parameters(), settings.initial_lr)
    theirs = torch.optim.AdamW(segmentor.parameters(), settings.segmentor_lr)
    learns_too = settings.segmentor == "alternate"
    segmentor.requires_grad_(learns_too)

    def batch() -> tuple[Tensor, Any]:
        kind, channels = (torch.bool, shape.heads + shape.ignore) if shape.regions else (torch.int16, 1)
        patches = shape.deep_supervision_patches if learns_too else [shape.patch]
        target = [torch.zeros((shape.batch, channels, *patch), dtype=kind) for patch in patches]
        return torch.zeros((shape.batch, shape.channels, *shape.patch)), target

    def refining(batch: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        image, target = batch
        with autocast_of(dtype):
            with torch.no_grad():
                said = together.says(image)
            return together.refiner_loss(said, image, target, torch.Generator()), said

    def segmenting(batch: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        image, target = batch
        with autocast_of(dtype):
            own_loss, weight = training_loss(shape), settings.segmentor_weight
            return together.segmentor_loss(
                together.says(image), image, target, torch.Generator(), own_loss, weight
            ), None

    modules = [refiner, segmentor]
    idle = _state(theirs) if learns_too else []
    yield Step(modules, optimizer, batch, refining, average.tensors(), idle, average.update, settings.gradient_clip)
    if learns_too:
        held = _state(optimizer)
        yield Step(modules, theirs, batch, segmenting, average.tensors(), held, None, settings.gradient_clip)


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """An optimiser's state, made if it has none."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [value for state in optimizer.state.values() for value in state.values()]


def refiner_memory(
    shape: Shape, settings: RefinementSettings, dtype: torch.dtype | None = PRETRAINING_DTYPE
) -> PeakMemory:
    """The larger of the half-steps' peaks."""
    with FakeTensorMode():
        peaks = [peak_of(step, Allowances()) for step in refining_steps(shape, settings, dtype)]
    return max(peaks, key=lambda peak: peak.total_gib)


def fit_refiner(
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
    settings: RefinementSettings,
    width: int | None = None,
) -> FittedRefiner:
    """The widest refiner whose step fits the plan's budget, with as many of the plan's patches as fit beside it.

    Args:
        plans: with our section, whose budget is kept to.
        configuration: of the plans.
        settings: of the training; its width and batch are not read.
        width: channels of the first stage; None: the widest of WIDTHS that fits.

    Raises:
        BadInputError: none fits; the message says what would.
    """
    shape, planned_memory = refined_shape(plans, configuration, dataset_json), diffseg_section(plans)["memory"]
    budget, dtype = planned_memory["budget_gib"], PRETRAINING_DTYPE if planned_memory.get("bfloat16", True) else None
    planned = stage_plan(plans, configuration, "training")["batch_size"]

    def memory(width: int, batch: int) -> PeakMemory:
        return refiner_memory(replace(shape, batch=batch), replace(settings, width=width), dtype)

    least = min(LEAST_BATCH, planned)
    try:
        for candidate in WIDTHS if width is None else (width,):
            smallest = memory(candidate, least)
            if smallest.total_gib <= budget:
                batch, taken = _largest_batch(lambda n, w=candidate: memory(w, n), smallest, least, planned, budget)
                return FittedRefiner(candidate, batch, taken, planned)
    except ValueError as error:
        raise BadInputError(f"{configuration} has no refiner: {error}.", "Refine another configuration.") from error
    raise _nothing_fits(configuration, settings, width, replace(shape, batch=least), budget, dtype)


def _largest_batch(
    memory: Any, smallest: PeakMemory, least: int, planned: int, budget: float
) -> tuple[int, PeakMemory]:
    for batch in range(planned, least, -1):
        taken = memory(batch)
        if taken.total_gib <= budget:
            return batch, taken
    return least, smallest


def refined_shape(plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]) -> Shape:
    """What a refiner's step is of: the segmentor's patch and batch."""
    manager = PlansManager(dict(plans))
    settings, labels = manager.get_configuration(configuration), manager.get_label_manager(dict(dataset_json))
    return Shape(
        settings.configuration["architecture"],
        determine_num_input_channels(manager, settings, dict(dataset_json)),
        labels.num_segmentation_heads,
        tuple(settings.patch_size),
        settings.batch_size,
        labels.has_regions,
        labels.has_ignore_label,
    )


def _nothing_fits(
    configuration: str,
    settings: RefinementSettings,
    width: int | None,
    shape: Shape,
    budget: float,
    dtype: torch.dtype | None,
) -> BadInputError:
    """What the user is told, with what would fit."""
    asked, narrowest = width or WIDTHS[-1], WIDTHS[-1]

    def needed(settings: RefinementSettings) -> float:
        return refiner_memory(shape, settings, dtype).total_gib

    settings = replace(settings, width=asked)
    gib = needed(settings)
    ways = {}
    if asked > narrowest:
        ways[f"--width {narrowest}"] = replace(settings, width=narrowest)
    if settings.segmentor == "alternate":
        ways["--segmentor frozen"] = replace(settings, segmentor="frozen")
    fitting = [option for option, changed in ways.items() if needed(changed) <= budget]
    way = f"Refine with {' or '.join(fitting)}, which fits, or plan" if fitting else "Plan"
    return BadInputError(
        f"A refiner of {configuration} does not fit {budget:g} GiB: with {asked} channels, "
        f"{'and the segmentor learning in turn, ' if settings.segmentor == 'alternate' else ''}"
        f"a batch of {shape.batch} patches takes {gib:.2f} GiB.",
        f"{way} with --gpu-memory {math.ceil(gib * 10) / 10:g} or more, and train the fold anew.",
    )
