"""Whether the networks of a model folder were trained by one plan: nnU-Net keeps a single ``plans.json`` for all of
them, the latest, and would preprocess a scan by it for networks that learnt from others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import read_json_object
from diffseg_nnunet.training.checkpoint import load_safely, made_with

_GENERAL = (
    *("transpose_forward", "transpose_backward", "image_reader_writer"),
    "foreground_intensity_properties_per_channel",
)
_ONLY_OF_TRAINING = ("batch_size", "batch_dice", "data_identifier", "median_image_size_in_voxels")


def differing_entries(one: Mapping[str, Any], other: Mapping[str, Any], configuration: str) -> list[str]:
    """The entries of two plans by which a network of the configuration would predict otherwise."""
    settings = [PlansManager(dict(plans)).get_configuration(configuration).configuration for plans in (one, other)]
    names = sorted({*settings[0], *settings[1]} - {*_ONLY_OF_TRAINING})
    differing = [name for name in names if _written(settings[0].get(name)) != _written(settings[1].get(name))]
    return differing + [name for name in _GENERAL if _written(one.get(name)) != _written(other.get(name))]


def trained_otherwise(checkpoint: Path, plans: Mapping[str, Any], configuration: str) -> list[str]:
    """The entries of `plans` that differ from those a network was trained by; none where it does not say.

    Raises:
        BadInputError: the checkpoint cannot be read.
    """
    theirs = made_with(load_safely(checkpoint, mmap=True)).get("plans")
    if theirs is None or configuration not in theirs.get("configurations", {}):
        return []
    return differing_entries(theirs, plans, configuration)


def require_one_plan(model: Path, folds: Sequence[int | str], checkpoint: str) -> None:
    """Raises BadInputError if a fold of a model folder cannot be read, or was trained by other plans than lie there."""
    plans, configuration = read_json_object(model / "plans.json"), model.name.split("__")[-1]
    for fold in folds:
        path = model / f"fold_{fold}" / checkpoint
        if differing := trained_otherwise(path, plans, configuration):
            raise BadInputError(
                f"{path} was trained by another plan than {model / 'plans.json'}: {', '.join(differing)} differ.",
                "Choose folds of the present plan with -f, train this one again, or plan as it was planned and train "
                "the others again.",
            )


def _written(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
