"""One-bit weights and activations, their straight-through gradients, and their storage as bits.

Bi-Real Net (arXiv 1808.00278) and ReActNet (arXiv 2003.03488), as HiDiff uses them (methods.md 3.3). A binary weight is
``sign(W) · mean |W|`` per output channel, a binary activation ``sign(x)``; sign is 1 at 0, so that every weight and
every activation is one bit. Training keeps the real W behind the signs; a checkpoint's weights for inference are the
bits. They save storage and no time: PyTorch multiplies ±1 like any other number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

_SIGNS, _SCALE = "weight_signs", "weight_scale"


def signs(values: Tensor) -> Tensor:
    """1 where a value is at least 0, else -1; of the values' type, without a gradient."""
    return torch.where(values >= 0, 1.0, -1.0).to(values.dtype)


class _BinaryActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return signs(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        return gradient * (2 - 2 * values.abs()).clamp_min(0)


def binary_activation(values: Tensor) -> Tensor:
    """sign(x); its gradient is that of the piecewise quadratic of Bi-Real Net (eq. 7).

    Derivative 2 + 2x on [-1, 0], 2 - 2x on [0, 1], 0 outside: that of ``x (2 - |x|)``, clipped to ±1.
    """
    return _BinaryActivation.apply(values)


def weight_scale(weight: Tensor) -> Tensor:
    """mean |W| of each output channel: shape (out, 1, ...), without a gradient.

    Taken from the largest downwards: where all |W| of a channel are one number, it is exactly that number, and so what
    was packed and unpacked computes what it did before, to the last bit.
    """
    magnitude = weight.detach().abs().flatten(1)
    largest = magnitude.amax(1, keepdim=True)
    scale = largest - (largest - magnitude).mean(1, keepdim=True)
    return scale.reshape(-1, *(1,) * (weight.ndim - 1))


def binary_weight(weight: Tensor) -> Tensor:
    """sign(W) · mean |W| per output channel; its gradient is that of W clipped to ±1 (1 inside, 0 outside)."""
    clipped = weight.clamp(-1, 1)
    binary = weight_scale(weight) * signs(weight.detach())
    # (c - c) is exactly 0, whereas (binary - c) + c would be rounded
    return binary + (clipped - clipped.detach())


class BinaryConv(nn.Module):
    """A convolution of ±1 activations with binary weights, 2D or 3D, padded by zeros to keep the shape at stride 1.

    Args:
        in_channels, out_channels: as of any convolution; it has no bias, since a norm follows.
        kernel_size: odd, one number an axis; their count tells the dimensions.
        stride: one number an axis.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, ...], stride: tuple[int, ...]):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *kernel_size))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.stride, self.padding = stride, tuple(size // 2 for size in kernel_size)
        self._convolve = functional.conv2d if len(kernel_size) == 2 else functional.conv3d

    def forward(self, features: Tensor) -> Tensor:
        """(B, in, ...) of real numbers, of which the signs are used -> (B, out, ...)."""
        weight = binary_weight(self.weight)
        return self._convolve(binary_activation(features), weight, stride=self.stride, padding=self.padding)


class BinaryLinear(nn.Module):
    """A linear map of ±1 activations with binary weights and no bias: (..., in) -> (..., out)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, features: Tensor) -> Tensor:
        return functional.linear(binary_activation(features), binary_weight(self.weight))


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The bits and the scales of binary weights (out, in, ...).

    Returns:
        uint8 (ceil(count / 8),), a bit a weight in memory order, the first the highest, 1 for +1; and float32 (out,).
    """
    bits = np.packbits((weight.detach() >= 0).cpu().numpy().ravel())
    return torch.from_numpy(bits), weight_scale(weight).flatten().float().cpu()


def unpack(bits: Tensor, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The binary weights, float32 of `shape`, of what :func:`pack` gave; exact.

    Raises:
        ValueError: bits or scales are not those of so many weights.
    """
    count = int(np.prod(shape))
    if bits.dtype != torch.uint8 or bits.shape != (-(-count // 8),) or scale.shape != (shape[0],):
        raise ValueError(f"{tuple(bits.shape)} bytes and {tuple(scale.shape)} scales are not weights of shape {shape}")
    ones = np.unpackbits(bits.cpu().numpy(), count=count).astype(np.float32).reshape(shape)
    return torch.from_numpy(2 * ones - 1) * scale.float().cpu().reshape(-1, *(1,) * (len(shape) - 1))


def _binary_layers(network: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in network.named_modules() if isinstance(module, BinaryConv | BinaryLinear)}


def pack_state(network: nn.Module) -> dict[str, Tensor]:
    """The network's state dict for inference, on the CPU: in place of each binary layer's weight its bits and scales.

    The real weights behind the signs are not in it: training goes on from a checkpoint, not from here.
    """
    state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    for name, layer in _binary_layers(network).items():
        del state[f"{name}.weight"]
        state[f"{name}.{_SIGNS}"], state[f"{name}.{_SCALE}"] = pack(layer.weight)
    return state


def unpack_state(network: nn.Module, packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict that `network` loads, of what :func:`pack_state` gave for one of its kind; outputs are the same.

    Layers whose weights are there as they are in training keep them.

    Raises:
        KeyError: the bits or scales of a binary layer are missing.
        ValueError: they are those of another shape.
    """
    state = dict(packed)
    for name, layer in _binary_layers(network).items():
        if f"{name}.weight" in state:
            continue
        bits, scale = state.pop(f"{name}.{_SIGNS}"), state.pop(f"{name}.{_SCALE}")
        state[f"{name}.weight"] = unpack(bits, scale, tuple(layer.weight.shape))
    return state


def state_bytes(network: nn.Module) -> int:
    """Bytes of the network's weights as :func:`pack_state` stores them: bits and scales where layers are binary."""
    return sum(tensor.numel() * tensor.element_size() for tensor in pack_state(network).values())
