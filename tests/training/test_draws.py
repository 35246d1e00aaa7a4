"""What is drawn for a batch: uniform where it should be, and a matter of each scan's own generator."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffseg_nnunet.coordinates.head import CoordinateSettings
from diffseg_nnunet.diffusion.gaussian import DiffusionSettings, GaussianDiffusion
from diffseg_nnunet.training.draws import Draws, draw, random_voxels

SHAPES = [(7, 9), (4, 5, 6)]
every_shape = pytest.mark.parametrize("spatial", SHAPES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_mask(spatial: tuple[int, ...], count: int = 3, seed: int = 0) -> Tensor:
    """Any mask, of another size in each patch, none empty."""
    chance = torch.linspace(0.2, 0.8, count).reshape(-1, 1, *(1,) * len(spatial))
    mask = torch.rand((count, 1, *spatial), generator=generator(seed)) < chance
    mask[(slice(None), 0, *(size // 2 for size in spatial))] = True
    return mask


def batch(spatial: tuple[int, ...], scans: int, channels: int = 2) -> dict[str, Tensor]:
    return {"data": torch.zeros(2 * scans, channels, *spatial), "mask": some_mask(spatial, 2 * scans)}


def drawn(own: dict[str, Tensor], seeds: list[int], **coordinates: Any) -> Draws:
    settings = CoordinateSettings(points_per_patch=5, **coordinates)
    return draw(own, GaussianDiffusion(DiffusionSettings()), settings, [generator(seed) for seed in seeds])


@given(seed=st.integers(0, 2**31), spatial=st.sampled_from(SHAPES))
@settings(max_examples=30, deadline=None)
def test_random_voxels_lie_inside_the_mask(seed: int, spatial: tuple[int, ...]) -> None:
    mask = some_mask(spatial, seed=seed)
    voxels = random_voxels(mask, 40, generator(seed))
    assert voxels.shape == (3, 40, 3)
    assert voxels.dtype == torch.int64
    for own, places in zip(mask[:, 0], voxels, strict=True):
        # an all but impossible draw outside would be a chance of a millionth a voxel
        assert own[tuple(places[:, -len(spatial) :].T)].all()
        if len(spatial) == 2:
            assert (places[:, 0] == 0).all()


@every_shape
def test_random_voxels_are_uniform_over_the_mask(spatial: tuple[int, ...]) -> None:
    mask = some_mask(spatial)
    voxels = random_voxels(mask, 60_000, generator(1))
    for own, places in zip(mask[:, 0], voxels, strict=True):
        flat = np.ravel_multi_index(places[:, -len(spatial) :].T.numpy(), spatial)
        counts = np.bincount(flat, minlength=own.numel())[own.flatten().numpy()]
        expected = 60_000 / len(counts)
        chi_squared, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
        assert abs(chi_squared - freedom) < 4.5 * np.sqrt(2 * freedom)


@every_shape
def test_a_patch_outside_its_scan_gets_some_voxels(spatial: tuple[int, ...]) -> None:
    voxels = random_voxels(torch.zeros(1, 1, *spatial, dtype=torch.bool), 20, generator())
    assert (voxels >= 0).all()
    assert (voxels < torch.tensor((1,) * (3 - len(spatial)) + spatial)).all()


def test_no_points_draw_nothing() -> None:
    untouched, used = generator(3), generator(3)
    assert random_voxels(some_mask((4, 5, 6)), 0, used).shape == (3, 0, 3)
    assert torch.equal(untouched.get_state(), used.get_state())


@every_shape
def test_a_batch_draws_what_its_parts_draw(spatial: tuple[int, ...]) -> None:
    """Scans have streams of their own, so a batch may be shared among processes in any way."""
    whole, seeds = batch(spatial, scans=4), [3, 5, 8, 2]
    together = drawn(whole, seeds)
    for first, last in ((0, 2), (2, 4), (1, 2), (0, 4)):
        patches = slice(2 * first, 2 * last)
        apart = drawn({name: values[patches] for name, values in whole.items()}, seeds[first:last])
        for field in fields(Draws):
            assert torch.equal(getattr(together, field.name)[patches], getattr(apart, field.name)), field.name


@every_shape
def test_shapes_and_types(spatial: tuple[int, ...]) -> None:
    found = drawn(batch(spatial, scans=3), [0, 1, 2])
    assert (found.noise.shape, found.noise.dtype) == ((6, 2, *spatial), torch.float32)
    assert (found.t.shape, found.t.dtype) == ((6,), torch.int64)
    assert (found.clean.shape, found.clean.dtype) == ((6,), torch.bool)
    assert (found.dropped.shape, found.dropped.dtype) == ((6,), torch.bool)
    assert (found.voxels.shape, found.voxels.dtype) == ((6, 5, 3), torch.int64)
    # patches of a scan do not share their noise
    assert not torch.equal(found.noise[0], found.noise[1])


def test_shares() -> None:
    scans = 2000
    found = drawn(batch((2, 2), scans, 1), list(range(scans)), clean_share=0.25, condition_dropout=0.1)
    assert torch.equal(found.clean[::2], found.clean[1::2])
    assert found.clean.float().mean().item() == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / scans))
    assert found.dropped.float().mean().item() == pytest.approx(0.1, abs=4 * np.sqrt(0.1 * 0.9 / (2 * scans)))
    assert not torch.equal(found.dropped[::2], found.dropped[1::2])
    assert found.t.float().mean().item() == pytest.approx(499.5, abs=4 * 1000 / np.sqrt(12 * 2 * scans))
    assert found.noise.mean().item() == pytest.approx(0, abs=4 / np.sqrt(found.noise.numel()))
    assert found.noise.var().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("mode", ["none", "guidance"])
def test_only_a_head_is_shown_clean_patches(mode: str) -> None:
    found = drawn(batch((2, 2), 200), list(range(200)), mode=mode, clean_share=0.9)
    assert not found.clean.any()
    assert found.voxels.shape[1] == (0 if mode == "none" else 5)


def test_patches_of_any_size() -> None:
    """torch.multinomial would take 2^24 places at most."""
    mask = torch.zeros((1, 1, 4097, 4097), dtype=torch.bool)
    mask[..., -1, -3:] = True
    voxels = random_voxels(mask, 50, torch.Generator().manual_seed(0))
    assert set(voxels[0, :, 1].tolist()) == {4096}
    assert set(voxels[0, :, 2].tolist()) == {4094, 4095, 4096}
