"""The refiner on planned grids: 2D and 3D, odd shapes, anisotropic strides, binary and in full precision."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from torch import Tensor, nn
from torch.nn import functional

from diffseg_nnunet.diffusion.bernoulli import clean_log_odds
from diffseg_nnunet.refinement.attention import CrossTransformer, DirectionalPools, axis_means
from diffseg_nnunet.refinement.binary import BinaryConv, BinaryLinear, binary_weight, pack_state, state_bytes
from diffseg_nnunet.refinement.blocks import BinaryBlock, ChannelMatch, FromTime, ResidualBlock, average_pool
from diffseg_nnunet.refinement.network import Refiner, RefinerArchitecture

IN_3D = RefinerArchitecture(
    image_channels=1,
    classes=3,
    channels=(4, 6, 8, 8),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 1), (3, 2, 2)),
    kernel_sizes=((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)),
    pyramid_channels=(5, 7),
    heads=2,
)
IN_2D = RefinerArchitecture(
    image_channels=2,
    classes=1,
    channels=(4, 8, 8),
    strides=((1, 1), (2, 2), (2, 1)),
    kernel_sizes=((3, 3),) * 3,
    pyramid_channels=(3, 5, 4),
)
SHAPES = {IN_3D: (7, 13, 10), IN_2D: (15, 10)}
ARCHITECTURES = [replace(plan, binary=binary) for plan in SHAPES for binary in (True, False)]


def shape_of(plan: RefinerArchitecture) -> tuple[int, ...]:
    return SHAPES[replace(plan, binary=True)]


def refiner(plan: RefinerArchitecture, trained: bool = False) -> Refiner:
    """A new one; or one whose zero-initialised layers are not zero any more."""
    torch.manual_seed(0)
    network = Refiner(plan)
    if trained:
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.2)
    return network.eval()


def grids(plan: RefinerArchitecture) -> list[tuple[int, ...]]:
    """The grid of each stage, as nnU-Net's strided convolutions make it."""
    found = [shape_of(plan)]
    for strides in plan.strides[1:]:
        found.append(tuple(math.ceil(size / stride) for size, stride in zip(found[-1], strides, strict=True)))
    return found


