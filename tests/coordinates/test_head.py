"""The coordinate head, the tap it reads from, and the voxels it is asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from diffseg_nnunet.coordinates.head import (
    CoordinateHead,
    CoordinateRegressor,
    CoordinateSettings,
    FeatureTap,
    gather_voxels,
    patch_statistics,
    stage_norms,
    statistics_channels,
    values_at,
)


@pytest.mark.parametrize("spatial", [(5, 7), (4, 5, 6)])
def test_gathered_features_are_those_at_the_voxels(spatial: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn((3, 4, *spatial), generator=generator)
    voxels = torch.stack([torch.randint(0, n, (3, 11), generator=generator) for n in spatial], dim=-1)
    voxels[:, 0], voxels[:, 1] = 0, torch.tensor(spatial) - 1
    gathered = gather_voxels(features, voxels)
    assert gathered.shape == (3, 11, 4)
    for sample in range(3):
        for point in range(11):
            index = (sample, slice(None), *voxels[sample, point].tolist())
            assert torch.equal(gathered[sample, point], features[index])


def pyramid(dimensions: int) -> tuple[list[torch.Tensor], tuple[int, ...]]:
    """Features of three resolutions, coarse to fine, of a patch."""
    shape = (8, 12) if dimensions == 2 else (4, 8, 12)
    generator = torch.Generator().manual_seed(0)
    scales = ((6, 4), (5, 2), (3, 1))
    return [torch.randn((2, c, *(n // f for n in shape)), generator=generator) for c, f in scales], shape


@pytest.mark.parametrize("dimensions", [2, 3])
def test_values_between_voxels_are_interpolated(dimensions: int) -> None:
    """As torch interpolates whole maps with aligned outer faces."""
    features, shape = pyramid(dimensions)
    voxels = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"), -1)
    voxels = voxels.reshape(1, -1, dimensions).expand(2, -1, -1)
    mode = "bilinear" if dimensions == 2 else "trilinear"
    for scale in features:
        expected = nn.functional.interpolate(scale, shape, mode=mode)
        found = values_at(scale, voxels, shape).transpose(1, 2).reshape(expected.shape)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_dense_coordinates_are_those_of_the_voxels(dimensions: int) -> None:
    features, shape = pyramid(dimensions)
    head = CoordinateHead([6, 5, 3], hidden=16)
    generator = torch.Generator().manual_seed(1)
    voxels = torch.stack([torch.randint(0, n, (2, 9), generator=generator) for n in shape], dim=-1)
    dense, at_voxels = head.dense(features, shape), head(features, voxels, shape)
    assert dense.shape == (2, 3, *shape)
    assert at_voxels.shape == (2, 9, 3)
    torch.testing.assert_close(gather_voxels(dense, voxels), at_voxels, atol=1e-5, rtol=1e-5)


def test_head_computes_in_float32_whatever_it_is_given() -> None:
    torch.manual_seed(0)
    features, shape = pyramid(3)
    rounded = [scale.bfloat16() for scale in features]
    head, voxels = CoordinateHead([6, 5, 3]), torch.zeros((2, 1, 3), dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, dense = head(rounded, voxels, shape), head.dense(rounded, shape)
    assert found.dtype == dense.dtype == torch.float32
    assert torch.equal(found, head([scale.float() for scale in rounded], voxels, shape))


def test_tap_hands_over_the_last_features_once() -> None:
    layers = [nn.Linear(2, 3), nn.Linear(3, 1)]
    tap = FeatureTap(layers)
    with pytest.raises(RuntimeError, match="no forward pass"):
        tap.take()
    nn.Sequential(*layers)(torch.zeros(1, 2))
    first = layers[0](torch.ones(1, 2))
    second = layers[1](first)
    assert tap.take() == [first, second]
    with pytest.raises(RuntimeError, match="no forward pass"):
        tap.take()


def test_settings_survive_json() -> None:
    chosen = CoordinateSettings(mode="none", weight=0.5, points_per_patch=10)
    assert CoordinateSettings(**json.loads(json.dumps(chosen.to_json()))) == chosen


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "map"}, "map is none of auxiliary, guidance, none"),
        ({"objective": "absolute"}, "absolute is none of relative, distance"),
        ({"clean_share": 1.0}, "clean_share 1.0 is not in 0..1"),
        ({"condition_dropout": -0.1}, "condition_dropout -0.1 is not in 0..1"),
        ({"regressor_share": 1.5}, "regressor_share 1.5 is not in 0..1"),
    ],
)
def test_settings_refuse_what_is_not_there(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoordinateSettings(**wrong)


def normed(dimensions: int = 3) -> nn.Module:
    """A planned network in miniature: an encoder of two stages with affine norms, and outputs of three channels."""
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dimensions == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    shape = (1, 2, (4, 6), conv, 3, (1, 2), 1, 3, 1)
    return PlainConvUNet(*shape, conv_bias=True, norm_op=norm, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU)


@pytest.mark.parametrize("spatial", [(5, 7), (4, 5, 6)])
def test_patch_statistics_are_means_and_deviations(spatial: tuple[int, ...]) -> None:
    features = torch.randn((3, 4, *spatial), generator=torch.Generator().manual_seed(0)) * 2 + 5
    statistics = patch_statistics(features)
    assert statistics.shape == (3, 8, *(1,) * len(spatial))
    values = features.flatten(2).double()
    expected = torch.cat([values.mean(2), values.std(2, correction=0)], dim=1)
    torch.testing.assert_close(statistics.flatten(1).double(), expected, rtol=1e-4, atol=1e-4)
    # a constant map has no deviation, and a finite gradient
    constant = torch.ones((1, 1, *spatial), requires_grad=True)
    patch_statistics(constant).sum().backward()
    assert torch.isfinite(constant.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("mean", "deviation"), [(10.0, 0.3), (30.0, 1.0), (-300.0, 10.0), (0.0, 1.0), (0.0, 500.0)])
def test_patch_statistics_of_short_formats_are_those_of_float32(
    mean: float, deviation: float, dtype: torch.dtype
) -> None:
    """Also where the mean is 30 deviations from zero, or float16 does not hold a square; and so is the gradient."""
    noise = torch.randn((2, 3, 12, 12, 12), generator=torch.Generator().manual_seed(0))
    rounded = (mean + deviation * noise).to(dtype).requires_grad_()
    exact = rounded.detach().double().requires_grad_()
    statistics = patch_statistics(rounded)
    variance, expected_mean = torch.var_mean(exact, (2, 3, 4), correction=0)
    expected = torch.cat([expected_mean, variance.sqrt()], dim=1)
    assert statistics.dtype == torch.float32
    torch.testing.assert_close(statistics.flatten(1).double(), expected, rtol=5e-3, atol=5e-3)
    statistics[:, 3:].sum().backward()
    expected[:, 3:].sum().backward()
    difference = (rounded.grad.double() - exact.grad).square().mean().sqrt()
    assert difference < 0.02 * exact.grad.square().mean().sqrt()


def test_what_norms_take_away_is_kept() -> None:
    """Brighter by a constant, a patch has the same features behind an instance norm, and other statistics."""
    convolution, norm = nn.Conv3d(1, 4, 1), nn.InstanceNorm3d(4, affine=True)
    tap = FeatureTap([norm], [norm])
    patch = torch.randn((2, 1, 8, 8, 8), generator=torch.Generator().manual_seed(0))
    taken = []
    for brighter in (0.0, 3.0):
        norm(convolution(patch + brighter))
        taken.append(tap.take())
    (features, statistics), (same, others) = taken
    torch.testing.assert_close(features, same, atol=1e-4, rtol=0)
    shift = torch.cat([3 * convolution.weight.flatten(), torch.zeros(4)])
    torch.testing.assert_close((others - statistics)[0].flatten(), shift, atol=1e-4, rtol=0)
    with pytest.raises(RuntimeError, match="no forward pass"):
        tap.take()


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_last_norm_of_each_stage_is_read(dimensions: int) -> None:
    norms = stage_norms(normed(dimensions))
    assert [norm.num_features for norm in norms] == [4, 6]
    assert statistics_channels(norms) == 2 * (4 + 6)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_regressor_maps_what_its_head_reads(dimensions: int) -> None:
    regressor = CoordinateRegressor(normed(dimensions))
    patch = torch.randn((2, 1, *(8,) * dimensions), generator=torch.Generator().manual_seed(0))
    dense = regressor(patch)
    assert dense.shape == (2, 3, *patch.shape[2:])
    voxels = torch.tensor([[[1, 2, 3][:dimensions], [7, 0, 5][:dimensions]]]).expand(2, -1, -1)
    read = regressor.head(regressor.features(patch), voxels, patch.shape[2:])
    torch.testing.assert_close(gather_voxels(dense, voxels), read, atol=1e-5, rtol=1e-5)
    dense.sum().backward()
    trained = [p for p in regressor.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)  # and the network's outputs, which nobody reads, are not among them
    assert not any(p.requires_grad for p in regressor.network.decoder.seg_layers.parameters())
