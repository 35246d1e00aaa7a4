"""Weights of one U-Net for another: against closed forms, and against networks that must answer alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv3d, conv_transpose3d

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.training.adaptation import (
    MINIMUM_SHARE,
    adapt,
    average_inputs,
    canonical,
    require_share,
    resize_kernel,
    resize_upsampling,
)

NETWORKS = ("plain", "resenc")
FEATURES = (4, 6, 8, 10, 12, 14)
ISOTROPIC, FLAT = ([3, 3, 3], [2, 2, 2]), ([1, 3, 3], [1, 2, 2])


def unet(kind: str, channels: int = 1, stages: int = 3, flat: int = 0, seed: int = 0, **changes: Any) -> nn.Module:
    """nnU-Net's networks, of random weights in every tensor.

    Args:
        flat: stages, from the first on, of flat kernels, and of flat strides after them.
    """
    dimensions = changes.pop("dimensions", 3)
    kernels = [FLAT[0] if s < flat else ISOTROPIC[0] for s in range(stages)]
    strides = [[1] * 3] + [FLAT[1] if s <= flat else ISOTROPIC[1] for s in range(1, stages)]
    blocks = {"plain": "n_conv_per_stage", "resenc": "n_blocks_per_stage"}[kind]
    arguments = {
        "n_stages": stages,
        "features_per_stage": FEATURES[:stages],
        "conv_op": nn.Conv3d if dimensions == 3 else nn.Conv2d,
        "kernel_sizes": [kernel[-dimensions:] for kernel in kernels],
        "strides": [stride[-dimensions:] for stride in strides],
        blocks: [1, 2, 2, 2, 2, 2][:stages],
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d if dimensions == 3 else nn.InstanceNorm2d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    } | changes
    network = {"plain": PlainConvUNet, "resenc": ResidualEncoderUNet}[kind](channels, num_classes=2, **arguments)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return network.eval()


def transfer(source: nn.Module, target: nn.Module) -> Any:
    """Let `target` start from `source`, with its output layers too, so that both can be compared by what they say."""
    adaptation = adapt(target.state_dict(), source.state_dict())
    target.load_state_dict(adaptation.state_for(target.state_dict()), strict=True)
    for layer in ("weight", "bias"):
        own, theirs = target.decoder.seg_layers[-1], source.decoder.seg_layers[-1]
        getattr(own, layer).data = getattr(theirs, layer).data.clone()
    return adaptation


def counted(network: nn.Module) -> int:
    """Parameters but the output layers'; torch counts shared ones once."""
    return sum(parameter.numel() for name, parameter in network.named_parameters() if ".seg_layers." not in name)


@torch.no_grad()
def answer(network: nn.Module, images: Tensor) -> Tensor:
    return network(images)


# -- whole networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
def test_equal_networks_are_loaded_as_they_are(kind: str) -> None:
    source, target = unet(kind, seed=1), unet(kind, seed=2)
    adaptation = transfer(source, target)
    assert adaptation.shares() == {"loaded": 1.0, "adapted": 0.0, "skipped": 0.0}
    assert sum(match.parameters for match in adaptation.matches) == counted(target)
    assert len(adaptation.matches) == sum(".seg_layers." not in name for name, _ in target.named_parameters())
    images = torch.randn(1, 1, 8, 8, 8)
    assert torch.equal(answer(target, images), answer(source, images))


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 3)])
def test_equal_channels_get_the_same_answer(kind: str, before: int, after: int) -> None:
    source, target = unet(kind, before, seed=1), unet(kind, after, seed=2)
    adaptation = transfer(source, target)
    (adapted,) = [match for match in adaptation.matches if match.kind == "adapted"]
    assert adapted.key == f"encoder.{'stem' if kind == 'resenc' else 'stages.0.0'}.convs.0.conv.weight"
    assert adapted.how == f"{before} input channel(s) averaged for {after}"
    assert adapted.parameters == FEATURES[0] * after * 27
    assert adaptation.share == 1
    image = torch.randn(1, 1, 8, 8, 8)
    torch.testing.assert_close(
        answer(target, image.expand(-1, after, -1, -1, -1)), answer(source, image.expand(-1, before, -1, -1, -1))
    )


