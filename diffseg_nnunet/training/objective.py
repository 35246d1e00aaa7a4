"""The pretraining objectives: denoise, and say where each voxel lies (arXiv 2501.19265; methods.md 1.2).

``L = w(t) · || target − f_θ(x_t, t) ||² + λ · L_coordinates``. Every loss is a mean over scans, or over patches, so
that the mean over processes with equal shares is the loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffseg_nnunet.coordinates.guidance import narrow_input
from diffseg_nnunet.coordinates.head import (
    CoordinateHead,
    CoordinateRegressor,
    CoordinateSettings,
    FeatureTap,
    gather_voxels,
)
from diffseg_nnunet.coordinates.loss import (
    consistency_loss,
    displacement_error_mm,
    distance_loss,
    relative_position_loss,
)
from diffseg_nnunet.diffusion.conditioning import TimeConditioning, fold
from diffseg_nnunet.diffusion.gaussian import TIMESTEP_BINS, GaussianDiffusion, masked_mean_square_error
from diffseg_nnunet.training.draws import Draws
from diffseg_nnunet.training.settings import PATCHES_PER_SCAN

Read = Callable[[Tensor], Tensor]
"""From voxels (B, N, 3) of a batch's patches to the coordinates predicted there, (B, N, 3)."""
_LEGIBLE = 0.5  # ᾱ from which on a patch counts for the reported displacement error


@dataclass(frozen=True)
class Denoiser:
    """A network that denoises, and what it is conditioned on.

    Attributes:
        network: the planned network, as many outputs as image channels; with `regressor`, widened by three inputs.
        conditioning: its time conditioning.
        diffusion: the forward process.
        regressor: frozen; gives the coordinate map of a clean patch. None where the network reads the image alone.
        compiled: `network` by torch.compile, to run in its place; None without. The conditioning's hooks are compiled
            along, into one graph for all time steps.
    """

    network: nn.Module
    conditioning: TimeConditioning
    diffusion: GaussianDiffusion
    regressor: nn.Module | None = None
    compiled: nn.Module | None = None

    def __call__(self, noised: Tensor, t: Tensor, coordinate_map: Tensor | None = None) -> Tensor:
        """The prediction at x_t (B, C, ...) and t (B,), of the shape of x_t; no map stands for zeros."""
        if self.regressor is not None:
            if coordinate_map is None:
                coordinate_map = noised.new_zeros((len(noised), 3, *noised.shape[2:]))
            noised = torch.cat([noised, coordinate_map.to(noised)], dim=1)
        with self.conditioning.at(t):
            return (self.network if self.compiled is None else self.compiled)(noised)

    @property
    def uncompiled(self) -> Denoiser:
        """The same, run as it is: batches of another size than the training's would be compiled anew, for minutes."""
        return replace(self, compiled=None)

    def folded(self, t: int) -> dict[str, Tensor]:
        """The weights of the stock network that equals this one at time step `t`, without a map."""
        weights = fold(self.network, self.conditioning, t)
        return weights if self.regressor is None else narrow_input(weights, self.network)

    @torch.no_grad()
    def coordinate_map(self, clean: Tensor) -> Tensor | None:
        """(B, 3, ...) of the clean patches, in units of 300 mm; None without a regressor."""
        return None if self.regressor is None else self.regressor(clean)

    @torch.no_grad()
    def denoised(self, noised: Tensor, t: Tensor, coordinate_map: Tensor | None = None) -> Tensor:
        """The estimate of x_0 from x_t in one step, float32."""
        return self.diffusion.clean(self(noised, t, coordinate_map), noised, t)


@dataclass(frozen=True)
class Terms:
    """The loss of a batch, and what is told of it.

    Attributes:
        loss: scalar, to minimise.
        report: makes scalars to be logged, by name, without gradient; how many entries count depends on the batch.
    """

    loss: Tensor
    report: Callable[[], dict[str, Tensor]]


