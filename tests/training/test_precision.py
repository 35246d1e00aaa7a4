"""bfloat16 where the CPU has it and the network bears it, float32 elsewhere."""

from __future__ import annotations

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn

from diffseg_nnunet.planning.hardware import cpu_bf16_instructions, cpu_gains_by_bf16
from diffseg_nnunet.training.precision import (
    MAX_RELATIVE_DIFFERENCE,
    autocast,
    choose_dtype,
    prefer_channels_last,
    relative_difference,
    uncompared_dtype,
)

SAMPLE = torch.randn((2, 1, 16, 16), generator=torch.Generator().manual_seed(0))


def unet(deep_supervision: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norm = {"norm_op": nn.InstanceNorm2d, "norm_op_kwargs": {"affine": True}}
    shape = (1, 3, (8, 16, 16), nn.Conv2d, 3, (1, 2, 2), 2, 3, 2)
    return PlainConvUNet(*shape, conv_bias=True, **norm, nonlin=nn.LeakyReLU, deep_supervision=deep_supervision)


class Cancelling(nn.Module):
    """Adds a large number and takes it away: nothing is left of an output of eight bits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) + 1e4) - 1e4


class NotANumber(Cancelling):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * torch.nan if y.dtype == torch.bfloat16 else y


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_a_unet_bears_bfloat16(deep_supervision: bool) -> None:
    network = unet(deep_supervision)
    difference = relative_difference(network, SAMPLE, torch.bfloat16)
    assert 0 < difference < MAX_RELATIVE_DIFFERENCE / 2
    assert all(parameter.grad is None for parameter in network.parameters())


def test_relative_difference_is_the_rms_over_the_spread() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 4, 3)
    exact = layer(SAMPLE).double()
    rounded = layer.bfloat16()(SAMPLE.bfloat16()).double()
    expected = (rounded - exact).square().mean().sqrt() / exact.std()
    torch.manual_seed(0)
    found = relative_difference(nn.Conv2d(1, 4, 3), SAMPLE, torch.bfloat16)
    assert found == pytest.approx(expected.item(), rel=0.2)


def test_auto_on_this_cpu() -> None:
    dtype, reason = choose_dtype("auto", unet(), SAMPLE)
    if cpu_gains_by_bf16():
        assert dtype == torch.bfloat16
        assert "bfloat16 autocast" in reason
    else:
        assert dtype is None
        assert ("are no faster" if cpu_bf16_instructions() else "no bfloat16 instructions") in reason


@pytest.mark.skipif(not cpu_gains_by_bf16(), reason="the CPU has no fast bfloat16 instructions")
@pytest.mark.parametrize("network", [Cancelling(), NotANumber()])
def test_auto_falls_back_where_the_network_does_not_bear_it(network: nn.Module) -> None:
    dtype, reason = choose_dtype("auto", network, SAMPLE)
    assert dtype is None
    assert reason.startswith("float32: bfloat16 differs by")


def test_what_needs_no_comparison() -> None:
    assert uncompared_dtype("float32") == (None, "float32: requested")
    assert uncompared_dtype("bfloat16") is None  # the difference is told
    assert (uncompared_dtype("auto") is None) is cpu_gains_by_bf16()


def test_what_is_requested_is_taken() -> None:
    assert choose_dtype("float32", unet(), SAMPLE) == (None, "float32: requested")
    assert choose_dtype("bfloat16", Cancelling(), SAMPLE)[0] == torch.bfloat16


def test_autocast() -> None:
    layer, cpu = nn.Conv2d(1, 1, 1), torch.device("cpu")
    with autocast(cpu, torch.bfloat16):
        assert layer(SAMPLE).dtype == torch.bfloat16
    with autocast(cpu, None):
        assert layer(SAMPLE).dtype == torch.float32


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_only_float32_networks_in_3d_are_laid_out_anew(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(2, 4, 3), nn.InstanceNorm3d(4, affine=True), nn.Conv3d(4, 3, 1))
    network.register_buffer("noise", torch.randn(2, 6, 6, 6))  # as probes keep it, of four axes
    image = torch.randn(2, 2, 6, 6, 6)
    before, parameters = network(image), list(network.parameters())
    prefer_channels_last(network, torch.device("cpu"), dtype)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last_3d) is (dtype is None)
    assert all(old is new for old, new in zip(parameters, network.parameters(), strict=True))  # optimisers keep them
    torch.testing.assert_close(network(image), before)
    flat = unet()
    prefer_channels_last(flat, torch.device("cpu"), None)
    assert all(weight.is_contiguous() for weight in flat.parameters())
