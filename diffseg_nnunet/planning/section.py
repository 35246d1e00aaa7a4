"""The ``diffseg`` section of a plans file: what stock nnU-Net ignores and our stages read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffseg_nnunet.errors import BadInputError

PLANS_NAME = "DiffSegPlans"
SECTION = "diffseg"
UNLABELLED_SUFFIX = "_unlabelled"
STAGES = ("pretraining", "training")
STANDARD_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
"""nnU-Net's, which a planner makes; others in a plans file are the user's own."""

_PARTS_OF_PATCHES = ("batch", "activations", "workspace")


def diffseg_section(plans: Mapping[str, Any]) -> dict[str, Any]:
    """The ``diffseg`` section.

    Raises:
        BadInputError: the plans were made by another planner.
    """
    section = plans.get(SECTION)
    if not isinstance(section, dict):
        planner = plans.get("experiment_planner_used", "an unknown planner")
        raise BadInputError(
            f"The plans '{plans.get('plans_name', '?')}' of {plans.get('dataset_name', '?')} were made by {planner} "
            f"and have no '{SECTION}' section.",
            "Make plans with `diffseg plan ID`.",
        )
    return section


def stage_plan(plans: Mapping[str, Any], configuration: str, stage: str) -> dict[str, Any]:
    """Patch, batch and memory of one stage ("pretraining" or "training") of a configuration.

    Raises:
        BadInputError: the plans have no such configuration, or none for this stage; the message lists those there are.
    """
    configurations = diffseg_section(plans)["configurations"]
    if configuration not in configurations:
        raise BadInputError(
            f"The plans of {plans['dataset_name']} have no configuration '{configuration}'.",
            f"There are: {', '.join(configurations)}.",
        )
    if stage not in configurations[configuration]:
        raise BadInputError(
            f"'{configuration}' has no {stage} stage: besides the image it reads the previous stage's segmentation.",
            "Train it with `--strategy scratch`.",
        )
    return configurations[configuration][stage]


def allowed_mirror_axes(plans: Mapping[str, Any], dimensions: int) -> tuple[int, ...]:
    """The axes of a patch with `dimensions` axes that may be mirrored."""
    mirroring = diffseg_section(plans)["mirroring"]
    axes: Sequence[int] = mirroring["allowed_axes_2d" if dimensions == 2 else "allowed_axes"]
    return tuple(axes)


def set_batch_size(plans: dict[str, Any], configuration: str, stage: str, batch_size: int) -> None:
    """Change a stage's batch in place, for our trainers and, where it is the training's, for stock nnU-Net's too.

    The prediction follows it: what is taken for each patch in proportion, the rest as it was; all of it where the parts
    are not known. A cascade's last stage, which inherits from this one and reads more, gets no larger a batch.
    """
    planned = stage_plan(plans, configuration, stage)
    ratio = batch_size / planned["batch_size"]
    planned["batch_size"] = batch_size
    if "memory_gib" in planned:
        planned["memory_gib"] = _scaled(planned["memory_gib"], ratio)
        planned["predicted_peak_gib"] = round(sum(planned["memory_gib"].values()), 3)
    else:
        planned["predicted_peak_gib"] = round(planned["predicted_peak_gib"] * ratio, 3)
    if stage == "training":
        plans["configurations"][configuration]["batch_size"] = batch_size
        for name, stages in diffseg_section(plans)["configurations"].items():
            heir = plans["configurations"][name].get("inherits_from") == configuration
            if heir and stages[stage]["batch_size"] > batch_size:
                set_batch_size(plans, name, stage, batch_size)


def predicted_gib(planned: Mapping[str, Any], processes: int) -> float:
    """Predicted peak of a planned stage on each of several GPUs that share its batch, GiB."""
    if "memory_gib" in planned:
        return sum(_scaled(planned["memory_gib"], 1 / processes).values())
    return planned["predicted_peak_gib"] / processes


def _scaled(parts: Mapping[str, float], ratio: float) -> dict[str, float]:
    """Parts of a stage's memory for another batch."""
    return {name: round(gib * ratio, 3) if name in _PARTS_OF_PATCHES else gib for name, gib in parts.items()}
