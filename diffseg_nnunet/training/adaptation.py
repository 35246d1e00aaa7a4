"""Weights of one U-Net for another of the same family: each tensor is loaded, adapted, or skipped, and the shares said.

Tensors are matched by what they do, not by their position: encoder stages from the first on, decoder stages and
up-sampling by the resolution they work at. So networks of different depth agree on the stages they share. What differs
in shape is adapted so that a known response is kept:

- *Input channels*: the first convolution's weights are the mean over the source's channels, scaled so that their sum
  over the inputs is kept: inputs that are equal in all channels give the source's response exactly.
- *Kernels to 1* (a coarse axis, e.g. 3×3×3 to 1×3×3): the sum along the axis. Neighbours along a coarse axis lie beyond
  the source's kernel, which would have seen the slice itself there: an image that is constant along the axis gives the
  source's response. The central slice alone would lose the scale, and the sign of second derivatives.
- *Kernels from 1, or larger odd ones*: in the centre, zeros around: the source's response to any image.
- *Up-sampling to 1* (the axis is no longer pooled): the mean along the axis; *from 1*: repeated.

Output layers (``.seg_layers.``) belong to the source's classes or task: never loaded, and not counted. Tensors that a
state dict holds under several names (``conv`` is ``all_modules.0``, ``decoder.encoder`` is ``encoder``) count once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.training.checkpoint import SEGMENTATION_LAYERS

MINIMUM_SHARE = 0.5
"""Of the planned network's parameters that must come from the checkpoint. With less, most of the network starts from
random weights behind a rate meant for fine-tuning."""
LOADED, ADAPTED, SKIPPED = "loaded", "adapted", "skipped"
KINDS = (LOADED, ADAPTED, SKIPPED)

_DECODER_STAGE = re.compile(r"^decoder\.(stages|transpconvs)\.(\d+)\.")
_UPSAMPLING = "decoder.transpconvs."


@dataclass(frozen=True)
class Match:
    """Where one tensor of the planned network comes from.

    Attributes:
        key: its name in the state dict, of several the plain one.
        kind: "loaded", "adapted" or "skipped".
        how: what was adapted, or why it is skipped; the same words for the same reason.
        parameters: its elements.
        value: the tensor to load, of the planned shape; None where it is skipped.
    """

    key: str
    kind: str
    how: str
    parameters: int
    value: Tensor | None = None


@dataclass(frozen=True)
class Adaptation:
    """One match for each tensor of the planned network, output layers aside.

    Attributes:
        used: part of the source's parameters that the planned network starts from; a shallow network uses little of a
            deep source.
    """

    matches: tuple[Match, ...]
    used: float = 0.0

    def shares(self) -> dict[str, float]:
        """Parts of the parameters that are loaded, adapted and skipped; they sum to 1."""
        total = max(1, sum(match.parameters for match in self.matches))
        return {kind: sum(m.parameters for m in self.matches if m.kind == kind) / total for kind in KINDS}

    @property
    def share(self) -> float:
        """Part of the parameters that come from the source, as they are or adapted."""
        return 1.0 - self.shares()[SKIPPED] if self.matches else 0.0

    def rows(self) -> list[dict[str, Any]]:
        """A table: kind, how, tensors, parameters and share, for each kind and reason, in the order of the kinds."""
        total = max(1, sum(match.parameters for match in self.matches))
        grouped: dict[tuple[str, str], list[int]] = {}
        for match in sorted(self.matches, key=lambda match: KINDS.index(match.kind)):
            grouped.setdefault((match.kind, match.how), []).append(match.parameters)
        return [
            {"kind": kind, "how": how, "tensors": len(sizes), "parameters": sum(sizes), "share": sum(sizes) / total}
            for (kind, how), sizes in grouped.items()
        ]

    def state_for(self, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`target`'s state dict, under all its names, with what is loaded and adapted put in."""
        values = {match.key: match.value for match in self.matches if match.value is not None}
        return {
            key: tensor if (value := values.get(canonical(key))) is None else value.to(tensor)
            for key, tensor in target.items()
        }


def canonical(key: str) -> str:
    """The plain name of a tensor that a state dict of these U-Nets holds under several."""
    if key.startswith("decoder.encoder."):
        key = key.removeprefix("decoder.")
    # of the modules in a row the convolution is the first, and the norm the only other one with parameters
    key = key.replace(".all_modules.0.", ".conv.")
    return re.sub(r"\.all_modules\.\d+\.", ".norm.", key)


