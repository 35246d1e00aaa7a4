"""What the segmentor is shown while the refiner learns: worse in the ways that are meant, and in no other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffseg_nnunet.refinement.degradation import (
    at_low_resolution,
    chosen_samples,
    coarse_field,
    degraded_view,
    softened,
    with_cut_outs,
    with_gamma,
)

SHAPES = [(2, 12, 9), (1, 8, 9, 10)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=seeded(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_gamma_keeps_range_and_order(shape: tuple[int, ...]) -> None:
    image = image_of(shape)
    for exponent in (0.5, 2.0):
        bent = with_gamma(image, exponent).flatten(1)
        for before, after in zip(image.flatten(1), bent, strict=True):
            assert torch.equal(before.argsort(), after.argsort())
            torch.testing.assert_close(torch.stack(after.aminmax()), torch.stack(before.aminmax()))
            # halfway up the range, in closed form
            middle = (before - (before.min() + before.max()) / 2).abs().argmin()
            share = (before[middle] - before.min()) / (before.max() - before.min())
            found = (after[middle] - before.min()) / (before.max() - before.min())
            torch.testing.assert_close(found, share**exponent)
    torch.testing.assert_close(with_gamma(image, 1.0), image)
    flat = torch.full(shape, 3.0)
    assert torch.equal(with_gamma(flat, 2.0), flat)


@pytest.mark.parametrize("shape", SHAPES)
def test_low_resolution_loses_fine_structure_alone(shape: tuple[int, ...]) -> None:
    flat = torch.full(shape, 3.0)
    torch.testing.assert_close(at_low_resolution(flat, 3.0), flat)
    torch.testing.assert_close(at_low_resolution(image_of(shape), 1.0), image_of(shape))
    stripes = torch.tensor([1.0, -1.0]).repeat(8).reshape(1, 16, 1).expand(1, 16, 16)
    assert at_low_resolution(stripes, 2.0).abs().max() < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_cut_outs_hide_boxes_alone(shape: tuple[int, ...]) -> None:
    image = image_of(shape)
    for seed in range(20):
        found = with_cut_outs(image, seeded(seed))
        hidden = (found != image).any(0)
        assert 0 < hidden.sum() <= 3 * math.prod(0.4 * size for size in shape[1:])
        means = image.flatten(1).mean(1)
        assert all((channel[hidden] == mean).all() for channel, mean in zip(found, means, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_views_are_the_seeds_and_each_samples_own(shape: tuple[int, ...]) -> None:
    batch = image_of(shape).expand(16, *shape)
    one, same, other = (degraded_view(batch, seeded(seed)) for seed in (0, 0, 1))
    assert one.shape == batch.shape
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.isfinite().all()
    assert len({tuple(view.flatten().tolist()) for view in one}) > 10


def test_logits_are_softened_by_temperatures_of_1_to_8() -> None:
    shape = (400, 2, 6, 6)
    logits = torch.tensor([-40.0, 40.0]).reshape(1, 2, 1, 1).expand(shape)
    field, found = coarse_field(shape, seeded()), softened(logits, seeded(3))
    generator = seeded(3)
    heat = (80 / (found[:, 1] - found[:, 0]).mean((1, 2))).log() / math.log(8)
    # log-uniform, up to the field
    assert heat.min() > -0.1
    assert heat.max() < 1.1
    assert abs(heat.mean() - 0.5) < 4.5 / math.sqrt(12 * 400) + 0.02
    torch.rand(400, generator=generator)
    torch.testing.assert_close(
        found - coarse_field(shape, generator), logits / 8 ** torch.rand(400, generator=seeded(3)).reshape(-1, 1, 1, 1)
    )
    # normal at the nodes, the corners among them
    corners = field[..., [0, 0, -1, -1], [0, -1, 0, -1]].flatten()
    assert abs(corners.mean()) < 4.5 / math.sqrt(corners.numel())
    assert abs(corners.std() - 1) < 4.5 / math.sqrt(2 * corners.numel())


def test_errors_spread_over_many_voxels() -> None:
    field = coarse_field(torch.Size((4, 2, 33, 33)), seeded())
    assert field.diff(dim=-1).abs().max() < 6 / 16  # between nodes, 16 voxels apart, that differ by less than 6
    assert field.std() > 0.3


def test_the_share_of_the_samples() -> None:
    assert not chosen_samples(50, 0.0, seeded()).any()
    assert chosen_samples(50, 1.0, seeded()).all()
    share = chosen_samples(4000, 0.6, seeded()).float().mean()
    assert abs(share - 0.6) < 4.5 * math.sqrt(0.6 * 0.4 / 4000)
