"""The pretraining objective: which voxels count, which points are drawn, and that all of it can be learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffseg_nnunet.coordinates.head import CoordinateHead, CoordinateSettings, FeatureTap
from diffseg_nnunet.coordinates.positions import UNIT_MM
from diffseg_nnunet.diffusion.conditioning import TimeConditioning
from diffseg_nnunet.diffusion.gaussian import DiffusionSettings, GaussianDiffusion
from diffseg_nnunet.training.objective import PretrainingObjective, by_scan, inside_mask, random_voxels

PATCH = (8, 6, 10)


@st.composite
def bounds(draw: st.DrawFn) -> Tensor:
    """First and one past the last voxel inside the scan, for each axis of some patches of shape PATCH."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        first = [draw(st.integers(0, size - 1)) for size in PATCH]
        rows.append([[low, draw(st.integers(low + 1, size))] for low, size in zip(first, PATCH, strict=True)])
    return torch.tensor(rows)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(inside=bounds())
@settings(max_examples=30, deadline=None)
def test_inside_mask(inside: Tensor) -> None:
    expected = np.zeros((len(inside), 1, *PATCH), dtype=bool)
    for sample, ((z0, z1), (y0, y1), (x0, x1)) in enumerate(inside.tolist()):
        expected[sample, 0, z0:z1, y0:y1, x0:x1] = True
    np.testing.assert_array_equal(inside_mask(inside, torch.Size(PATCH)).numpy(), expected)


def test_inside_mask_of_a_slice() -> None:
    inside = torch.tensor([[[0, 1], [2, 5], [0, 4]]])
    expected = np.zeros((1, 1, 6, 7), dtype=bool)
    expected[0, 0, 2:5, 0:4] = True
    np.testing.assert_array_equal(inside_mask(inside, torch.Size((6, 7))).numpy(), expected)


@given(inside=bounds(), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_random_voxels_lie_inside(inside: Tensor, seed: int) -> None:
    voxels = random_voxels(inside, 50, generator(seed))
    assert voxels.shape == (len(inside), 50, 3)
    assert voxels.dtype == torch.int64
    assert (voxels >= inside[:, None, :, 0]).all()
    assert (voxels < inside[:, None, :, 1]).all()
    assert torch.equal(voxels, random_voxels(inside, 50, generator(seed)))


def test_random_voxels_are_uniform() -> None:
    voxels = random_voxels(torch.tensor([[[0, 1], [2, 6], [0, 10]]]), 20_000, generator())[0]
    for axis, (low, high) in enumerate([(0, 1), (2, 6), (0, 10)]):
        counts = torch.bincount(voxels[:, axis], minlength=high)[low:].double()
        assert len(counts) == high - low
        assert (counts / counts.sum() * len(counts) - 1).abs().max() < 0.1


@pytest.mark.parametrize(
    ("scan", "joined"),
    [([0, 0, 1, 1], [[0, 1], [2, 3]]), ([0, 0, 1], [[0, 1]]), ([0, 0], [[0, 1]]), ([0], [[0]]), ([4, 4], [[0, 1]])],
)
def test_patches_are_joined_by_scan(scan: list[int], joined: list[list[int]]) -> None:
    values = torch.arange(len(scan))[:, None, None] * 100 + torch.arange(5)[None, :, None] + torch.zeros(1, 1, 3)
    expected = torch.stack([torch.cat([values[patch] for patch in patches]) for patches in joined])
    assert torch.equal(by_scan(values, torch.tensor(scan)), expected)
    assert torch.equal(by_scan(values[..., 0], torch.tensor(scan)), expected[..., 0])


def modules(
    dimensions: int, coordinates: CoordinateSettings, diffusion: DiffusionSettings
) -> tuple[nn.ModuleDict, PretrainingObjective]:
    torch.manual_seed(0)
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dimensions == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    shape = (1, 2, (8, 12), conv, 3, (1, 2), 1, 1, 1)
    network = PlainConvUNet(*shape, conv_bias=True, norm_op=norm, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU)
    parts = nn.ModuleDict({"network": network, "conditioning": TimeConditioning(network)})
    tap = None
    if coordinates.mode == "auxiliary":
        parts["head"], tap = CoordinateHead(8), FeatureTap(network.decoder.stages[-1])
    head = parts["head"] if tap else None
    objective = PretrainingObjective(
        network, parts["conditioning"], GaussianDiffusion(diffusion), coordinates, head, tap
    )
    return parts, objective


def batch(dimensions: int, count: int = 4) -> dict[str, Tensor]:
    """Pairs of patches whose brightness grows along the body, so that place can be seen."""
    spatial = (8, 8) if dimensions == 2 else (8, 8, 8)
    ramp = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in spatial), indexing="ij")).mean(dim=0)
    patches = torch.stack([ramp + 0.2 * index for index in range(count)])[:, None]
    affine = torch.cat([14 * torch.eye(3).double(), torch.zeros(3, 1).double()], dim=1).expand(count, -1, -1).clone()
    affine[:, :, 3] = torch.arange(count).double()[:, None] * 20 + 300
    patch = (1, 8, 8) if dimensions == 2 else spatial
    return {
        "data": patches,
        "inside": torch.tensor([[[0, n] for n in patch]] * count),
        "scan": torch.arange(count) // 2,
        "affine": affine,
    }