@pytest.mark.parametrize("kind", NETWORKS)
def test_flat_kernels_in_the_centre_of_whole_ones_answer_alike(kind: str) -> None:
    """From anisotropic to isotropic: every image, borders included."""
    source = unet(kind, flat=2, seed=1)
    strides = [[1, 1, 1], [1, 2, 2], [1, 2, 2]]
    target = unet(kind, strides=strides, seed=2)
    adaptation = transfer(source, target)
    assert {match.how for match in adaptation.matches if match.kind == "adapted"} == {"kernels 1×3×3 to 3×3×3"}
    assert adaptation.share == 1
    images = torch.randn(1, 1, 8, 8, 8)
    torch.testing.assert_close(answer(target, images), answer(source, images))


@pytest.mark.parametrize("kind", NETWORKS)
def test_isotropic_weights_for_an_anisotropic_network(kind: str) -> None:
    source, target = unet(kind, stages=4, seed=1), unet(kind, stages=4, flat=2, seed=2)
    adaptation = transfer(source, target)
    assert adaptation.shares()["skipped"] == 0
    hows = {match.how for match in adaptation.matches if match.kind == "adapted"}
    assert hows == {"kernels 3×3×3 to 1×3×3", "up-sampling 2×2×2 to 1×2×2, averaged or repeated"}
    theirs, ours = source.state_dict(), target.state_dict()
    conv = "decoder.stages.2.convs.0.conv.weight"
    torch.testing.assert_close(ours[conv], theirs[conv].sum(2, keepdim=True))
    up = "decoder.transpconvs.2.weight"
    torch.testing.assert_close(ours[up], theirs[up].mean(2, keepdim=True))
    deepest = "encoder.stages.3.0.convs.0.conv" if kind == "plain" else "encoder.stages.3.blocks.0.conv1.conv"
    assert torch.equal(ours[f"{deepest}.weight"], theirs[f"{deepest}.weight"])


@pytest.mark.parametrize("kind", NETWORKS)
def test_of_six_stages_four_are_taken_by_resolution(kind: str) -> None:
    source, target = unet(kind, stages=6, seed=1), unet(kind, stages=4, seed=2)
    adaptation = transfer(source, target)
    assert adaptation.shares()["loaded"] == 1
    assert adaptation.used == pytest.approx(counted(target) / counted(source))
    # nnU-Net counts the decoder's stages from the deepest
    for ours, theirs in ((0, 2), (1, 3), (2, 4)):
        for part in ("stages", "transpconvs"):
            own, other = getattr(target.decoder, part)[ours], getattr(source.decoder, part)[theirs]
            assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", NETWORKS)
def test_of_six_stages_four_are_there(kind: str) -> None:
    source, target = unet(kind, stages=4, seed=1), unet(kind, stages=6, seed=2)
    fresh = {name: parameter.clone() for name, parameter in target.named_parameters()}
    adaptation = transfer(source, target)
    new = [
        *(target.encoder.stages[4:], target.decoder.stages[:2], target.decoder.transpconvs[:2]),
    ]
    skipped = sum(parameter.numel() for part in new for parameter in part.parameters())
    assert adaptation.shares()["skipped"] == pytest.approx(skipped / counted(target))
    assert adaptation.used == 1
    (row,) = [row for row in adaptation.rows() if row["kind"] == "skipped"]
    assert (row["how"], row["parameters"]) == ("stages the checkpoint does not have", skipped)
    state = target.state_dict()
    assert torch.equal(state["encoder.stages.4" + SUFFIX[kind]], fresh["encoder.stages.4" + SUFFIX[kind]])
    assert torch.equal(state["decoder.stages.2.convs.0.conv.weight"], source.decoder.stages[0].convs[0].conv.weight)


SUFFIX = {"plain": ".0.convs.0.conv.weight", "resenc": ".blocks.0.conv1.conv.weight"}


def test_other_features_fit_only_where_they_agree() -> None:
    source, target = unet("plain", seed=1), unet("plain", features_per_stage=(4, 6, 9), seed=2)
    adaptation = adapt(target.state_dict(), source.state_dict())
    skipped = {match.key for match in adaptation.matches if match.kind == "skipped"}
    deepest = {name for name, _ in target.named_parameters() if name.startswith("encoder.stages.2.")}
    assert skipped == deepest | {"decoder.transpconvs.0.weight"}


# -- too little -------------------------------------------------------------------------------------------------------