def inputs(plan: RefinerArchitecture, seed: int = 0) -> dict[str, Tensor | list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    prior = torch.rand(2, plan.classes, *shape_of(plan), generator=generator)
    features = [
        torch.randn(2, channels, *grid, generator=generator)
        for channels, grid in zip(plan.pyramid_channels, grids(plan)[-len(plan.pyramid_channels) :], strict=True)
    ]
    return {
        "noisy": torch.bernoulli(prior, generator=generator),
        "t": torch.tensor([0, 9]),
        "prior": prior,
        "image": torch.randn(2, plan.image_channels, *shape_of(plan), generator=generator),
        "features": features,
    }


@pytest.mark.parametrize("plan", ARCHITECTURES)
def test_a_new_refiner_estimates_the_prior(plan: RefinerArchitecture) -> None:
    given = inputs(plan)
    with torch.no_grad():
        flip = refiner(plan)(**given).sigmoid()
    assert flip.shape == given["prior"].shape
    torch.testing.assert_close((given["noisy"] - flip).abs(), given["prior"].clamp(1e-4, 1 - 1e-4))


@pytest.mark.parametrize("plan", ARCHITECTURES)
def test_the_layers_speak_of_the_mask_whatever_is_drawn(plan: RefinerArchitecture) -> None:
    """A last layer that always says one number moves the log-odds of y_0 by it, where y_t is 0 and where it is 1."""
    network, given = refiner(plan), inputs(plan)
    with torch.no_grad():
        network.out.bias.fill_(0.7)
        log_odds = clean_log_odds(network(**given), given["noisy"])
    torch.testing.assert_close(log_odds - given["prior"].clamp(1e-4, 1 - 1e-4).logit(), torch.full_like(log_odds, 0.7))


@pytest.mark.parametrize("plan", ARCHITECTURES)
def test_every_input_and_every_parameter_matters(plan: RefinerArchitecture) -> None:
    network, given = refiner(plan, trained=True), inputs(plan)
    reference = network(**given)
    assert reference.isfinite().all()
    changed = [{name: inputs(plan, seed=1)[name]} for name in ("noisy", "prior", "image")]
    changed.append({"t": torch.tensor([3, 4])})
    for index in range(len(plan.pyramid_channels)):
        features = list(given["features"])
        features[index] = -features[index]
        changed.append({"features": features})
    with torch.no_grad():
        for change in changed:
            assert not torch.allclose(network(**(given | change)), reference)
    reference.square().sum().backward()
    idle = [name for name, parameter in network.named_parameters() if not parameter.grad.any()]
    assert not idle


@pytest.mark.parametrize("plan", ARCHITECTURES)
def test_samples_of_a_batch_do_not_see_each_other(plan: RefinerArchitecture) -> None:
    network, given = refiner(plan, trained=True).double(), inputs(plan)
    given = {n: [f.double() for f in v] if n == "features" else v.double() for n, v in given.items()}
    first = {n: [f[:1] for f in v] if n == "features" else v[:1] for n, v in given.items()}
    with torch.no_grad():
        torch.testing.assert_close(network(**first), network(**given)[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plan", ARCHITECTURES)
def test_log_odds_are_float32_within_autocast(plan: RefinerArchitecture) -> None:
    given = inputs(plan)
    given["features"] = [feature.bfloat16() for feature in given["features"]]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = refiner(plan)(**given)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sigmoid(), (given["noisy"] - given["prior"].clamp(1e-4, 1 - 1e-4)).abs())


def test_binary_layers_are_binary_and_the_ends_are_not() -> None:
    network = refiner(IN_3D)
    layers = [module for module in network.modules() if isinstance(module, BinaryConv | BinaryLinear)]
    for layer in layers:
        assert all(len(channel.abs().unique()) == 1 for channel in binary_weight(layer.weight))
    assert isinstance(network.stem, nn.Conv3d)
    assert isinstance(network.out, nn.Conv3d)
    # on the way down three strided and four more, a condition, the last block, and two a stage on the way up
    assert sum(isinstance(layer, BinaryConv) for layer in layers) == 3 + 4 + 1 + 1 + 2 * 3
    assert sum(isinstance(layer, BinaryLinear) for layer in layers) == 2 * (3 + 2)
    full = refiner(replace(IN_3D, binary=False))
    assert not [module for module in full.modules() if isinstance(module, BinaryConv | BinaryLinear)]


def test_packed_state_is_smaller_by_what_the_bits_save() -> None:
    network = refiner(IN_3D)
    plain = sum(tensor.numel() * 4 for tensor in network.state_dict().values())
    saved = sum(
        4 * layer.weight.numel() - math.ceil(layer.weight.numel() / 8) - 4 * len(layer.weight)
        for layer in network.modules()
        if isinstance(layer, BinaryConv | BinaryLinear)
    )
    assert state_bytes(network) == plain - saved
    assert sum(name.endswith("weight_signs") for name in pack_state(network)) == 15 + 10


def test_thresholds_are_each_time_steps_own() -> None:
    torch.manual_seed(0)
    block = BinaryBlock(2, 2, (3, 3), embedding_dim=8)
    features = 0.1 * torch.randn(1, 2, 6, 6)
    with torch.no_grad():
        for bias in (0.3, -0.3):
            nn.init.constant_(block.bias[1].bias, bias)
            # above the threshold -b everything is 1, below it -1, whatever the features
            seen = []
            handle = block.conv.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
            block(features.clamp(-0.2, 0.2), torch.zeros(1, 8))
            handle.remove()
            assert (seen[0].sign() == math.copysign(1, bias)).all()


@pytest.mark.parametrize(("before", "after"), [(4, 4), (8, 4), (4, 8), (6, 4), (4, 5)])
def test_channels_are_matched_by_means(before: int, after: int) -> None:
    features = torch.randn(2, before, 3, 4)
    found = ChannelMatch(before, after)(features)
    tokens = features.movedim(1, -1).reshape(-1, 1, before)
    expected = functional.adaptive_avg_pool1d(tokens, after).reshape(2, 3, 4, after).movedim(-1, 1)
    torch.testing.assert_close(found, expected)
    if before == 2 * after:
        torch.testing.assert_close(found, (features[:, ::2] + features[:, 1::2]) / 2)


def test_pooled_shortcuts_have_the_shape_of_strided_convolutions() -> None:
    features = torch.randn(1, 2, 5, 7, 9)
    for stride in ((1, 1, 1), (1, 2, 2), (2, 2, 3), (3, 3, 1)):
        convolved = BinaryConv(2, 2, (3, 3, 3), stride)(features)
        assert average_pool(features, stride).shape == convolved.shape


def test_a_new_residual_block_is_its_shortcut() -> None:
    features, embedding = torch.randn(2, 3, 6, 5), torch.randn(2, 8)
    torch.testing.assert_close(ResidualBlock(3, 3, (3, 3), 8)(features, embedding), features)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 4), (1, 2, 1)])
