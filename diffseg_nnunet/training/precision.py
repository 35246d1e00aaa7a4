"""Which floating-point format a forward pass runs in.

nnU-Net autocasts on CUDA only. CPUs with fast bfloat16 instructions train about twice as fast under bfloat16 autocast,
so that is our default there, after one comparison with float32 on the network at hand. Elsewhere a CPU computes in
float32, and 3D networks with the channels as the innermost axis: oneDNN's convolutions of few channels are faster so.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from diffseg_nnunet.planning.hardware import cpu_bf16_instructions, cpu_gains_by_bf16

Precision = Literal["auto", "float32", "bfloat16"]

_CONVOLUTION_3D = 5  # axes of its weights
MAX_RELATIVE_DIFFERENCE = 0.1
"""Largest accepted difference of bfloat16 and float32 outputs, as a share of the float32 output's standard deviation
(root mean square over voxels). Rounding to 8 bits of mantissa costs a healthy network one or two hundredths."""


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast to `dtype` on `device`, or nothing if `dtype` is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def float_format(device: torch.device) -> torch.dtype | None:
    """What diffusion is computed in: bfloat16 on GPUs that have it, else float32, which is None."""
    cuda = device.type == "cuda"
    return torch.bfloat16 if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else None


@torch.no_grad()
def relative_difference(network: nn.Module, sample: Tensor, dtype: torch.dtype) -> float:
    """Root mean square of output(dtype) - output(float32), over the standard deviation of output(float32).

    Args:
        network: any; evaluated in its current mode.
        sample: one input batch on the network's device.
    """

    def first(output: Tensor | list[Tensor]) -> Tensor:
        return (output[0] if isinstance(output, (list, tuple)) else output).float()

    exact = first(network(sample))
    with torch.autocast(sample.device.type, dtype=dtype):
        rounded = first(network(sample))
    return ((rounded - exact).square().mean().sqrt() / exact.std().clamp_min(1e-12)).item()


def uncompared_dtype(requested: Precision) -> tuple[None, str] | None:
    """What :func:`choose_dtype` gives where it need not look at a network; None where it must."""
    if requested == "float32":
        return None, "float32: requested"
    if requested == "auto" and not cpu_gains_by_bf16():
        slow = "the CPU's bfloat16 instructions are no faster"
        return None, f"float32: {slow if cpu_bf16_instructions() else 'the CPU has no bfloat16 instructions'}"
    return None


def choose_dtype(requested: Precision, network: nn.Module, sample: Tensor) -> tuple[torch.dtype | None, str]:
    """The autocast dtype for training on the CPU (None = float32) and the reason, in words for the log."""
    if (certain := uncompared_dtype(requested)) is not None:
        return certain
    difference = relative_difference(network, sample, torch.bfloat16)
    if requested == "auto" and not difference <= MAX_RELATIVE_DIFFERENCE:
        return None, f"float32: bfloat16 differs by {difference:.3f} of the output's spread"
    return torch.bfloat16, f"bfloat16 autocast: differs from float32 by {difference:.4f} of the output's spread"


def prefer_channels_last(network: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Lay the weights of a 3D network out as suits float32 on the CPU, in place; nothing on other devices or in dtypes.

    Names, shapes and values of the weights stay; sums may differ by rounding.
    """
    if device.type != "cpu" or dtype is not None:
        return
    for parameter in network.parameters():
        if parameter.ndim == _CONVOLUTION_3D:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
