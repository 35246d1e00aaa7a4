"""Time conditioning leaves a fresh network alone, and folds back into a stock network at any time step."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from diffseg_nnunet.diffusion.conditioning import TimeConditioning, affine_norms, fold, sinusoidal_embedding
from diffseg_nnunet.errors import StageFailedError

ARCHITECTURES = ("PlainConvUNet", "ResidualEncoderUNet")
every_network = pytest.mark.parametrize(
    ("architecture", "dimensions", "channels"),
    [(architecture, d, channels) for architecture in ARCHITECTURES for d in (2, 3) for channels in (1, 2)],
)


def unet(architecture: str = "PlainConvUNet", dimensions: int = 2, channels: int = 1, **changes: Any) -> nn.Module:
    """A U-Net of three stages as nnU-Net builds it from plans; as many outputs as inputs."""
    blocks = "n_conv_per_stage" if architecture == "PlainConvUNet" else "n_blocks_per_stage"
    arguments = {
        "n_stages": 3,
        "features_per_stage": [4, 8, 12],
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "kernel_sizes": [[3] * dimensions] * 3,
        "strides": [[stride] * dimensions for stride in (1, 2, 2)],
        blocks: [1, 2, 1],
        "n_conv_per_stage_decoder": [1, 2],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
        **changes,
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


def images(dimensions: int, channels: int, batch: int = 3) -> Tensor:
    return torch.randn((batch, channels, *(8,) * dimensions), generator=torch.Generator().manual_seed(1))


def with_random_norms(network: nn.Module, seed: int = 0) -> nn.Module:
    """As if trained: nnU-Net starts with identities, and with zeros at the end of each residual block."""
    torch.manual_seed(seed)
    for norm in affine_norms(network).values():
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias, 0, 0.3)
    return network


def randomised(network: nn.Module) -> TimeConditioning:
    """A conditioning as if trained, on a network whose norms are no identity either."""
    with_random_norms(network)
    conditioning = TimeConditioning(network)
    for projection in conditioning.projections:
        nn.init.normal_(projection.weight, 0, 0.5)
        nn.init.normal_(projection.bias, 0, 0.2)
    return conditioning


@every_network
@torch.no_grad()
def test_fresh_conditioning_changes_nothing(architecture: str, dimensions: int, channels: int) -> None:
    network, x = unet(architecture, dimensions, channels), images(dimensions, channels)
    stock = network(x)
    conditioning = TimeConditioning(network)
    assert torch.equal(network(x), stock)
    for t in (0, 1, 500, 999):
        with conditioning.at(torch.full((3,), t)):
            assert torch.equal(network(x), stock)


@every_network
@torch.no_grad()
def test_folding_is_exact(architecture: str, dimensions: int, channels: int) -> None:
    network, x = unet(architecture, dimensions, channels), images(dimensions, channels)
    conditioning = randomised(network)
    unconditioned = network(x)
    for t in (0, 1, 100, 999):
        with conditioning.at(torch.full((3,), t)):
            conditioned = network(x)
        # else the comparison below would say nothing
        spread = (conditioned.max() - conditioned.min()).item()
        assert (conditioned - unconditioned).abs().max() > 0.1 * spread
        stock = unet(architecture, dimensions, channels)
        stock.load_state_dict(fold(network, conditioning, t), strict=True)
        assert (stock(x) - conditioned).abs().max() <= 1e-4 * spread


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_folding_is_exact_under_autocast(architecture: str) -> None:
    """Training in bfloat16 must not learn scales that folding, in float32, would give otherwise."""
    network, x = unet(architecture, 3), images(3, 1)
    conditioning, stock = randomised(network), unet(architecture, 3)
    stock.load_state_dict(fold(network, conditioning, 100))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with conditioning.at(torch.full((3,), 100)):
            conditioned = network(x)
        folded = stock(x)
    assert conditioned.dtype == torch.bfloat16
    assert (folded - conditioned).abs().max() <= 0.008 * (conditioned.max() - conditioned.min())


@pytest.mark.parametrize(
    "norm",
    [
        {"norm_op": "torch.nn.modules.batchnorm.BatchNorm2d", "norm_op_kwargs": {"affine": True}},
        {
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
            "norm_op_kwargs": {"affine": True, "track_running_stats": True},
        },
    ],
)
@torch.no_grad()
def test_folding_is_exact_with_running_statistics(norm: dict) -> None:
    network, stock, x = unet(**norm), unet(**norm), images(2, 1)
    conditioning = randomised(network)
    t = torch.full((3,), 100)
    with conditioning.at(t):
        for _ in range(3):
            network(3 * x + 1)  # statistics other than those of the images below
    network.eval()
    stock.eval()
    with conditioning.at(t):
        conditioned = network(x)
    stock.load_state_dict(fold(network, conditioning, 100), strict=True)
    assert (stock(x) - conditioned).abs().max() <= 1e-4 * (conditioned.max() - conditioned.min())


@torch.no_grad()
def test_folding_is_exact_with_group_norms() -> None:
    layers = [nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.GroupNorm(4, 4)]
    network, x = nn.Sequential(*layers), images(2, 1)
    conditioning = randomised(network)
    with conditioning.at(torch.full((3,), 100)):
        conditioned = network(x)
    network.load_state_dict(fold(network, conditioning, 100))
    assert (network(x) - conditioned).abs().max() <= 1e-4 * (conditioned.max() - conditioned.min())


@every_network
def test_folded_weights_have_stock_keys_and_shapes(architecture: str, dimensions: int, channels: int) -> None:
    network = unet(architecture, dimensions, channels)
    own = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    conditioning = randomised(network)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    folded = fold(network, conditioning, 100)
    assert [(key, tensor.shape, tensor.dtype) for key, tensor in folded.items()] == [
        (key, tensor.shape, tensor.dtype) for key, tensor in own.items()
    ]
    assert not any(tensor.requires_grad for tensor in folded.values())
    # the network itself is left as it is, and shares no memory with the result
    for tensor in folded.values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_names_of_a_tensor_get_the_folded_value(architecture: str) -> None:
    """nnU-Net lists one tensor under several keys; whoever reads the checkpoint may take any of them."""
    network = unet(architecture)
    folded = fold(network, randomised(network), 100)
    names: dict[int, list[str]] = {}
    for key, tensor in network.state_dict().items():
        names.setdefault(tensor.data_ptr(), []).append(key)
    assert max(len(keys) for keys in names.values()) > 1
    for first, *others in names.values():
        assert all(torch.equal(folded[first], folded[other]) for other in others)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_each_sample_has_its_own_time_step(architecture: str) -> None:
    network, x = unet(architecture, 3), images(3, 1)
    conditioning, t = randomised(network), torch.tensor([0, 400, 999])
    with conditioning.at(t):
        together = network(x)
    for index in range(3):
        with conditioning.at(t[index : index + 1]):
            alone = network(x[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_reaches_all_of_the_conditioning(architecture: str) -> None:
    network = with_random_norms(unet(architecture))
    fresh = TimeConditioning(network)
    with fresh.at(torch.tensor([5, 50, 500])):
        network(images(2, 1)).square().mean().backward()
    # a zero-initialised projection learns at once, what stands before it after the first step
    assert all(projection.weight.grad.abs().max() > 0 for projection in fresh.projections)

    network = unet(architecture)
    trained = randomised(network)
    with trained.at(torch.tensor([5, 50, 500])):
        network(images(2, 1)).square().mean().backward()
    for name, parameter in trained.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_conditioning_ends_with_the_block() -> None:
    network, x = unet(), images(2, 1)
    stock = network(x)
    torch.manual_seed(0)
    conditioning = TimeConditioning(network)
    for projection in conditioning.projections:
        nn.init.normal_(projection.weight)
    with suppress(InterruptedError), conditioning.at(torch.zeros(3, dtype=torch.int64)):
        assert not torch.equal(network(x), stock)
        raise InterruptedError
    assert torch.equal(network(x), stock)


def test_conditioning_adds_no_key_to_the_network() -> None:
    network = unet()
    keys = list(network.state_dict())
    TimeConditioning(network)
    assert list(network.state_dict()) == keys


def test_scales_are_float32_under_autocast() -> None:
    conditioning = randomised(unet())
    t = torch.tensor([7, 300])
    plain = conditioning.scales_and_shifts(t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = conditioning.scales_and_shifts(t)
    for pair, other in zip(plain, autocast, strict=True):
        for tensor, same in zip(pair, other, strict=True):
            assert same.dtype == torch.float32
            assert torch.equal(tensor, same)


@pytest.mark.parametrize("changes", [{"norm_op_kwargs": {"eps": 1e-5, "affine": False}}, {"norm_op": None}])
def test_network_without_affine_norms_is_refused(changes: dict) -> None:
    with pytest.raises(StageFailedError, match="no affine normalisation"):
        TimeConditioning(unet(**changes))


def test_sinusoidal_embedding() -> None:
    """arXiv 1706.03762: angles t / 10000^(2i/dim), cosines before sines."""
    t, dim = torch.tensor([0, 1, 999]), 8
    found = sinusoidal_embedding(t, dim)
    assert found.shape == (3, 8)
    assert found.dtype == torch.float32
    for row, step in enumerate(t.tolist()):
        angles = torch.tensor([step / 10_000 ** (2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
        torch.testing.assert_close(found[row], torch.cat([angles.cos(), angles.sin()]).float(), atol=1e-4, rtol=0)


def test_all_time_steps_have_different_embeddings() -> None:
    embedding = sinusoidal_embedding(torch.arange(1000))
    distances = torch.cdist(embedding, embedding) + 10 * torch.eye(1000)
    assert distances.min() > 0.05