def test_too_small_a_share_is_refused_with_a_table() -> None:
    source, target = unet("plain", stages=2, seed=1), unet("plain", stages=6, seed=2)
    adaptation = adapt(target.state_dict(), source.state_dict())
    assert adaptation.share < MINIMUM_SHARE
    with pytest.raises(BadInputError) as refused:
        require_share(adaptation, "small.pth", "3d_fullres")
    message = str(refused.value)
    assert f"Only {adaptation.share:.1%} of the parameters of 3d_fullres can start from small.pth" in message
    assert "less than 50%" in message
    assert f"{1 - adaptation.share:.1%} skipped: stages the checkpoint does not have" in message
    assert "--from-checkpoint" in message
    require_share(adapt(target.state_dict(), target.state_dict()), "own.pth", "3d_fullres")


def test_a_2d_network_for_a_3d_plan() -> None:
    adaptation = adapt(unet("plain").state_dict(), unet("plain", dimensions=2).state_dict())
    with pytest.raises(BadInputError, match=r"skipped: of a 2D network"):
        require_share(adaptation, "flat.pth", "3d_fullres")


def test_foreign_or_no_weights() -> None:
    target = unet("plain").state_dict()
    for weights in ({}, {"backbone.conv.weight": torch.zeros(3)}):
        with pytest.raises(BadInputError, match=r"Only 0\.0%"):
            require_share(adapt(target, weights), "other.pth", "2d")


# -- tensors ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
def test_the_sum_over_inputs_is_kept(before: int, after: int, seed: int) -> None:
    weight = torch.randn(3, before, 3, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    other = average_inputs(weight, after)
    assert other.shape == (3, after, 3, 3, 3)
    torch.testing.assert_close(other.sum(1), weight.sum(1))
    assert torch.equal(average_inputs(other, after).sum(1), other.sum(1)) or before != after


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([1, 3, 5]), min_size=3, max_size=3), st.integers(0, 1000))
def test_a_kernel_collapsed_to_one_voxel_answers_as_before_to_a_constant(kernel: list[int], seed: int) -> None:
    """Along the axes that collapse; anything along the others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, 2, 3, 3, 3, generator=generator, dtype=torch.float64)
    other = resize_kernel(weight, tuple(kernel))
    assert other.shape[2:] == tuple(kernel)
    sizes = [1 if size == 1 else 9 for size in kernel]
    image = torch.randn(1, 2, *sizes, generator=generator, dtype=torch.float64).expand(-1, -1, 9, 9, 9)
    centre = (..., 4, 4, 4)
    torch.testing.assert_close(
        conv3d(image, other, padding="same")[centre], conv3d(image, weight, padding="same")[centre]
    )


def test_kernels_without_a_response_to_keep() -> None:
    assert resize_kernel(torch.ones(1, 1, 5, 5, 5), (3, 5, 5)) is None
    assert resize_kernel(torch.ones(1, 1, 3, 3, 3), (4, 3, 3)) is None
    assert resize_upsampling(torch.ones(1, 1, 2, 2, 2), (4, 2, 2)) is None


def test_upsampling() -> None:
    image = torch.randn(1, 3, 4, 4, 4)
    weight = torch.randn(3, 2, 2, 2, 2)
    doubled = conv_transpose3d(image, weight, stride=2)
    flat = conv_transpose3d(image, resize_upsampling(weight, (1, 2, 2)), stride=(1, 2, 2))
    torch.testing.assert_close(flat, (doubled[:, :, ::2] + doubled[:, :, 1::2]) / 2)
    again = conv_transpose3d(image, resize_upsampling(weight[:, :, :1], (2, 2, 2)), stride=2)
    once = conv_transpose3d(image, weight[:, :, :1], stride=(1, 2, 2))
    torch.testing.assert_close(again, once.repeat_interleave(2, 2))


@pytest.mark.parametrize("kind", NETWORKS)
def test_names_of_a_tensor_are_those_that_share_its_memory(kind: str) -> None:
    state = unet(kind).state_dict()
    by_memory = {}
    for key, tensor in state.items():
        by_memory.setdefault(tensor.data_ptr(), set()).add(canonical(key))
    assert all(len(names) == 1 and names <= state.keys() for names in by_memory.values())
    assert len(by_memory) == len({canonical(key) for key in state})