def adapt(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> Adaptation:
    """Match the state dict of a planned network with that of a checkpoint.

    Args:
        target: the planned network's; only names and shapes are read, so that it may be on the meta device.
        source: the checkpoint's.
    """
    theirs = _by_role(source)
    ours = _by_role(target)
    first = _first_convolution(ours)
    matches, used = [], 0
    for role, (key, tensor) in ours.items():
        count = tensor.numel()
        if role not in theirs:
            matches.append(Match(key, SKIPPED, _absent(role, theirs), count))
            continue
        value, how = _fit(theirs[role][1], tuple(tensor.shape), role.startswith(_UPSAMPLING), role == first)
        kind = SKIPPED if value is None else ADAPTED if how else LOADED
        used += 0 if value is None else theirs[role][1].numel()
        matches.append(Match(key, kind, how or "as it is", count, value))
    return Adaptation(tuple(matches), used / max(1, sum(tensor.numel() for _, tensor in theirs.values())))


def table(adaptation: Adaptation) -> str:
    """The rows as lines of text, for messages."""
    lines = [f"{row['share']:7.1%} {row['kind']}: {row['how']} ({row['tensors']} tensors)" for row in adaptation.rows()]
    return "\n".join(f"  {line}" for line in lines)


def require_share(adaptation: Adaptation, source: str, configuration: str, frozen: tuple[str, ...] = ()) -> None:
    """Raises BadInputError, with the table, where less than :data:`MINIMUM_SHARE` comes from the source, or not all of
    what stays frozen: random weights would never be trained.

    Args:
        source: the checkpoint's name.
        configuration: the planned one's.
        frozen: parts of the planned network that will not be trained.
    """
    parts = tuple(f"{part}." for part in frozen)
    random = sum(match.kind == SKIPPED and match.key.startswith(parts) for match in adaptation.matches)
    if random:
        raise BadInputError(
            f"{random} tensors of {configuration} that would stay frozen cannot start from {source}:\n"
            f"{table(adaptation)}\n",
            "Train all of the network with --strategy finetune, or give a checkpoint of the planned network.",
        )
    if adaptation.share < MINIMUM_SHARE:
        raise BadInputError(
            f"Only {adaptation.share:.1%} of the parameters of {configuration} can start from {source}, less than "
            f"{MINIMUM_SHARE:.0%}:\n{table(adaptation)}\n",
            "Give a checkpoint of the same kind of network and as many dimensions, or plan without --from-checkpoint "
            "and pretrain with `diffseg pretrain`.",
        )


def _by_role(weights: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """What each tensor does -> its name and itself; each tensor once, output layers left out."""
    unique: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        if SEGMENTATION_LAYERS not in key:
            unique.setdefault(canonical(key), tensor)
    depth = 1 + max((int(found[2]) for key in unique if (found := _DECODER_STAGE.match(key))), default=-1)
    return {_role(key, depth): (key, tensor) for key, tensor in unique.items()}


def _role(key: str, depth: int) -> str:
    """A name that is the same in networks of other depth or strides.

    Args:
        depth: stages of the decoder; nnU-Net counts them from the deepest.
    """
    key = _DECODER_STAGE.sub(lambda found: f"decoder.{found[1]}.level{depth - 1 - int(found[2])}.", key)
    # a projection's position depends on whether there is pooling before it
    return re.sub(r"\.skip\.\d+\.", ".skip.", key)


def _first_convolution(roles: Mapping[str, Any]) -> str:
    stem = "encoder.stem.convs.0.conv.weight"
    return stem if stem in roles else "encoder.stages.0.0.convs.0.conv.weight"


def _absent(role: str, theirs: Mapping[str, Any]) -> str:
    """Why the source has no such tensor."""
    stage = re.match(r"^(encoder|decoder)\.(stages\.|transpconvs\.|stages\.level|transpconvs\.level)\d+\.", role)
    if stage is not None and not any(other.startswith(stage[0]) for other in theirs):
        return "stages the checkpoint does not have"
    return "not in the checkpoint"


def _fit(tensor: Tensor, shape: tuple[int, ...], upsampling: bool, first: bool) -> tuple[Tensor | None, str]:
    """`tensor` in another shape, and what was done: "" for nothing; None, and why not."""
    if tuple(tensor.shape) == shape:
        return tensor, ""
    if tensor.ndim != len(shape):
        return None, f"of a {tensor.ndim - 2}D network" if tensor.ndim > 2 else "of another layer"
    if tensor.ndim < 3:
        return None, "other numbers of channels"
    done = []
    if tensor.shape[:2] != shape[:2]:
        if not first or tensor.shape[0] != shape[0]:
            return None, "other numbers of channels"
        done.append(f"{tensor.shape[1]} input channel(s) averaged for {shape[1]}")
        tensor = average_inputs(tensor, shape[1])
    if tensor.shape[2:] != shape[2:]:
        kernels = " to ".join("×".join(map(str, sizes)) for sizes in (tensor.shape[2:], shape[2:]))
        resized = resize_upsampling(tensor, shape[2:]) if upsampling else resize_kernel(tensor, shape[2:])
        if resized is None:
            return None, f"kernels {kernels}"
        done.append(f"up-sampling {kernels}, averaged or repeated" if upsampling else f"kernels {kernels}")
        tensor = resized
    return tensor, ", ".join(done)


def average_inputs(weight: Tensor, channels: int) -> Tensor:
    """A convolution's weights (out, in, *kernel) for another number of inputs, their sum over the inputs kept."""
    mean = weight.sum(1, keepdim=True) / channels
    return mean.expand(-1, channels, *(-1 for _ in weight.shape[2:])).contiguous()


def resize_kernel(weight: Tensor, kernel: tuple[int, ...]) -> Tensor | None:
    """A convolution's weights (out, in, *sizes) with another kernel; sizes are odd.

    Returns:
        None where an axis shrinks to something other than 1, or is even: there is no response to keep.
    """
    for axis, size in enumerate(kernel, start=2):
        now = weight.shape[axis]
        if now == size:
            continue
        if size == 1:
            weight = weight.sum(axis, keepdim=True)
        elif size > now and size % 2 == now % 2 == 1:
            wider = list(weight.shape)
            wider[axis] = size
            padded = torch.zeros(wider, dtype=weight.dtype, device=weight.device)
            padded.narrow(axis, (size - now) // 2, now).copy_(weight)
            weight = padded
        else:
            return None
    return weight


def resize_upsampling(weight: Tensor, kernel: tuple[int, ...]) -> Tensor | None:
    """A transposed convolution's weights (in, out, *sizes), whose kernel is its stride, for other strides.

    Returns:
        None where an axis has other strides than 1 both before and after.
    """
    for axis, size in enumerate(kernel, start=2):
        now = weight.shape[axis]
        if now == size:
            continue
        if size == 1:
            weight = weight.mean(axis, keepdim=True)
        elif now == 1:
            weight = weight.repeat_interleave(size, axis)
        else:
            return None
    return weight
