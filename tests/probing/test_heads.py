"""Heads: the linear one is one linear map, the others look at each voxel alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffseg_nnunet.probing.heads import LinearHead, NonlinearHead

CHANNELS, CLASSES = (6, 4, 3), 5
both_dimensions = pytest.mark.parametrize("dimensions", [2, 3])


def pyramid(dimensions: int, channels: tuple[int, ...] = CHANNELS, seed: int = 0) -> list[Tensor]:
    """Feature maps of 2, 4, 8 … voxels; the last axis is not pooled between the two finest, as in anisotropic plans."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [[2 << scale] * (dimensions - 1) + [min(2 << scale, 4)] for scale in range(len(channels))]
    return [torch.randn((2, c, *size), generator=generator) for c, size in zip(channels, sizes, strict=True)]


@both_dimensions
def test_linear_is_one_linear_map_of_all_standardised_features(dimensions: int) -> None:
    head, features = LinearHead(CHANNELS, CLASSES, dimensions), pyramid(dimensions)
    features = [3 * scale + 2 for scale in features]
    spatial = (-1, *(1,) * dimensions)
    for _ in range(200):  # the running means forget what they began with
        in_training = head(features)
    means, deviations = (
        torch.cat([of(scale.transpose(0, 1).flatten(1)) for scale in features]).reshape(spatial)
        for of in (lambda values: values.mean(1), lambda values: values.std(1))
    )
    joined = torch.cat([functional.interpolate(f, size=features[-1].shape[2:]) for f in features], 1)
    weight = torch.cat([convolution.weight.flatten(1) for _, convolution in head.scales], 1)
    bias = head.scales[-1][1].bias.reshape(spatial)
    expected = torch.einsum("oc,bc...->bo...", weight, (joined - means) / deviations) + bias
    torch.testing.assert_close(head.eval()(features), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(in_training, expected, rtol=0.1, atol=0.1)  # the same but for the deviation's n - 1
    assert sum(p.numel() for p in head.parameters()) == CLASSES * (sum(CHANNELS) + 1)


def perceptron(head: NonlinearHead, voxels: list[Tensor]) -> Tensor:
    """The non-linear head in the words of methods: matrices on the feature vectors of one voxel at each scale."""

    def matrix(layer: nn.Module, vector: Tensor) -> Tensor:
        return vector if isinstance(layer, nn.Identity) else layer.weight.flatten(1) @ vector + layer.bias

    def block(layer: nn.Module, vector: Tensor) -> Tensor:
        inner = vector
        for norm, _, convolution in zip(*[iter(layer.branch)] * 3, strict=True):
            deviation = (norm.running_var + norm.eps).sqrt()
            inner = norm.weight * (inner - norm.running_mean) / deviation + norm.bias
            inner = matrix(convolution, inner.clamp_min(0))
        return vector + inner

    hidden = block(head.blocks[0], matrix(head.enter[0], voxels[0]))
    for index in range(1, len(voxels)):
        hidden = matrix(head.up[index - 1], hidden) + matrix(head.enter[index], voxels[index])
        hidden = block(head.blocks[index], hidden)
    return matrix(head.out, hidden)


@both_dimensions
@pytest.mark.parametrize("passes", [1, 2])
@torch.no_grad()
def test_nonlinear_is_a_perceptron_of_each_voxels_features(dimensions: int, passes: int) -> None:
    torch.manual_seed(1)
    channels = tuple(count * passes for count in CHANNELS)
    head, features = NonlinearHead(channels, CHANNELS, CLASSES, dimensions), pyramid(dimensions, channels)
    for norm in (m for m in head.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        for tensor in (norm.running_mean, norm.weight, norm.bias):
            nn.init.normal_(tensor)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    head.eval()
    found = head(features)
    assert found.shape == (2, CLASSES, *features[-1].shape[2:])
    for voxel in ((0,) * dimensions, (5,) * (dimensions - 1) + (3,), (7, 2, 1)[:dimensions]):
        places = [
            tuple(v * size // whole for v, size, whole in zip(voxel, f.shape[2:], found.shape[2:], strict=True))
            for f in features
        ]
        vectors = [f[(1, slice(None), *place)] for f, place in zip(features, places, strict=True)]
        torch.testing.assert_close(found[(1, slice(None), *voxel)], perceptron(head, vectors), rtol=1e-4, atol=1e-5)
    assert isinstance(head.enter[0], nn.Identity) == (passes == 1)


def test_every_convolution_has_kernel_1() -> None:
    for head in (LinearHead(CHANNELS, CLASSES, 3), NonlinearHead(CHANNELS, CHANNELS, CLASSES, 3)):
        kernels = {module.kernel_size for module in head.modules() if isinstance(module, nn.Conv3d)}
        assert kernels == {(1, 1, 1)}