class DenoisingObjective:
    """Denoising, with or without the coordinate head beside it.

    Args:
        denoiser: to train.
        coordinates: settings.
        head, tap: the coordinate head and the tap on the features it reads; both None where there is no head.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        coordinates: CoordinateSettings,
        head: CoordinateHead | None = None,
        tap: FeatureTap | None = None,
    ):
        self.denoiser, self.coordinates, self.head, self.tap = denoiser, coordinates, head, tap

    def __call__(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """The losses of a batch on its device, scalars: ``loss`` (to minimise), ``denoising`` (mean squared error) and
        ``denoising_1`` … by part of the time steps (NaN where the batch has none), and, with a head, ``coordinates``
        and ``displacement_mm`` (median error over axes of legible patches)."""
        terms = self.terms(batch, draws)
        return {"loss": terms.loss, **terms.report()}

    def terms(self, batch: dict[str, Tensor], draws: Draws) -> Terms:
        """The loss alone, and the other entries on demand."""
        diffusion, data = self.denoiser.diffusion, batch["data"]
        fold_t = torch.full_like(draws.t, diffusion.settings.fold_timestep)
        t = torch.where(draws.clean, fold_t, draws.t)
        noised = diffusion.add_noise(data, draws.noise, t)
        noised = torch.where(_spread(draws.clean, data), data, noised)
        coordinate_map = self.denoiser.coordinate_map(data)
        if coordinate_map is not None:
            coordinate_map = coordinate_map * ~_spread(draws.dropped, data)
        prediction = self.denoiser(noised, t, coordinate_map)
        target = diffusion.target(data, draws.noise, t)
        error = masked_mean_square_error(prediction, target, batch["mask"])
        # clean patches have nothing to denoise; the others stand for them, so that the share changes no rate
        share = ~draws.clean / (1 - self.coordinates.clean_share if self.head is not None else 1.0)
        loss = (diffusion.loss_weight(t) * error * share).mean()

        def denoising() -> dict[str, Tensor]:
            return _by_timestep(error.detach(), diffusion.timestep_bin(t), ~draws.clean)

        if self.head is None:
            return Terms(loss, denoising)
        signal = torch.where(draws.clean, 1.0, diffusion.signal_left(t))
        features = self.tap.take()

        def read(voxels: Tensor) -> Tensor:
            # a 2D patch has one slice on the first axis, which its feature maps lack
            return self.head(features, voxels[..., -(data.ndim - 2) :], data.shape[2:])

        place = _coordinate_terms(self.coordinates, batch, draws.voxels, signal, read)
        return Terms(loss + self.coordinates.weight * place.loss, lambda: denoising() | place.report())


class RegressionObjective:
    """Coordinates from clean patches: the first phase of guidance.

    Args:
        regressor: to train.
        coordinates: settings.
    """

    def __init__(self, regressor: CoordinateRegressor, coordinates: CoordinateSettings):
        self.regressor, self.coordinates = regressor, coordinates

    def __call__(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """The losses of a batch: ``loss``, ``coordinates``, ``displacement_mm``, as for the denoising objective."""
        terms = self.terms(batch, draws)
        return {"loss": terms.loss, **terms.report()}

    def terms(self, batch: dict[str, Tensor], draws: Draws) -> Terms:
        """The loss alone, and the other entries on demand."""
        data = batch["data"]
        features = self.regressor.features(data)
        signal = torch.ones(len(data), device=data.device)

        def read(voxels: Tensor) -> Tensor:
            return self.regressor.head(features, voxels[..., -(data.ndim - 2) :], data.shape[2:])

        return _coordinate_terms(self.coordinates, batch, draws.voxels, signal, read)


def _coordinate_terms(
    settings: CoordinateSettings, batch: dict[str, Tensor], voxels: Tensor, signal: Tensor, read: Read
) -> Terms:
    """The coordinate loss, and the displacement error of legible scans (NaN where there are none)."""
    positions = positions_mm(batch["affine"], voxels)
    predicted = read(voxels)
    weight = signal[:, None] * gather_voxels(batch["mask"].float(), voxels[..., -(batch["mask"].ndim - 2) :])[..., 0]
    loss_function = relative_position_loss if settings.objective == "relative" else distance_loss
    predicted_of, positions_of, weight_of = (by_scan(values) for values in (predicted, positions, weight))
    positions_of = positions_of - positions_of[:, :1]  # float32 differences of large positions would lose decimals
    loss = loss_function(predicted_of, positions_of, weight_of).mean()
    if settings.objective == "distance":
        loss = loss + _consistency(batch, voxels, predicted, signal, read)

    @torch.no_grad()
    def report() -> dict[str, Tensor]:
        legible = (by_scan(signal[:, None]) >= _LEGIBLE).all(dim=1)
        if legible.any():
            error = displacement_error_mm(predicted_of[legible], positions_of[legible]).mean()
        else:
            error = torch.full_like(loss, torch.nan)
        return {"coordinates": loss, "displacement_mm": error}

    return Terms(loss, report)


def _consistency(batch: dict[str, Tensor], voxels: Tensor, predicted: Tensor, signal: Tensor, read: Read) -> Tensor:
    """APE's second term: the first patch's points, where the second patch of the scan has them too."""
    positions = positions_mm(batch["affine"], voxels)
    partner = torch.arange(len(voxels), device=voxels.device) ^ 1
    affine = batch["affine"][partner]
    linear, offset = affine[..., :3], affine[..., 3]
    there = torch.linalg.solve(linear, (positions.to(affine) - offset[:, None]).transpose(1, 2)).transpose(1, 2)
    there = there.round().long()
    spatial = (1,) * (5 - batch["mask"].ndim) + tuple(batch["mask"].shape[2:])
    sizes = torch.tensor(spatial, device=voxels.device)
    within = ((there >= 0) & (there < sizes)).all(dim=-1)
    there = torch.minimum(there.clamp_min(0), sizes - 1)
    inverse = torch.empty_like(there)
    inverse[partner] = there
    other = read(inverse)[partner]
    weight = (within * signal[:, None] * signal[partner][:, None])[::2]
    return consistency_loss(predicted[::2], other[::2], weight).mean()


def _by_timestep(error: Tensor, part: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """Means of the squared errors that count, over all and over each part of the time steps; NaN for none."""
    means = {"denoising": error[counted].mean()}
    for index in range(TIMESTEP_BINS):
        means[f"denoising_{index + 1}"] = error[counted & (part == index)].mean()
    return means


def _spread(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def positions_mm(affine: Tensor, voxels: Tensor) -> Tensor:
    """Positions of voxels in the patient: float64 (B, 3, 4) and int64 (B, N, 3) -> float64 (B, N, 3)."""
    return torch.einsum("bij,bnj->bni", affine[..., :3], voxels.to(affine)) + affine[:, None, :, 3]


def by_scan(values: Tensor) -> Tensor:
    """Join the patches of each scan, which follow each other: (B, N, ...) -> (scans, patches of a scan · N, ...)."""
    scans = len(values) // PATCHES_PER_SCAN
    return values.reshape(scans, PATCHES_PER_SCAN * values.shape[1], *values.shape[2:])
