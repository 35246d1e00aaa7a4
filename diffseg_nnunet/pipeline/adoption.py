"""A checkpoint as a source of plans: what it was planned with, read without running anything in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.inference.pretrained import refuse_foreign_code
from diffseg_nnunet.planning.adoption import BACKBONES, Normalisation, Source, per_stage
from diffseg_nnunet.training.checkpoint import file_digest, load_safely, made_with


def read_source(path: Path) -> Source:
    """Read a checkpoint of ``diffseg pretrain``, ``diffseg train`` or a stock nnU-Net trainer.

    Raises:
        BadInputError: it is none, its plans are not whole or name code outside nnU-Net's networks, or its network is
            none that is planned here.
    """
    content = load_safely(path)
    made = made_with(content)
    missing = [key for key in ("plans", "configuration", "dataset_json") if key not in made]
    if missing:
        raise BadInputError(
            f"{path} does not say what it was planned with ({', '.join(missing)} missing).",
            "Give a checkpoint of `diffseg pretrain`, `diffseg train` or nnUNetv2_train.",
        )
    name = made["configuration"]
    try:
        manager = PlansManager(made["plans"])
        configuration = manager.get_configuration(name)
        channels = determine_num_input_channels(manager, configuration, made["dataset_json"])
        architecture = configuration.configuration["architecture"]
        refuse_foreign_code(architecture, path)
        source = Source(
            name=path.name,
            sha256=file_digest(path),
            weights=content["network_weights"],
            configuration=name,
            architecture=architecture,
            channels=channels,
            spacing=tuple(float(each) for each in configuration.spacing),
            transpose_forward=tuple(int(axis) for axis in manager.transpose_forward),
            normalisation=Normalisation(
                tuple(configuration.normalization_schemes),
                tuple(bool(each) for each in configuration.use_mask_for_norm),
                manager.foreground_intensity_properties_per_channel,
            ),
        )
        _check(source)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise BadInputError(
            f"The plans in {path} are not whole ({type(error).__name__}: {error}).", "Give another checkpoint."
        ) from error
    if configuration.previous_stage_name is not None:
        raise BadInputError(
            f"{path} is of {name}, whose network reads masks besides the image.", "Give one of 3d_fullres or 3d_lowres."
        )
    if source.backbone is None:
        raise BadInputError(
            f"{path} is of a {architecture['network_class_name'].rsplit('.', 1)[-1]}, which is not planned here.",
            f"Give a checkpoint of one of: {', '.join(BACKBONES)}.",
        )
    return source


def _check(source: Source) -> None:
    """Raises ValueError, KeyError or TypeError for what planning would stumble over later."""
    if source.dimensions not in (2, 3) or not all(math.isfinite(mm) and mm > 0 for mm in source.spacing):
        raise ValueError(f"a spacing of {source.spacing}")
    if sorted(source.transpose_forward) != [0, 1, 2]:
        raise ValueError(f"a transposition of {source.transpose_forward}")
    theirs = source.normalisation
    if not len(theirs.schemes) == len(theirs.masks) == source.channels or not isinstance(theirs.intensities, Mapping):
        raise ValueError(f"normalisation of {len(theirs.schemes)} channels, and {source.channels} are read")
    if not all(isinstance(tensor, Tensor) for tensor in source.weights.values()):
        raise TypeError("weights that are no tensors")
    if source.backbone is None:
        return
    arguments = source.architecture["arch_kwargs"]
    blocks = "n_blocks_per_stage" if source.backbone == "resenc" else "n_conv_per_stage"
    expected = dict.fromkeys(("features_per_stage", "kernel_sizes", "strides", blocks), int(arguments["n_stages"]))
    expected["n_conv_per_stage_decoder"] = int(arguments["n_stages"]) - 1
    for name, count in expected.items():
        entries = per_stage({**arguments, "n_stages": count}, name)
        if len(entries) != count:
            raise ValueError(f"{name} of {len(entries)} stages, of {count}")
