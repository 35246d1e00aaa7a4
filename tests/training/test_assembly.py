"""The parts around a planned network, compiled: one graph for all time steps, hooks included, and the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn
from torch._dynamo.testing import CompileCounter

from diffseg_nnunet.coordinates.head import CoordinateRegressor, CoordinateSettings
from diffseg_nnunet.training.assembly import assemble
from diffseg_nnunet.training.settings import PretrainingSettings

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(outputs: int) -> nn.Module:
    norm = {"norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"eps": 1e-5, "affine": True}}
    activation = {"nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}}
    layout = ([4, 8, 16], nn.Conv3d, 3, [1, 2, 2], 1, outputs, 1)
    return PlainConvUNet(1, 3, *layout, conv_bias=True, **norm, **activation, deep_supervision=False)


@pytest.mark.parametrize("mode", ["auxiliary", "guidance", "none"])
def test_a_compiled_denoiser_is_one_graph_for_all_time_steps(mode: str) -> None:
    torch.manual_seed(0)
    planned = network(1)
    regressor = CoordinateRegressor(network(3)) if mode == "guidance" else None
    counter = CompileCounter()  # traces, and runs what it traced as it is: no compiler is needed
    settings = PretrainingSettings(coordinates=CoordinateSettings(mode=mode))
    parts = assemble(planned, regressor, settings, CPU, torch.compile(planned, backend=counter))
    plain = parts.denoiser.uncompiled
    for seed in range(3):
        noised = torch.randn((2, 1, 16, 16, 16), generator=torch.Generator().manual_seed(seed))
        t = torch.tensor([seed, 500 + seed])
        outputs, features = [], []
        for denoiser in (parts.denoiser, plain):
            outputs.append(denoiser(noised, t))
            features.append([] if parts.tap is None else parts.tap.take())
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*features)
    assert counter.frame_count == 1


def test_a_coordinate_map_compiles_nothing() -> None:
    """Its batch is another than the training's."""
    planned, counter = network(1), CompileCounter()
    compiled = torch.compile(planned, backend=counter)
    parts = assemble(planned, None, PretrainingSettings(), CPU, compiled)
    assert parts.coordinate_map(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 3, 16, 16, 16)
    assert counter.frame_count == 0
