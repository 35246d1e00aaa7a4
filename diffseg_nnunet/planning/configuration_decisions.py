"""Why each configuration of a plan is as it is: spacing, topology, and patch, batch and memory of each stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from diffseg_nnunet.planning import nnunet_rules as rules
from diffseg_nnunet.planning.decisions import FULLRES, LOWRES, Decision, PlanView, joined, shown

_STAGES = ("training", "pretraining")


def of_configuration(plan: PlanView, name: str) -> Iterator[Decision]:
    """The decisions of one configuration of the plans."""
    raw, configuration = plan.plans["configurations"][name], plan.configuration(name)
    parent = raw.get("inherits_from")
    if name not in plan.section.get("configurations", {}):
        origin = f", inherits from {parent}" if parent else ""
        why = f"made by hand{origin}, and kept; stock nnU-Net trains it, the stages of diffseg do not know it"
        yield Decision(name, "planned", False, why)
        return
    if "previous_stage" in raw:
        why = f"{parent or 'a configuration'} that reads the segmentation of {raw['previous_stage']} besides the image"
        yield Decision(name, "planned", True, why)
    if name == LOWRES:
        yield _lowres(plan)
    if parent is None:
        yield from _sampling(plan, name, configuration)
        yield from _topology(plan, name, configuration)
        yield from _transfer(plan, name)
    for stage in _STAGES:
        yield from _stage(plan, name, stage)
    yield from _inference(plan, name)
    if "batch_dice" in configuration:
        yield _batch_dice(plan, name, configuration["batch_dice"])
    known = {"spacing", "topology", "patch", "batch", "lowres"}
    known |= {f"{stage}_{what}" for stage in _STAGES for what in ("patch", "batch")}
    for what, why in plan.reasons(name).items():
        if what not in known:
            yield Decision(name, what.replace("_", " "), None, why)


def _sampling(plan: PlanView, name: str, configuration: Mapping[str, Any]) -> Iterator[Decision]:
    if "spacing" not in configuration:
        return
    spacing = [float(value) for value in configuration["spacing"]]
    yield Decision(name, "target spacing, mm", spacing, _spacing_reason(plan, name, spacing))
    if "median_image_size_in_voxels" in configuration:
        shape = [round(float(size)) for size in configuration["median_image_size_in_voxels"]]
        yield Decision(name, "median image, voxels", shape, "median over the cases, at the target spacing")
    kwargs = configuration.get("resampling_fn_data_kwargs", {})
    if "order" in kwargs:
        orders = {
            "image": kwargs["order"],
            "labels": configuration.get("resampling_fn_seg_kwargs", {}).get("order"),
            "across coarse slices": kwargs.get("order_z"),
        }
        orders = {key: order for key, order in orders.items() if order is not None}
        yield Decision(name, "order of resampling", orders, _resampling_reason(plan, spacing, kwargs))


def _spacing_reason(plan: PlanView, name: str, spacing: Sequence[float]) -> str:
    planned = plan.reasons(name).get("spacing")
    if len(spacing) == 2 and FULLRES in plan.configurations:
        return planned or f"that of {FULLRES} within a slice; slices are not resampled across"
    if name == LOWRES:
        return planned or (
            f"that of {FULLRES}, enlarged by 3% at a time, axes less than half as coarse as the coarsest first, "
            f"until a patch covers {rules.LOWRES_SHARE:.0%} of the median image"
        )
    if plan.fingerprint is None:
        return planned or "the fingerprint is missing, so the rule that led to it is not known"
    target = rules.target_spacing(plan.fingerprint)
    expected = [target.spacing[axis] for axis in plan.transposition][-len(spacing) :]
    if not np.allclose(expected, spacing, rtol=1e-3):
        by_rule = shown([float(f"{value:.4g}") for value in expected])
        adopted = plan.adopted(name, "spacing") or plan.adopted("2d", "spacing")
        origin = "asked for (--spacing)" if adopted is None else f"from the checkpoint (--from-checkpoint): {adopted}"
        return planned or f"{origin}; nnU-Net's rule would give {by_rule}"
    cases = len(plan.fingerprint["spacings"])
    if len(spacing) == 2:
        return f"median of the {cases} cases"
    axis, median = plan.transposition.index(target.coarse_axis), target.median[target.coarse_axis]
    if not target.lowered:
        return (
            f"median of the {cases} cases: none of the axes is both more than {rules.ANISOTROPY:g} times as coarse as "
            f"the others and short of voxels"
        )
    chosen = "the other axes' spacing, since the 10th percentile is finer" if target.limited else "the 10th percentile"
    return (
        f"median of the {cases} cases, but along axis {axis} {chosen}: its median, {median:.4g} mm, is more than "
        f"{rules.ANISOTROPY:g} times the others', and it has less than a third of their voxels"
    )


def _resampling_reason(plan: PlanView, spacing: Sequence[float], kwargs: Mapping[str, Any]) -> str:
    if kwargs.get("force_separate_z") is not None:
        return "all cases slice by slice" if kwargs["force_separate_z"] else "no case slice by slice"
    rule = f"a case is resampled slice by slice where one axis is more than {rules.ANISOTROPY:g} times as coarse"
    if plan.fingerprint is None or len(spacing) != 3:
        return f"{rule} as another"
    count = rules.resampled_apart(plan.fingerprint, spacing)
    return f"{rule} as another, in its own or in the target spacing: {count} of {len(plan.fingerprint['spacings'])}"


def _topology(plan: PlanView, name: str, configuration: Mapping[str, Any]) -> Iterator[Decision]:
    architecture = configuration.get("architecture", {}).get("arch_kwargs", {})
    strides = [list(map(int, stride)) for stride in architecture.get("strides", [])]
    if not strides or "patch_size" not in configuration:
        return
    patch = configuration["patch_size"]
    total = np.prod(strides, axis=0).tolist()
    lowest = joined([size // stride for size, stride in zip(patch, total, strict=True)])
    halvings = ", ".join(str(int(stride).bit_length() - 1) for stride in total)
    why = f"the patch of {joined(patch)} is halved {halvings} times along its axes, to feature maps of {lowest}"
    yield Decision(name, "stages", len(strides), plan.reasons(name).get("topology") or why)
    most, adopted = rules.MOST_FEATURES[len(patch)], plan.adopted(name, "topology")
    if "features_per_stage" in architecture:
        why = f"doubled from stage to stage, at most {most} in {len(patch)}D"
        yield Decision(name, "features", list(architecture["features_per_stage"]), adopted or why)
    why = (
        f"an axis is halved while {2 * rules.LEAST_EDGE} voxels are left of it, "
        "and its voxels are less than twice as long as the shortest"
    )
    yield Decision(name, "strides", strides, adopted or why)
    if "kernel_sizes" in architecture:
        kernels = [list(kernel) for kernel in architecture["kernel_sizes"]]
        yield Decision(name, "kernels", kernels, adopted or _kernel_reason(kernels))
    blocks = {
        "encoder": architecture.get("n_blocks_per_stage", architecture.get("n_conv_per_stage")),
        "decoder": architecture.get("n_conv_per_stage_decoder"),
    }
    if all(blocks.values()):
        unit = "residual blocks" if "n_blocks_per_stage" in architecture else "convolutions"
        why = f"nnU-Net's numbers of {unit} for this backbone"
        yield Decision(name, "blocks", {part: list(numbers) for part, numbers in blocks.items()}, adopted or why)


def _transfer(plan: PlanView, name: str) -> Iterator[Decision]:
    shares = plan.source.get("shares", {}).get(name)
    if shares is not None:
        parts = [f"{row['kind']}: {row['how']} ({row['share']:.1%})" for row in plan.source["transfer"][name]]
        yield Decision(name, "starts from the checkpoint, shares of parameters", dict(shares), "; ".join(parts))


def _kernel_reason(kernels: Sequence[Sequence[int]]) -> str:
    flat = {axis: sum(kernel[axis] == 1 for kernel in kernels) for axis in range(len(kernels[0]))}
    apart = [f"1 along axis {axis} in the first {count} stage(s)" for axis, count in flat.items() if count]
    if not apart:
        return "3 everywhere: no axis has voxels twice as long as the shortest"
    return f"{', '.join(apart)}, where its voxels are at least twice as long as the shortest; 3 elsewhere"


def _stage(plan: PlanView, name: str, stage: str) -> Iterator[Decision]:
    chosen = plan.stages(name).get(stage)
    if chosen is None:
        if stage == "pretraining":
            why = "none: besides the image it reads the previous stage's segmentation"
            yield Decision(name, "pretraining", None, why)
        return
    patch, batch = list(chosen["patch_size"]), chosen["batch_size"]
    yield Decision(name, f"patch of {stage}, voxels", patch, _patch_reason(plan, name, stage, patch))
    yield Decision(name, f"batch of {stage}", batch, _batch_reason(plan, name, stage, patch, batch))
    if "predicted_peak_gib" in chosen:
        peak = chosen["predicted_peak_gib"]
        value = {"peak": peak, **chosen.get("memory_gib", {})}
        if "measured" in chosen:
            value |= {f"measured, {kind}": chosen["measured"][f"{kind}_gib"] for kind in ("allocated", "reserved")}
        yield Decision(name, f"memory of {stage}, GiB", value, _share_of_budget(plan, peak))


def _patch_reason(plan: PlanView, name: str, stage: str, patch: Sequence[int]) -> str:
    reasons = plan.reasons(name)
    if f"{stage}_patch" in reasons:
        return reasons[f"{stage}_patch"]
    training = plan.stages(name).get("training", {}).get("patch_size")
    if stage == "pretraining" and training is not None and list(training) == list(patch):
        return "that of the training: both stages have one topology"
    if "patch" in reasons:
        return reasons["patch"]
    if stage == "pretraining":
        return "its own, for the topology of the training"
    shape = "cube" if len(patch) == 3 else "square"
    rule = f"shaped like a {shape} in mm, at most the median image, then less along the axis that covers most of it"
    median = plan.configuration(name).get("median_image_size_in_voxels")
    if median is None:
        return f"{rule}, until a batch of {rules.LEAST_BATCH} fits the budget"
    covered = math.prod(patch) / math.prod(median)
    if all(size >= whole for size, whole in zip(patch, median, strict=True)):
        return "the whole median image, and what makes each axis divisible by its strides"
    return f"{rule}, until a batch of {rules.LEAST_BATCH} fits the budget: {covered:.0%} of the median image's voxels"


def _batch_reason(plan: PlanView, name: str, stage: str, patch: Sequence[int], batch: int) -> str:
    reasons = plan.reasons(name)
    before = plan.stages(name).get(stage, {}).get("measured", {}).get("planned_batch_size")
    if before is not None:
        return f"stepped down from {before} (--measure): the measured memory of more did not keep to the budget"
    if f"{stage}_batch" in reasons:
        return reasons[f"{stage}_batch"]
    if stage == "pretraining":
        pairs = "patches come in pairs of one scan, so that coordinates can be compared"
        return f"{pairs}; {reasons['batch']}" if "batch" in reasons else pairs
    if "batch" in reasons:
        return reasons["batch"]
    voxels = plan.median_voxels(name)
    if voxels is None or plan.training_cases is None:
        return f"at least {rules.LEAST_BATCH}, at most what fits the budget and 5% of the data set's voxels"
    limit = rules.batch_limit(patch, voxels * plan.training_cases)
    share = f"{rules.LARGEST_SHARE_OF_DATA:.0%} of the voxels of the {plan.training_cases} labelled cases"
    if limit <= rules.LEAST_BATCH == batch:
        return f"the least; {share} are {limit} patches"
    if batch == limit:
        return f"{share} are {limit} patches: a batch has no more, whatever fits"
    if batch > limit:
        return f"as planned; {share} are {limit} patches"
    if batch <= rules.LEAST_BATCH:
        return f"the least, for which the patch was chosen; {share}, which no batch exceeds, are {limit} patches"
    return f"as many as fit the budget; {share}, which no batch exceeds, are {limit} patches"


def _share_of_budget(plan: PlanView, gib: float) -> str:
    return f"{gib / plan.budget_gib:.0%} of the budget" if plan.budget_gib else "as predicted"


def _inference(plan: PlanView, name: str) -> Iterator[Decision]:
    inference = plan.stages(name).get("inference")
    if not inference or "predicted_peak_gib" not in inference:
        return
    value = {"peak": inference["predicted_peak_gib"]}
    for case in ("median_case", "largest_case"):
        if f"{case}_gib" in inference:
            value[case.replace("_", " ")] = inference[f"{case}_gib"]
    why = f"a window of the patch's size, and the logits of the whole case; {_share_of_budget(plan, value['peak'])}"
    yield Decision(name, "memory of inference, GiB", value, why)


def _batch_dice(plan: PlanView, name: str, value: bool) -> Decision:
    if name == "2d":
        why = "over all slices of a batch, since a single one lacks many structures"
    elif name == LOWRES:
        why = "of each patch: it shows much of the image"
    elif value:
        why = f"over all patches of a batch, as nnU-Net has it where there is a {LOWRES}: one shows little of the image"
    else:
        why = f"of each patch, as nnU-Net has it where there is no {LOWRES}"
    return Decision(name, "Dice loss over the batch", bool(value), why)


def _lowres(plan: PlanView) -> Decision:
    why = plan.reasons(LOWRES).get("lowres", plan.reasons(FULLRES).get("lowres"))
    if why is None:
        share = _share_of_image(plan, FULLRES)
        covered = "little" if share is None else f"{share:.0%}"
        why = f"a patch of {FULLRES} covers {covered} of the median image's voxels, less than {rules.LOWRES_SHARE:.0%}"
    return Decision(LOWRES, "planned", True, why)


def no_lowres(plan: PlanView) -> Decision:
    """Why there is no 3d_lowres, or no 3D configuration at all."""
    if FULLRES not in plan.configurations:
        return Decision(FULLRES, "planned", False, "the images are 2D: they have one slice")
    share = _share_of_image(plan, FULLRES)
    planned = plan.reasons(FULLRES).get("lowres")
    if planned is not None or share is None:
        why = planned or f"a patch of {FULLRES} covers enough of the median image"
    elif share >= rules.LOWRES_SHARE:
        why = f"a patch of {FULLRES} covers {share:.0%} of the median image's voxels, not less than "
        why += f"{rules.LOWRES_SHARE:.0%}"
    else:
        why = f"a patch of {FULLRES} covers {share:.0%} of the median image's voxels, but one of a coarser spacing "
        why += f"covers {rules.LOWRES_SHARE:.0%} already where images have more than half of the voxels"
    return Decision(LOWRES, "planned", False, why)


def _share_of_image(plan: PlanView, name: str) -> float | None:
    patch, median = (plan.configuration(name).get(key) for key in ("patch_size", "median_image_size_in_voxels"))
    return None if patch is None or median is None else math.prod(patch) / math.prod(median)
