"""The pretraining objectives: what counts and how much, in one process or several, and that it can be learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn

from diffseg_nnunet.coordinates.guidance import widen_input
from diffseg_nnunet.coordinates.head import (
    CoordinateHead,
    CoordinateRegressor,
    CoordinateSettings,
    FeatureTap,
    gather_voxels,
)
from diffseg_nnunet.coordinates.loss import distance_loss, relative_position_loss
from diffseg_nnunet.coordinates.positions import UNIT_MM
from diffseg_nnunet.diffusion.conditioning import TimeConditioning
from diffseg_nnunet.diffusion.gaussian import TIMESTEP_BINS, DiffusionSettings, GaussianDiffusion
from diffseg_nnunet.training.draws import Draws, draw
from diffseg_nnunet.training.objective import (
    Denoiser,
    DenoisingObjective,
    RegressionObjective,
    by_scan,
    positions_mm,
)

MODES = ("none", "auxiliary", "guidance")
BY_TIMESTEP = {f"denoising_{index + 1}" for index in range(TIMESTEP_BINS)}


def unet(dimensions: int, inputs: int = 1, outputs: int = 1) -> nn.Module:
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dimensions == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    shape = (inputs, 2, (8, 12), conv, 3, (1, 2), 1, outputs, 1)
    return PlainConvUNet(*shape, conv_bias=True, norm_op=norm, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU)


@dataclass(frozen=True)
class Parts:
    """An objective and what it is made of."""

    objective: DenoisingObjective
    coordinates: CoordinateSettings

    @property
    def denoiser(self) -> Denoiser:
        return self.objective.denoiser

    @property
    def trained(self) -> nn.ModuleDict:
        modules = {"network": self.denoiser.network, "conditioning": self.denoiser.conditioning}
        return nn.ModuleDict(modules | ({"head": self.objective.head} if self.objective.head else {}))

    def draws(self, batch: dict[str, Tensor], seed: int = 0) -> Draws:
        generators = [torch.Generator().manual_seed(1000 * seed + int(scan)) for scan in batch["scan"].unique()]
        return draw(batch, self.denoiser.diffusion, self.coordinates, generators)

    def __call__(self, batch: dict[str, Tensor], draws: Draws | None = None) -> dict[str, Tensor]:
        return self.objective(batch, draws or self.draws(batch))


def parts(dimensions: int = 3, diffusion: DiffusionSettings | None = None, **coordinates: Any) -> Parts:
    torch.manual_seed(0)
    chosen = CoordinateSettings(**{"points_per_patch": 16, **coordinates})
    network, regressor = unet(dimensions), None
    if chosen.mode == "guidance":
        regressor = CoordinateRegressor(unet(dimensions, outputs=3))
        widen_input(network)
    conditioning = TimeConditioning(network)
    for projection in conditioning.projections:  # as if trained: time says something
        nn.init.normal_(projection.weight, 0, 0.2)
    denoiser = Denoiser(network, conditioning, GaussianDiffusion(diffusion or DiffusionSettings()), regressor)
    if chosen.mode != "auxiliary":
        return Parts(DenoisingObjective(denoiser, chosen), chosen)
    objective = DenoisingObjective(
        denoiser, chosen, CoordinateHead([12, 8]), FeatureTap([network.encoder.stages[-1], *network.decoder.stages])
    )
    return Parts(objective, chosen)


def batch(dimensions: int = 3, count: int = 4) -> dict[str, Tensor]:
    """Pairs of patches whose brightness grows along the body, so that place can be seen."""
    spatial = (8, 8) if dimensions == 2 else (8, 8, 8)
    ramp = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in spatial), indexing="ij")).mean(dim=0)
    affine = torch.cat([14 * torch.eye(3).double(), torch.zeros(3, 1).double()], dim=1).expand(count, -1, -1).clone()
    affine[:, :, 3] = torch.arange(count).double()[:, None] * 20 + 300
    return {
        "data": torch.stack([ramp + 0.2 * index for index in range(count)])[:, None],
        "mask": torch.ones(count, 1, *spatial, dtype=torch.bool),
        "scan": torch.arange(count) // 2,
        "affine": affine,
    }


def part_of(batch: dict[str, Tensor], draws: Draws, patches: slice) -> tuple[dict[str, Tensor], Draws]:
    own = {name: values[patches] for name, values in batch.items()}
    return own, Draws(*(getattr(draws, field.name)[patches] for field in fields(Draws)))


def gradients_of(modules: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in modules.parameters() if p.grad is not None])


@pytest.mark.parametrize("scans", [1, 2, 3])
def test_patches_are_joined_by_scan(scans: int) -> None:
    values = torch.arange(2 * scans)[:, None, None] * 100 + torch.arange(5)[None, :, None] + torch.zeros(1, 1, 3)
    expected = torch.stack([torch.cat([values[2 * scan], values[2 * scan + 1]]) for scan in range(scans)])
    assert torch.equal(by_scan(values), expected)
    assert torch.equal(by_scan(values[..., 0]), expected[..., 0])


# -- what is learned from ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_what_is_trained(dimensions: int, mode: str) -> None:
    built = parts(dimensions, mode=mode, clean_share=0.0)
    losses = built(batch(dimensions))
    place = {"coordinates", "displacement_mm"} if mode == "auxiliary" else set()
    assert set(losses) == {"loss", "denoising"} | BY_TIMESTEP | place
    assert all(value.ndim == 0 for value in losses.values())
    losses["loss"].backward()
    for name, module in built.trained.items():
        for path, parameter in module.named_parameters():
            # a bias before an instance norm has no effect, hence no gradient worth the name
            assert parameter.grad is not None, f"{name}.{path}"
        assert gradients_of(module).abs().max() > 0, name
    if mode == "guidance":
        assert all(parameter.grad is None for parameter in built.denoiser.regressor.parameters())


@pytest.mark.parametrize("weight", [0.25, 1.0])
@pytest.mark.parametrize("loss_weighting", ["uniform", "min_snr"])
def test_loss_is_the_weighted_sum(weight: float, loss_weighting: str) -> None:
    """Without clean patches: the mean of w(t)·error over patches, computed here by hand, and the coordinates' share."""
    diffusion = DiffusionSettings(loss_weighting=loss_weighting)
    built, pairs = parts(diffusion=diffusion, weight=weight, clean_share=0.0), batch()
    draws = built.draws(pairs)
    losses = built(pairs, draws)
    process = built.denoiser.diffusion
    left = process.alpha_bar[draws.t].reshape(-1, 1, 1, 1, 1)
    noised = left.sqrt() * pairs["data"] + (1 - left).sqrt() * draws.noise
    with built.denoiser.conditioning.at(draws.t):
        errors = (built.denoiser.network(noised) - draws.noise).square().flatten(1).mean(1)
    snr = (left / (1 - left)).flatten()
    weights = snr.clamp_max(5) / snr if loss_weighting == "min_snr" else torch.ones(4)
    assert losses["denoising"].item() == pytest.approx(errors.mean().item(), rel=1e-4)
    expected = (weights * errors).mean() + weight * losses["coordinates"]
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_coordinate_loss_is_that_of_the_heads_answers() -> None:
    built, pairs = parts(clean_share=0.0), batch()
    draws = built.draws(pairs)
    answers = answers_of(built, built.denoiser.diffusion.add_noise(pairs["data"], draws.noise, draws.t), draws)
    weight = built.denoiser.diffusion.alpha_bar[draws.t].repeat_interleave(16).reshape(2, 32)
    expected = relative_position_loss(answers, positions_mm(pairs["affine"], draws.voxels).reshape(2, 32, 3), weight)
    assert built(pairs, draws)["coordinates"].item() == pytest.approx(expected.mean().item(), rel=1e-4)


