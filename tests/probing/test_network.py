"""A probed network: frozen to the bit, saved under stock keys, and the same network again when it is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

from diffseg_nnunet.diffusion.conditioning import TimeConditioning, affine_norms, fold
from diffseg_nnunet.diffusion.gaussian import DiffusionSettings, GaussianDiffusion
from diffseg_nnunet.probing.heads import NonlinearHead
from diffseg_nnunet.probing.network import ProbedNetwork
from diffseg_nnunet.probing.settings import ProbeSettings

CLASSES, FOLDED, STEPS = 4, 100, (50, 150, 700)


def unet(
    residual: bool = False, dimensions: int = 3, norm: str = "InstanceNorm", deep_supervision: bool = False
) -> nn.Module:
    """Norms are no identities, as if trained."""
    torch.manual_seed(0)
    network = (ResidualEncoderUNet if residual else PlainConvUNet)(
        2,
        3,
        [4, 6, 8],
        {2: nn.Conv2d, 3: nn.Conv3d}[dimensions],
        3,
        [1, 2, 2],
        [1, 1, 1],
        CLASSES,
        [1, 1],
        norm_op=getattr(nn, f"{norm}{dimensions}d"),
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        deep_supervision=deep_supervision,
    )
    for layer in affine_norms(network).values():
        nn.init.normal_(layer.weight, 1, 0.3)
        nn.init.normal_(layer.bias, 0, 0.3)
    return network


def conditioning_of(network: nn.Module) -> TimeConditioning:
    """As if trained."""
    conditioning = TimeConditioning(network)
    for projection in conditioning.projections:
        nn.init.normal_(projection.weight, 0, 0.3)
        nn.init.normal_(projection.bias, 0, 0.2)
    return conditioning


def probed(network: nn.Module, settings: ProbeSettings | None = None) -> ProbedNetwork:
    dimensions = 3 if any(isinstance(module, nn.Conv3d) for module in network.modules()) else 2

    def head(channels: Sequence[int], passes: int) -> nn.Module:
        return NonlinearHead(channels, [count // passes for count in channels], CLASSES, dimensions)

    return ProbedNetwork(network, head, 2, (8,) * dimensions, settings)


def image(dimensions: int = 3) -> Tensor:
    return torch.randn((2, 2, *(8,) * dimensions), generator=torch.Generator().manual_seed(1))


def decoder_outputs(network: nn.Module, x: Tensor) -> list[Tensor]:
    """The pyramid by running the parts of the network one after the other."""
    skips = network.encoder(x)
    pyramid = [skips[-1]]
    for up, stage, skip in zip(network.decoder.transpconvs, network.decoder.stages, skips[-2::-1], strict=True):
        pyramid.append(stage(torch.cat((up(pyramid[-1]), skip), 1)))
    return pyramid


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dimensions", [2, 3])
@torch.no_grad()
def test_features_are_the_bottleneck_and_each_decoder_stage(residual: bool, dimensions: int) -> None:
    network = unet(residual, dimensions)
    network.eval()
    found, x = probed(network).features(image(dimensions)), image(dimensions)
    for one, other in zip(found, decoder_outputs(network, x), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("noisy", [True, False])
@torch.no_grad()
def test_features_at_time_steps_are_the_conditioned_networks(residual: bool, dimensions: int, noisy: bool) -> None:
    """Against the pretraining's own network, conditioned and noised by its own code."""
    pretrained, x = unet(residual, dimensions), image(dimensions)
    conditioning, diffusion = conditioning_of(pretrained), GaussianDiffusion(DiffusionSettings(timesteps=1000))
    folded = unet(residual, dimensions)
    folded.load_state_dict(fold(pretrained, conditioning, FOLDED))
    network = probed(folded, ProbeSettings(STEPS, noisy))
    states = [fold(pretrained, conditioning, t) for t in STEPS]
    network.time_steps.take(states, diffusion.alpha_bar[list(STEPS)])
    before = {key: tensor.clone() for key, tensor in folded.state_dict().items()}

    expected = []
    for t in STEPS:
        times = torch.full((2,), t)
        noised = diffusion.add_noise(x, network.time_steps.noise.expand_as(x), times) if noisy else x
        with conditioning.at(times):
            expected.append(decoder_outputs(pretrained, noised))
    for found, parts in zip(network.features(x), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(found, torch.cat(parts, 1), rtol=1e-4, atol=1e-4)
    # the noise is the same for every image, and the folded network is left as it was
    if noisy:
        assert network.time_steps.noise.shape == x.shape[1:]
    assert all(torch.equal(tensor, before[key]) for key, tensor in folded.state_dict().items())


def test_state_is_a_stock_networks_and_the_heads() -> None:
    network = unet(deep_supervision=True)
    state = probed(network, ProbeSettings(STEPS, noisy=True)).state_dict()
    own = network.state_dict()
    assert own.keys() <= state.keys()
    assert all(state[key] is own[key] or torch.equal(state[key], own[key]) for key in own)
    assert {key.split(".")[0] for key in state.keys() - own.keys()} == {"head", "time_steps", "_extra_state"}
    stock = unet()
    stock.load_state_dict({key: state[key] for key in own}, strict=True)


@pytest.mark.parametrize("settings", [ProbeSettings(), ProbeSettings(STEPS, noisy=True), ProbeSettings((7,))])
@torch.no_grad()
def test_loading_restores_the_settings(settings: ProbeSettings, tmp_path) -> None:
    saved, x = probed(unet(residual=True), settings), image()
    saved.train()
    saved(x)  # the head's norms have seen something
    saved.eval()
    torch.save(saved.state_dict(), tmp_path / "state.pth")
    other = probed(unet(residual=True), ProbeSettings((3, 4)))
    other.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True), strict=True)
    other.eval()
    assert other.settings == settings
    torch.testing.assert_close(other(x), saved(x))
    # loading the same settings keeps the modules, which an optimiser holds
    head = other.head
    other.load_state_dict(saved.state_dict())
    assert other.head is head


def test_nothing_frozen_changes_not_even_norms_with_a_state() -> None:
    network = unet(norm="BatchNorm")
    frozen = probed(network)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in frozen.parameters() if p.requires_grad], 0.1, momentum=0.9)
    head_before = [p.clone() for p in frozen.head.parameters()]
    for _ in range(3):
        frozen.train()
        optimizer.zero_grad()
        frozen(image()).square().mean().backward()
        optimizer.step()
    assert frozen.head.training
    assert not any(module.training for module in network.modules())
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert any(not torch.equal(p, old) for p, old in zip(frozen.head.parameters(), head_before, strict=True))


@pytest.mark.parametrize("steps", [(-1,), (5, 5), (1.5,)])
def test_time_steps_that_are_none(steps: tuple) -> None:
    with pytest.raises(ValueError, match="time steps"):
        ProbeSettings(steps)
