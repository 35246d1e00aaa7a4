"""Checkpoints: written whole or not at all, read without running code, and refused with a list of what differs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffseg_nnunet.atomic import write_file
from diffseg_nnunet.errors import BadInputError

SEGMENTATION_LAYERS = ".seg_layers."
"""nnU-Net's output layers: their shape follows the classes, so they are never taken over from pretraining."""
_MAX_LISTED = 8
_NUMBERS = (np.bool_, np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8)
_NUMPY_NUMBERS = [
    np.dtype,
    *(type(np.dtype(number)) for number in _NUMBERS),
    # under its names in numpy 2 and 1
    *((np.float32(0).__reduce__()[0], f"numpy.{module}.multiarray.scalar") for module in ("_core", "core")),
]
"""What nnU-Net's own checkpoints hold beside tensors and plain values: numbers of its log. Reading one runs no code."""


def save(path: Path | str, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    write_file(path, lambda temporary: torch.save(checkpoint, temporary))


def on_cpu(value: Any) -> Any:
    """The same, with all tensors detached and on the CPU; one that stands there twice stays one, as in nnU-Net's
    networks, whose state dicts name a weight up to four times."""
    moved: dict[tuple, Tensor] = {}

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.device.type == "cpu" or not value.numel():
                return value.detach().cpu()
            seen = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            if seen not in moved:
                moved[seen] = value.detach().cpu()
            return moved[seen]
        if isinstance(value, dict):
            return {key: move(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(move(entry) for entry in value)
        return value

    return move(value)


def load_safely(path: Path | str, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint of tensors, plain values and numpy's numbers onto the CPU; nothing in it is executed.

    These are all that checkpoints of ``diffseg`` and of stock nnU-Net trainers hold.

    Args:
        mmap: read tensors when they are looked at: for what stands beside them.

    Raises:
        BadInputError: the file is missing, is no checkpoint, or holds more than these.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInputError(f"There is no checkpoint {path}.", "Run `diffseg pretrain` first, or correct the path.")
    try:
        with torch.serialization.safe_globals(_NUMPY_NUMBERS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # what is no checkpoint makes the reader fail in any way, with or without words
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BadInputError(
            f"{path} cannot be read as a checkpoint ({reason}).",
            "Only checkpoints of diffseg and of nnU-Net's trainers are read here, without running any code in them.",
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("network_weights"), dict):
        raise BadInputError(f"{path} holds no 'network_weights'.", "Give a checkpoint of `diffseg pretrain`.")
    return checkpoint


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content. Raises BadInputError if there is none."""
    if not path.is_file():
        raise BadInputError(f"There is no checkpoint {path}.", "Correct the path, or run `diffseg pretrain`.")
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def made_with(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a checkpoint says of its making: "plans", "configuration" and "dataset_json", as far as they are there.

    Ours of a pretraining hold them beside the weights; nnU-Net's among its trainer's arguments.
    """
    return checkpoint if "plans" in checkpoint else checkpoint.get("init_args") or {}


def differences(
    network: Mapping[str, Tensor], checkpoint: Mapping[str, Tensor], with_outputs: bool = False
) -> list[str]:
    """What keeps `checkpoint` from initialising `network`, output layers aside unless said otherwise; one line a
    tensor."""
    lines = []
    for key, tensor in network.items():
        if SEGMENTATION_LAYERS in key and not with_outputs:
            continue
        if key not in checkpoint:
            lines.append(f"{key}: missing in the checkpoint")
        elif checkpoint[key].shape != tensor.shape:
            lines.append(f"{key}: {tuple(checkpoint[key].shape)} in the checkpoint, {tuple(tensor.shape)} in the plan")
    extra = [key for key in checkpoint if key not in network and (with_outputs or SEGMENTATION_LAYERS not in key)]
    return lines + [f"{key}: not in the plan's network" for key in extra]


def initialise(network: torch.nn.Module, weights: Mapping[str, Tensor], source: str) -> int:
    """Copy all weights but the output layers into `network`; returns the number of tensors copied.

    Args:
        source: the checkpoint's name for the message.

    Raises:
        BadInputError: keys or shapes differ; the message lists them.
    """
    own = network.state_dict()
    require_same_network(own, weights, source)
    taken = {key: tensor for key, tensor in weights.items() if SEGMENTATION_LAYERS not in key}
    network.load_state_dict({**own, **taken})
    return len(taken)


def require_same_network(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str, with_outputs: bool = False
) -> None:
    """Raises BadInputError if keys or shapes differ, output layers aside unless said otherwise; the message lists them.

    Args:
        own: the planned network's weights.
        weights: the checkpoint's.
        source: the checkpoint's name for the message.
    """
    lines = differences(own, weights, with_outputs)
    if lines:
        listed = "\n  ".join(lines[:_MAX_LISTED])
        more = f"\n  … and {len(lines) - _MAX_LISTED} more" if len(lines) > _MAX_LISTED else ""
        raise BadInputError(
            f"The checkpoint {source} does not fit the plan, {len(lines)} tensors differ:\n  {listed}{more}\n",
            "Pretrain with this plan (`diffseg pretrain`), or restore the plan the checkpoint was made with.",
        )