@pytest.mark.parametrize("dimensions", [2, 3])
def test_gradients_reach_every_module(dimensions: int) -> None:
    parts, objective = modules(dimensions, CoordinateSettings(points_per_patch=16), DiffusionSettings())
    losses = objective(batch(dimensions), generator())
    assert set(losses) == {"loss", "denoising", "coordinates", "displacement_mm"}
    assert all(value.ndim == 0 and torch.isfinite(value) for value in losses.values())
    losses["loss"].backward()
    for name, module in parts.items():
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        assert any(gradient.abs().max() > 0 for gradient in gradients), name
    used = {name for name, parameter in parts["network"].named_parameters() if parameter.grad is not None}
    assert any("encoder" in name for name in used)
    assert any("seg_layers" in name for name in used)


def test_loss_is_the_weighted_sum() -> None:
    _, objective = modules(3, CoordinateSettings(weight=0.25, points_per_patch=16), DiffusionSettings())
    losses = objective(batch(3), generator())
    assert losses["loss"].item() == pytest.approx(losses["denoising"].item() + 0.25 * losses["coordinates"].item())


def test_without_coordinates_no_position_is_needed() -> None:
    parts, objective = modules(3, CoordinateSettings(mode="none"), DiffusionSettings())
    without = {key: value for key, value in batch(3).items() if key != "affine"}
    losses = objective(without, generator())
    assert set(losses) == {"loss", "denoising"}
    assert torch.equal(losses["loss"], losses["denoising"])
    assert set(parts) == {"network", "conditioning"}


@pytest.mark.parametrize("count", [1, 3])
def test_batches_with_a_lonely_patch(count: int) -> None:
    _, objective = modules(3, CoordinateSettings(points_per_patch=8), DiffusionSettings())
    assert torch.isfinite(objective(batch(3, count), generator())["loss"])


def test_padding_does_not_count() -> None:
    """The target of padded voxels is noise as well, but their error is left out."""
    _, objective = modules(3, CoordinateSettings(mode="none"), DiffusionSettings(prediction="sample"))
    padded = batch(3)
    padded["inside"][:, 0] = torch.tensor([3, 8])
    before = objective(padded, generator())["denoising"]
    noise = torch.randn(padded["data"].shape, generator=generator())
    t = objective.diffusion.sample_timesteps(4, _after_noise(padded["data"].shape))
    with objective.conditioning.at(t):
        prediction = objective.network(objective.diffusion.add_noise(padded["data"], noise, t))
    expected = (prediction - padded["data"])[:, :, 3:].square().mean()
    assert before.item() == pytest.approx(expected.item(), rel=1e-5)


def _after_noise(shape: torch.Size) -> torch.Generator:
    drawn = generator()
    torch.randn(shape, generator=drawn)
    return drawn


def test_points_count_with_the_signal_that_is_left() -> None:
    """Of two time steps one leaves half of the signal and the other next to nothing: there, no place can be told."""
    noisy = DiffusionSettings(timesteps=2, schedule="cosine", fold_timestep=0)
    _, objective = modules(3, CoordinateSettings(points_per_patch=64), noisy)
    left = objective.diffusion.alpha_bar
    assert left[0] > 0.4
    assert left[1] < 1e-3
    seed = next(seed for seed in range(99) if _timesteps(objective, seed) == [0, 1])
    losses = []
    for patch in (None, 0, 1):
        pair = batch(3, 2)
        if patch is not None:
            pair["affine"][patch, :, :3] *= 30
        losses.append(objective(pair, generator(seed))["coordinates"].item())
    usual, clear_patch_misplaced, noise_misplaced = losses
    assert clear_patch_misplaced > 10 * usual
    assert noise_misplaced < 1.5 * usual


def _timesteps(objective: PretrainingObjective, seed: int) -> list[int]:
    drawn = generator(seed)
    torch.randn(batch(3, 2)["data"].shape, generator=drawn)
    return objective.diffusion.sample_timesteps(2, drawn).tolist()


def test_the_same_generator_gives_the_same_loss() -> None:
    _, objective = modules(3, CoordinateSettings(points_per_patch=16), DiffusionSettings())
    one, same, other = (objective(batch(3), generator(seed))["loss"].item() for seed in (1, 1, 2))
    assert one == same != other


def test_origin_of_the_scanner_does_not_matter() -> None:
    _, objective = modules(3, CoordinateSettings(points_per_patch=16), DiffusionSettings())
    moved = batch(3)
    moved["affine"][2:, :, 3] -= 1e5
    before, after = (objective(b, generator())["coordinates"].item() for b in (batch(3), moved))
    assert after == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_one_batch_can_be_learned(dimensions: int) -> None:
    parts, objective = modules(dimensions, CoordinateSettings(points_per_patch=32), DiffusionSettings())
    optimizer = torch.optim.Adam(parts.parameters(), 1e-2)
    course = []
    for _ in range(80):
        optimizer.zero_grad()
        losses = objective(batch(dimensions), generator())
        losses["loss"].backward()
        optimizer.step()
        course.append({name: value.item() for name, value in losses.items()})
    for name in ("denoising", "coordinates", "displacement_mm"):
        assert course[-1][name] < 0.6 * course[0][name], name
    assert course[-1]["displacement_mm"] < 0.1 * UNIT_MM