def test_a_new_transformer_is_the_identity(grid: tuple[int, ...], binary: bool) -> None:
    torch.manual_seed(0)
    transformer = CrossTransformer(8, len(grid), heads=2, embedding_dim=8, binary=binary)
    diffusion, segmentor, embedding = torch.randn(2, 8, *grid), torch.randn(2, 8, *grid), torch.randn(2, 8)
    torch.testing.assert_close(transformer(diffusion, segmentor, embedding), diffusion)
    for module in transformer.modules():
        if isinstance(module, FromTime):
            nn.init.normal_(module[1].weight)
    found = transformer(diffusion, segmentor, embedding)
    assert found.shape == diffusion.shape
    # every voxel hears of every other, and of the segmentor's
    changed = segmentor.clone()
    changed[:, :, 0] *= -1
    assert not torch.allclose(transformer(diffusion, changed, embedding)[..., -1], found[..., -1])


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("grid", [(7, 2), (1, 4, 6)])
def test_means_along_axes_are_pooling_without_the_padding(grid: tuple[int, ...], size: int) -> None:
    features = torch.randn(2, 3, *grid)
    for axis in range(len(grid)):
        lines = features.movedim(2 + axis, -1)
        expected = torch.stack(
            [lines[..., max(0, at - size // 2) : at + size // 2 + 1].mean(-1) for at in range(grid[axis])], dim=-1
        )
        torch.testing.assert_close(axis_means(features, axis, size).movedim(2 + axis, -1), expected)
    assert not DirectionalPools(3, len(grid), 8)(features, torch.randn(2, 8)).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": IN_3D.strides[1:]}, "4 stages, 3 strides and 4 kernel sizes"),
        ({"pyramid_channels": ()}, "0 feature maps of the segmentor for 4 stages"),
        ({"pyramid_channels": (1,) * 5}, "5 feature maps of the segmentor for 4 stages"),
        ({"kernel_sizes": ((3, 3),) * 4}, "are not all 2D or all 3D"),
        ({"kernel_sizes": ((2, 3, 3), *IN_3D.kernel_sizes[1:])}, "are not all odd"),
        ({"strides": ((2, 2, 2), *IN_3D.strides[1:])}, "masks are refined at full resolution"),
        ({"heads": 3}, "8 channels cannot be shared by 3 heads"),
        ({"channels": (3, 6, 8, 8)}, "3 channels of the first stage"),
    ],
)
def test_architectures_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(IN_3D, **changes)


def test_architectures_go_through_json() -> None:
    for plan in ARCHITECTURES:
        assert RefinerArchitecture(**json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("encoder", ["plain", "residual"])
def test_a_planned_encoders_feature_maps_fit(encoder: str) -> None:
    # an anisotropic plan, as nnU-Net makes them for thick slices
    channels, strides = [4, 8, 12, 16], [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]]
    kernels = [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    kind = PlainConvEncoder if encoder == "plain" else ResidualEncoder
    options = {"norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU, "return_skips": True}
    segmentor = kind(1, 4, channels, nn.Conv3d, kernels, strides, 1, **options)
    image, prior = torch.randn(1, 1, 4, 16, 24), torch.rand(1, 2, 4, 16, 24)
    network = Refiner(RefinerArchitecture(1, 2, channels, strides, kernels, segmentor.output_channels[-2:]))
    found = network(torch.bernoulli(prior), torch.tensor([5]), prior, image, segmentor(image)[-2:])
    assert found.shape == prior.shape


def test_features_of_another_segmentor_are_refused() -> None:
    network, given = refiner(IN_3D), inputs(IN_3D)
    with pytest.raises(ValueError, match="1 feature maps of the segmentor, 2 planned"):
        network(**(given | {"features": given["features"][:1]}))
    coarser = [given["features"][0][:, :, ::2], given["features"][1]]
    with pytest.raises(
        ValueError, match=r"features for stage 2 lie on a grid of \(2, 4, 5\), the stage's is \(4, 4, 5\)"
    ):
        network(**(given | {"features": coarser}))
