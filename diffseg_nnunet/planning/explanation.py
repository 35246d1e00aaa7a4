"""Why a plan is as it is: every decision in it, its value and its reason.

A reason is the planner's own where the plan holds it; the others are worked out again by nnU-Net's rules, so that plans
of an older version are explained as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diffseg_nnunet.planning import nnunet_rules as rules
from diffseg_nnunet.planning.configuration_decisions import no_lowres, of_configuration
from diffseg_nnunet.planning.decisions import FULLRES, LOWRES, Decision, PlanView
from diffseg_nnunet.planning.section import diffseg_section

DATA_SET = "data set"
_BACKBONES = {"resenc": "nnU-Net's residual-encoder U-Net", "plain": "nnU-Net's plain U-Net"}
_NNUNETS_BASE_FEATURES = 32
_NORMALISATIONS = {
    "ZScoreNormalization": "each image by its own mean and standard deviation",
    "RescaleTo01Normalization": "each image from its least to its largest value, to 0..1",
    "RGBTo01Normalization": "divided by 255",
    "NoNormalization": "values are left as they are",
}
_COORDINATES = {
    "auxiliary": "a head on the denoiser learns where in the body each voxel lies",
    "guidance": "a regressor of body coordinates is trained first, and its map guides the denoiser",
    "none": "the network only denoises",
}


def explain(
    plans: Mapping[str, Any], fingerprint: Mapping[str, Any] | None, training_cases: int | None = None
) -> list[Decision]:
    """Every decision of a plan, those of the whole data set first, then those of each configuration.

    Args:
        plans: nnU-Net's plans with our section.
        fingerprint: nnU-Net's; None if it is lost, which leaves some reasons out.
        training_cases: labelled cases; None: all in the fingerprint.

    Raises:
        BadInputError: the plans were made by another planner.
    """
    section = diffseg_section(plans)
    if not (fingerprint and fingerprint.get("spacings") and fingerprint.get("shapes_after_crop")):
        fingerprint = None
    if training_cases is None and fingerprint is not None:
        training_cases = len(fingerprint["spacings"])
    plan = PlanView(plans, section, fingerprint, training_cases)
    decisions = [*_of_data_set(plan)]
    for name in plan.configurations:
        decisions.extend(of_configuration(plan, name))
    if LOWRES not in plan.configurations:
        decisions.append(no_lowres(plan))
    return decisions


def _of_data_set(plan: PlanView) -> Iterator[Decision]:
    section = plan.section
    if "backbone" in section:
        name = section["backbone"]
        option = "--from-checkpoint: as in the checkpoint" if plan.source else "--backbone"
        yield Decision(DATA_SET, "backbone", name, f"{_BACKBONES.get(name, 'a planner of that name')} ({option})")
    if "base_features" in section:
        features = section["base_features"]
        origin = "nnU-Net's number" if features == _NNUNETS_BASE_FEATURES else "as asked for"
        origin = "the checkpoint's (--from-checkpoint)" if plan.source else f"{origin} (--base-features)"
        yield Decision(DATA_SET, "base features", features, origin)
    yield from _source(plan)
    yield from _budget(section.get("memory", {}))
    yield _transposition(plan)
    yield from _normalisation(plan)
    yield from _mirroring(section.get("mirroring", {}))
    yield from _pretraining(section)


def _source(plan: PlanView) -> Iterator[Decision]:
    """What the networks can start from."""
    if plan.source:
        yield Decision(DATA_SET, "starts from", plan.source["checkpoint"], "; ".join(plan.source["adopted"]))


def _budget(memory: Mapping[str, Any]) -> Iterator[Decision]:
    if "budget_gib" in memory:
        gpus = memory.get("gpus", 1)
        each = f", on each of {gpus} GPUs" if gpus > 1 else ""
        yield Decision(DATA_SET, "memory budget, GiB", memory["budget_gib"], memory.get("budget_source", "") + each)
    if "rule" in memory:
        yield Decision(DATA_SET, "memory prediction", memory["rule"], "how every peak memory below was predicted")


def _transposition(plan: PlanView) -> Decision:
    order = plan.transposition
    spacing = plan.full_spacing()
    if spacing is None:
        spacing = None if plan.fingerprint is None else list(rules.target_spacing(plan.fingerprint).spacing)
    if spacing is None:
        why = "the axis of the largest target spacing comes first"
    elif spacing[order[0]] < max(spacing):
        kept = "the checkpoint's" if plan.source else "kept"
        why = f"{kept}, though the first axis, {spacing[order[0]]:.4g} mm, is not the one of the largest target spacing"
    elif order == [0, 1, 2]:
        why = f"kept: the axis of the largest target spacing, {max(spacing):.4g} mm, is the first already"
    else:
        why = f"axis {order[0]} of the files has the largest target spacing, {max(spacing):.4g} mm, and comes first"
    return Decision(DATA_SET, "order of axes", order, why)


def _normalisation(plan: PlanView) -> Iterator[Decision]:
    configuration = plan.configuration(FULLRES if FULLRES in plan.configurations else plan.configurations[0])
    schemes = configuration.get("normalization_schemes")
    if schemes is None:
        return
    masked = configuration.get("use_mask_for_norm") or [False] * len(schemes)
    whys = []
    for channel, (scheme, mask) in enumerate(zip(schemes, masked, strict=False)):
        why = _NORMALISATIONS.get(scheme, "by the channel's name")
        if scheme == "CTNormalization":
            why = _ct_normalisation(plan, str(channel))
        if mask:
            why += f", within the non-zero region{_masking(plan)}"
        whys.append(why if len(schemes) == 1 else f"channel {channel}: {why}")
    yield Decision(DATA_SET, "normalisation", list(schemes), "; ".join(whys))


def _masking(plan: PlanView) -> str:
    """Why only the non-zero region counts, where that is known."""
    share = (plan.fingerprint or {}).get("median_relative_size_after_cropping")
    if share is None:
        return ""
    if share < rules.MASKED_BELOW:
        return f": cropping to it leaves {share:.0%} of the median image, less than {rules.MASKED_BELOW:.0%}"
    return ", as in the checkpoint's data" if plan.source else ""


def _ct_normalisation(plan: PlanView, channel: str) -> str:
    key = "foreground_intensity_properties_per_channel"
    statistics = plan.plans.get(key, {}).get(channel)
    if statistics is None:
        return "the channel is called CT: clipped and scaled by the foreground's intensities"
    low, high = statistics["percentile_00_5"], statistics["percentile_99_5"]
    adopted = plan.source and statistics != (plan.fingerprint or {}).get(key, {}).get(channel)
    whose = "the foreground's, in the checkpoint's data," if adopted else "the foreground's"
    return (
        f"the channel is called CT: clipped to {whose} 0.5 and 99.5 percentiles, {low:.4g} and {high:.4g}, "
        f"minus its mean {statistics['mean']:.4g}, divided by its standard deviation {statistics['std']:.4g}"
    )


def _mirroring(mirroring: Mapping[str, Any]) -> Iterator[Decision]:
    reason = ". ".join(mirroring[key] for key in ("reason", "warning") if mirroring.get(key))
    for what, key in (("mirrored axes", "allowed_axes"), ("mirrored axes of 2d", "allowed_axes_2d")):
        if key in mirroring:
            flat = "slices run along axis 0, and its other axes 1 and 2 are 0 and 1 here"
            why = reason if key == "allowed_axes" else flat
            yield Decision(DATA_SET, what, list(mirroring[key]), why)


def _pretraining(section: Mapping[str, Any]) -> Iterator[Decision]:
    if "pool" in section:
        others = section["pool"].get("unlabelled_datasets", [])
        own = "the data set's own images, those without labels among them"
        why = f"{own}, and the images of these (--unlabeled)" if others else f"{own}, alone: --unlabeled names none"
        yield Decision(DATA_SET, "pretraining pool", others, why)
    if "coordinates" in section:
        mode = section["coordinates"].get("mode")
        yield Decision(DATA_SET, "coordinates", mode, f"{_COORDINATES.get(mode, 'as asked for')} (--coordinates)")
    if "diffusion" in section:
        diffusion = section["diffusion"]
        if "timesteps" in diffusion:
            schedule, target = diffusion.get("schedule", "?"), diffusion.get("prediction", "?")
            why = f"noise by the schedule {schedule}; the network predicts {target}"
            yield Decision(DATA_SET, "time steps", diffusion["timesteps"], why)
        if "fold_timestep" in diffusion:
            why = "the little noise at which the pretrained network is folded into a stock one"
            yield Decision(DATA_SET, "time step of folding", diffusion["fold_timestep"], why)
