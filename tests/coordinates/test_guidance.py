"""A coordinate map enters the first convolution by channels of its own, and leaves it without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from diffseg_nnunet.coordinates.guidance import first_convolution, narrow_input, widen_input
from diffseg_nnunet.diffusion.conditioning import TimeConditioning, fold
from diffseg_nnunet.errors import StageFailedError

FOLD_T = 100
every_network = pytest.mark.parametrize(
    ("architecture", "dimensions", "channels"),
    [(kind, d, channels) for kind in ("PlainConvUNet", "ResidualEncoderUNet") for d in (2, 3) for channels in (1, 2)],
)


def unet(architecture: str, dimensions: int, channels: int) -> nn.Module:
    """A U-Net of two stages as nnU-Net builds it from plans; as many outputs as inputs."""
    blocks = "n_conv_per_stage" if architecture == "PlainConvUNet" else "n_blocks_per_stage"
    arguments: dict[str, Any] = {
        "n_stages": 2,
        "features_per_stage": [4, 8],
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "kernel_sizes": [[3] * dimensions] * 2,
        "strides": [[1] * dimensions, [2] * dimensions],
        blocks: [1, 1],
        "n_conv_per_stage_decoder": [1],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return get_network_from_plans(
        f"dynamic_network_architectures.architectures.unet.{architecture}",
        arguments,
        ["conv_op", "norm_op", "dropout_op", "nonlin"],
        channels,
        channels,
        allow_init=True,
        deep_supervision=False,
    )


def images_and_map(dimensions: int, channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn((2, channels + 3, *(8,) * dimensions), generator=generator)
    return drawn[:, :channels], drawn[:, channels:]


def beside(images: Tensor, coordinate_map: Tensor) -> Tensor:
    return torch.cat([images, coordinate_map], dim=1)


@every_network
@torch.no_grad()
def test_an_empty_map_changes_nothing(architecture: str, dimensions: int, channels: int) -> None:
    network = unet(architecture, dimensions, channels)
    images, coordinate_map = images_and_map(dimensions, channels)
    stock = network(images)
    widen_input(network)
    torch.testing.assert_close(network(beside(images, 0 * coordinate_map)), stock, atol=1e-5, rtol=1e-5)
    # and what it says matters: the new weights are not zeros
    assert (network(beside(images, coordinate_map)) - stock).abs().max() > 0.01 * (stock.max() - stock.min())


@every_network
def test_only_the_first_convolution_grows(architecture: str, dimensions: int, channels: int) -> None:
    network = unet(architecture, dimensions, channels)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    widen_input(network)
    after = network.state_dict()
    assert after.keys() == before.keys()
    grown = {key for key in after if after[key].shape != before[key].shape}
    names = dict(network.named_parameters(remove_duplicate=False))
    assert {id(names[key]) for key in grown} == {id(network.get_submodule(first_convolution(network)).weight)}
    for key in after:
        kept = after[key][:, :channels] if key in grown else after[key]
        assert torch.equal(kept, before[key])
        if key in grown:
            assert after[key].shape[1] == channels + 3
    assert network.get_submodule(first_convolution(network)).in_channels == channels + 3


@every_network
def test_the_map_learns(architecture: str, dimensions: int, channels: int) -> None:
    network = unet(architecture, dimensions, channels)
    widen_input(network)
    network(beside(*images_and_map(dimensions, channels))).square().mean().backward()
    gradient = network.get_submodule(first_convolution(network)).weight.grad
    assert gradient.shape[1] == channels + 3
    assert (gradient.flatten(2).abs().amax(dim=(0, 2)) > 0).all()


@every_network
@torch.no_grad()
def test_without_the_map_the_folded_network_is_stock(architecture: str, dimensions: int, channels: int) -> None:
    torch.manual_seed(0)
    network = unet(architecture, dimensions, channels)
    widen_input(network)
    conditioning = TimeConditioning(network)
    for parameter in [*network.parameters(), *conditioning.projections.parameters()]:  # as if trained
        parameter.add_(0.1 * torch.randn_like(parameter))
    images, coordinate_map = images_and_map(dimensions, channels)
    with conditioning.at(torch.full((2,), FOLD_T)):
        expected = network(beside(images, 0 * coordinate_map))
    widened = fold(network, conditioning, FOLD_T)
    stock = unet(architecture, dimensions, channels)
    stock.load_state_dict(narrow_input(widened, network), strict=True)
    spread = expected.max() - expected.min()
    assert (stock(images) - expected).abs().max() <= 1e-4 * spread
    # time and the map do say something here, so that leaving them out is no matter of course
    assert (network(beside(images, 0 * coordinate_map)) - expected).abs().max() > 0.02 * spread
    # the weights that are narrowed stay as they were
    assert widened[first_convolution(network) + ".weight"].shape[1] == channels + 3


@pytest.mark.parametrize("extra", [1, 5])
@torch.no_grad()
def test_any_number_of_channels(extra: int) -> None:
    network, stock = unet("PlainConvUNet", 2, 1), unet("PlainConvUNet", 2, 1)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    widen_input(network, extra)
    narrowed = narrow_input(network.state_dict(), network, extra)
    stock.load_state_dict(narrowed, strict=True)
    assert all(torch.equal(narrowed[key], before[key]) for key in before)


def test_a_network_without_convolutions_is_refused() -> None:
    with pytest.raises(StageFailedError, match=r"no convolution .*--coordinates none"):
        first_convolution(nn.Sequential(nn.Linear(3, 3)))