def answers_of(built: Parts, patches: Tensor, draws: Draws) -> Tensor:
    """Where the head sees the drawn voxels, asked for one by one: (scans, points, 3)."""
    built.denoiser(patches, draws.t)
    features = built.objective.tap.take()
    told = built.objective.head.dense(features, patches.shape[2:])
    found = [told[(b, ..., *v)] for b in range(len(patches)) for v in draws.voxels[b].tolist()]
    return torch.stack(found).reshape(len(patches) // 2, -1, 3)


def test_errors_are_reported_by_time_step() -> None:
    built, pairs = parts(mode="none"), batch()
    draws = replace(built.draws(pairs), t=torch.tensor([10, 150, 450, 999]))
    losses = built(pairs, draws)
    alone = []
    for index in range(4):
        own, drawn = part_of(pairs, draws, slice(index, index + 1))
        alone.append(built(own, drawn)["denoising"].item())
    expected = [np.mean(alone[:2]), math.nan, alone[2], math.nan, alone[3]]
    found = [losses[f"denoising_{index + 1}"].item() for index in range(TIMESTEP_BINS)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("mode", ["none", "guidance"])
def test_without_a_head_no_position_is_needed(mode: str) -> None:
    built = parts(mode=mode)
    without = {name: values for name, values in batch().items() if name != "affine"}
    losses = built(without)
    assert losses["loss"].item() == pytest.approx(losses["denoising"].item())


# -- guidance ---------------------------------------------------------------------------------------------------------


def test_the_denoiser_reads_the_map_of_the_clean_patch() -> None:
    built, pairs = parts(mode="guidance"), batch()
    draws = built.draws(pairs)
    process = built.denoiser.diffusion
    for dropped in (torch.zeros(4, dtype=torch.bool), torch.tensor([True, False, False, True])):
        found = built(pairs, replace(draws, dropped=dropped))["denoising"]
        coordinate_map = built.denoiser.regressor(pairs["data"]) * ~dropped.reshape(4, 1, 1, 1, 1)
        noised = process.add_noise(pairs["data"], draws.noise, draws.t)
        with built.denoiser.conditioning.at(draws.t):
            prediction = built.denoiser.network(torch.cat([noised, coordinate_map], dim=1))
        assert found.item() == pytest.approx((prediction - draws.noise).square().mean().item(), rel=1e-4)


@torch.no_grad()
def test_no_map_stands_for_zeros() -> None:
    built, pairs = parts(mode="guidance"), batch()
    t = torch.full((4,), 300)
    zeros = torch.zeros(4, 3, 8, 8, 8)
    assert torch.equal(built.denoiser(pairs["data"], t), built.denoiser(pairs["data"], t, zeros))
    assert not torch.equal(built.denoiser(pairs["data"], t), built.denoiser(pairs["data"], t, zeros + 1))
    assert parts().denoiser.coordinate_map(pairs["data"]) is None


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("objective", ["relative", "distance"])
def test_regressor_learns_place(dimensions: int, objective: str) -> None:
    settings = CoordinateSettings(mode="guidance", points_per_patch=32, objective=objective)
    built, pairs = parts(dimensions, mode="guidance", points_per_patch=32), batch(dimensions)
    torch.manual_seed(0)
    regressor = CoordinateRegressor(unet(dimensions, outputs=3))
    regression = RegressionObjective(regressor, settings)
    losses = regression(pairs, built.draws(pairs))
    assert set(losses) == {"loss", "coordinates", "displacement_mm"}
    assert torch.equal(losses["loss"], losses["coordinates"])
    optimizer, course = torch.optim.Adam(regressor.parameters(), 1e-2), []
    for step in range(40):
        optimizer.zero_grad()
        losses = regression(pairs, built.draws(pairs, step))
        losses["loss"].backward()
        optimizer.step()
        course.append(losses["loss"].item())
    assert np.mean(course[-5:]) < 0.5 * np.mean(course[:5])
    if objective == "relative":
        assert losses["displacement_mm"] < 0.1 * UNIT_MM


# -- what counts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [2, 3])
def test_padding_does_not_count(dimensions: int) -> None:
    """The target of padded voxels is noise as well, but their error is left out; nor are they asked for a place."""
    built, padded = parts(dimensions, clean_share=0.0), batch(dimensions)
    padded["mask"][1, :, :, :6] = False
    draws = built.draws(padded)
    assert (draws.voxels[1, :, 4 - dimensions] >= (6 if dimensions == 2 else 0)).all()
    noised = built.denoiser.diffusion.add_noise(padded["data"], draws.noise, draws.t)
    with built.denoiser.conditioning.at(draws.t):
        squared = (built.denoiser.network(noised) - draws.noise).square()
    expected = torch.stack([error[mask].mean() for error, mask in zip(squared, padded["mask"], strict=True)]).mean()
    assert built(padded, draws)["denoising"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert squared.mean().item() != pytest.approx(expected.item(), rel=1e-3)


def test_a_patch_outside_its_scan_teaches_no_place() -> None:
    built, outside = parts(clean_share=0.0), batch()
    outside["mask"][1] = False
    draws = built.draws(outside)
    elsewhere = {name: values.clone() for name, values in outside.items()}
    elsewhere["affine"][1] *= 50
    one, other = (built(b, draws)["coordinates"] for b in (outside, elsewhere))
    torch.testing.assert_close(one, other)


def test_points_count_with_the_signal_that_is_left() -> None:
    """Of two time steps one leaves half of the signal and the other next to nothing: there, no place can be told."""
    noisy = DiffusionSettings(timesteps=2, schedule="cosine", fold_timestep=0)
    built = parts(diffusion=noisy, points_per_patch=64, clean_share=0.0)
    left = built.denoiser.diffusion.alpha_bar
    assert left[0] > 0.4
    assert left[1] < 1e-3
    draws = replace(built.draws(batch(count=2)), t=torch.tensor([0, 1]))
    losses = []
    for patch in (None, 0, 1):
        pair = batch(count=2)
        if patch is not None:
            pair["affine"][patch, :, :3] *= 30
        losses.append(built(pair, draws)["coordinates"].item())
    usual, clear_patch_misplaced, noise_misplaced = losses
    assert clear_patch_misplaced > 10 * usual
    assert noise_misplaced < 1.5 * usual


def test_clean_scans_do_not_enter_the_denoising_loss() -> None:
    built, pairs = parts(clean_share=0.25, weight=0.5), batch()
    draws = replace(built.draws(pairs), clean=torch.tensor([False, False, True, True]))
    losses = built(pairs, draws)
    denoised = built(*part_of(pairs, replace(draws, clean=torch.zeros(4, dtype=torch.bool)), slice(0, 2)))
    for name in ("denoising", *BY_TIMESTEP):
        torch.testing.assert_close(losses[name], denoised[name], equal_nan=True)
    # on average a quarter is clean, and the other three quarters stand for it
    expected = denoised["denoising"].item() * 2 / 4 / 0.75 + 0.5 * losses["coordinates"].item()
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_clean_scans_are_read_without_noise_at_the_fold_time_step() -> None:
    built, pairs = parts(), batch()
    clean = replace(built.draws(pairs), clean=torch.ones(4, dtype=torch.bool))
    losses = built(pairs, clean)
    other = replace(clean, noise=torch.randn_like(clean.noise), t=(clean.t + 77) % 1000)
    again = built(pairs, other)
    for name in ("loss", "coordinates", "displacement_mm"):
        assert torch.equal(losses[name], again[name])
    assert torch.isnan(losses["denoising"])
    assert losses["loss"].item() == pytest.approx(losses["coordinates"].item())
    # all their points count in full
    fold_t = torch.full((4,), built.denoiser.diffusion.settings.fold_timestep)
    answers = answers_of(built, pairs["data"], replace(clean, t=fold_t))
    expected = relative_position_loss(answers, positions_mm(pairs["affine"], clean.voxels).reshape(2, 32, 3))
    assert losses["coordinates"].item() == pytest.approx(expected.mean().item(), rel=1e-4)


def test_displacement_is_told_of_legible_scans_only() -> None:
    built, pairs = parts(clean_share=0.0), batch()
    draws = built.draws(pairs)
    for t, legible in (([0, 0, 999, 0], slice(0, 2)), ([0, 0, 0, 0], slice(0, 4))):
        shown = replace(draws, t=torch.tensor(t))
        found, expected = built(pairs, shown), built(*part_of(pairs, shown, legible))
        torch.testing.assert_close(found["displacement_mm"], expected["displacement_mm"], rtol=1e-4, atol=1e-4)
    none = built(pairs, replace(draws, t=torch.full((4,), 999)))
    assert torch.isnan(none["displacement_mm"])
    assert torch.isfinite(none["loss"])


def test_origin_of_the_scanner_does_not_matter() -> None:
    for objective in ("relative", "distance"):
        built, moved = parts(objective=objective), batch()
        moved["affine"][2:, :, 3] -= 1e5
        draws = built.draws(moved)
        before, after = (built(b, draws)["coordinates"].item() for b in (batch(), moved))
        assert after == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_draws_give_the_same_loss(mode: str) -> None:
    built, pairs = parts(mode=mode), batch()
    one, same, other = (built(pairs, built.draws(pairs, seed))["loss"].item() for seed in (1, 1, 2))
    assert one == same != other


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", ["relative", "distance"])
@pytest.mark.parametrize("loss_weighting", ["uniform", "min_snr"])
def test_loss_of_a_batch_is_the_mean_over_its_shares(mode: str, objective: str, loss_weighting: str) -> None:
    """Whatever is clean, padded or dropped in either share: losses and gradients are those of the whole batch."""
    diffusion = DiffusionSettings(loss_weighting=loss_weighting)
    built, pairs = parts(diffusion=diffusion, mode=mode, objective=objective), batch(count=8)
    pairs["mask"][1, :, :5] = False
    draws = built.draws(pairs)
    if mode == "auxiliary":
        draws = replace(draws, clean=torch.tensor([True] * 4 + [False] * 2 + [True] * 2))
    built(pairs, draws)["loss"].backward()
    whole, expected = gradients_of(built.trained), built(pairs, draws)["loss"].item()
    built.trained.zero_grad()
    halves = []
    for half in (slice(0, 4), slice(4, 8)):
        loss = built(*part_of(pairs, draws, half))["loss"]
        (loss / 2).backward()
        halves.append(loss.item())
    assert np.mean(halves) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(gradients_of(built.trained), whole, rtol=1e-3, atol=1e-5)


def test_loss_of_the_regressor_is_the_mean_over_shares() -> None:
    built, pairs = parts(mode="guidance"), batch(count=8)
    draws = built.draws(pairs)
    for kind in ("relative", "distance"):
        settings = replace(built.coordinates, objective=kind)
        objective = RegressionObjective(built.denoiser.regressor, settings)
        whole, *halves = (
            objective(*part_of(pairs, draws, share))["loss"].item() for share in (slice(8), slice(4), slice(4, 8))
        )
        assert np.mean(halves) == pytest.approx(whole, rel=1e-4)


# -- distances --------------------------------------------------------------------------------------------------------


class Told(nn.Module):
    """A regressor that says of each voxel what it is told: a map of its own for each patch."""

    def __init__(self, dense: Tensor):
        super().__init__()
        self.dense = nn.Parameter(dense)

    def features(self, patches: Tensor) -> list[Tensor]:
        return [self.dense]

    def head(self, features: list[Tensor], voxels: Tensor, shape: Sequence[int]) -> Tensor:
        return gather_voxels(features[0], voxels)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_consistency_of_overlapping_patches(dimensions: int) -> None:
    """Two patches of a scan, shifted by whole voxels: each shared voxel is compared with itself."""
    pair = batch(dimensions, count=2)
    shift = torch.tensor([0, 2, 3] if dimensions == 2 else [1, 2, 3])
    pair["affine"][1, :, 3] = pair["affine"][0, :, 3] + 14.0 * shift
    spatial = pair["data"].shape[2:]
    dense = torch.randn((2, 3, *spatial), generator=torch.Generator().manual_seed(0))
    settings = CoordinateSettings(mode="guidance", objective="distance", points_per_patch=40)
    built = parts(dimensions, mode="guidance", points_per_patch=40)
    draws = built.draws(pair)
    losses = RegressionObjective(Told(dense), settings)(pair, draws)

    def said(patch: int, voxel: Tensor) -> Tensor:
        return dense[(patch, slice(None), *voxel[-dimensions:].tolist())]

    answers = torch.stack([torch.stack([said(b, v) for v in draws.voxels[b]]) for b in range(2)]).reshape(1, 80, 3)
    distances = distance_loss(answers, positions_mm(pair["affine"], draws.voxels).reshape(1, 80, 3)).item()
    sizes = torch.tensor((1,) * (3 - dimensions) + tuple(spatial))
    shared = []
    for voxel in draws.voxels[0]:
        there = voxel - shift
        if ((there >= 0) & (there < sizes)).all():
            shared.append((said(0, voxel) - said(1, there)).square().mean().item())
    assert len(shared) > 5
    assert losses["loss"].item() == pytest.approx(distances + np.mean(shared), rel=1e-3)


def test_consistent_answers_cost_nothing_more() -> None:
    """Where both patches say the same of a place, and it is right up to a turn, nothing is left to learn."""
    pair = batch(count=2)
    pair["affine"][1, :, 3] = pair["affine"][0, :, 3] + 28.0
    voxels = torch.stack(torch.meshgrid(*[torch.arange(8)] * 3, indexing="ij"), dim=-1).reshape(1, -1, 3)
    positions = positions_mm(pair["affine"], voxels.expand(2, -1, -1)) - 300
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, -1]], dtype=torch.float64)
    dense = (positions @ turn / UNIT_MM).transpose(1, 2).reshape(2, 3, 8, 8, 8).float()
    built = parts(mode="guidance", points_per_patch=40)
    settings = replace(built.coordinates, objective="distance")
    assert RegressionObjective(Told(dense), settings)(pair, built.draws(pair))["loss"] < 1e-6
    relative = replace(settings, objective="relative")
    assert RegressionObjective(Told(dense), relative)(pair, built.draws(pair))["loss"] > 0.05


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_one_batch_can_be_learned(dimensions: int, mode: str) -> None:
    built, pairs = parts(dimensions, mode=mode, points_per_patch=32), batch(dimensions)
    draws = replace(built.draws(pairs), clean=torch.zeros(4, dtype=torch.bool))
    optimizer, course = torch.optim.Adam(built.trained.parameters(), 1e-2), []
    for _ in range(50):
        optimizer.zero_grad()
        losses = built(pairs, draws)
        losses["loss"].backward()
        optimizer.step()
        course.append({name: value.item() for name, value in losses.items()})
    learned = ("denoising", "coordinates") if mode == "auxiliary" else ("denoising",)
    for name in learned:
        assert course[-1][name] < 0.6 * course[0][name], name
