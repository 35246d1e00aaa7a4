"""The pretraining objective: denoise, and say where each voxel lies (arXiv 2501.19265; methods.md 1.2, variant AUX).

``L = || target − f_θ(x_t, t) ||² + λ · L_coordinates``. The head reads the features of the *noised* patch, so a point
counts with ᾱ_t, the signal that is left: at high noise nobody could know the place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffseg_nnunet.coordinates.head import CoordinateHead, CoordinateSettings, FeatureTap, gather_voxels
from diffseg_nnunet.coordinates.loss import displacement_error_mm, relative_position_loss
from diffseg_nnunet.diffusion.conditioning import TimeConditioning
from diffseg_nnunet.diffusion.gaussian import GaussianDiffusion, masked_mean_square_error


class PretrainingObjective:
    """Computes the losses of one batch of :class:`~diffseg_nnunet.trainers.loaders.PatchPairLoader`.

    Args:
        network: the planned network, outputs as many channels as it reads.
        conditioning: its time conditioning.
        diffusion: the forward process.
        coordinates: settings of the coordinate loss.
        head, tap: the coordinate head and the tap on the decoder's last stage; both None without coordinates.
    """

    def __init__(
        self,
        network: nn.Module,
        conditioning: TimeConditioning,
        diffusion: GaussianDiffusion,
        coordinates: CoordinateSettings,
        head: CoordinateHead | None,
        tap: FeatureTap | None,
    ):
        self.network, self.conditioning, self.diffusion = network, conditioning, diffusion
        self.coordinates, self.head, self.tap = coordinates, head, tap

    def __call__(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The losses of a batch on its device, scalars: ``loss`` (to minimise), ``denoising`` (mean squared error),
        and, with coordinates, ``coordinates`` (units of 300 mm) and ``displacement_mm`` (median error over axes)."""
        clean, inside = batch["data"], batch["inside"]
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        t = self.diffusion.sample_timesteps(len(clean), generator)
        with self.conditioning.at(t):
            prediction = self.network(self.diffusion.add_noise(clean, noise, t))
        mask = inside_mask(inside, clean.shape[2:])
        denoising = masked_mean_square_error(prediction, self.diffusion.target(clean, noise, t), mask)
        if self.head is None:
            return {"loss": denoising, "denoising": denoising}
        coordinate, error = self._coordinate_loss(batch, self.diffusion.signal_left(t), generator)
        return {
            "loss": denoising + self.coordinates.weight * coordinate,
            "denoising": denoising,
            "coordinates": coordinate,
            "displacement_mm": error,
        }

    def _coordinate_loss(
        self, batch: dict[str, Tensor], signal_left: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        features = self.tap.take()
        voxels = random_voxels(batch["inside"], self.coordinates.points_per_patch, generator)
        affine = batch["affine"]
        positions = torch.einsum("bij,bnj->bni", affine[..., :3], voxels.to(affine)) + affine[:, None, :, 3]
        # a 2D patch has one slice on the first axis, which the feature map lacks
        predicted = self.head(gather_voxels(features, voxels[..., -(features.ndim - 2) :]))
        weight = signal_left[:, None].expand(voxels.shape[:2])
        predicted, positions, weight = (by_scan(v, batch["scan"]) for v in (predicted, positions, weight))
        loss = relative_position_loss(predicted, positions - positions[:, :1], weight)
        with torch.no_grad():
            error = displacement_error_mm(predicted, positions - positions[:, :1]).mean()
        return loss, error


def inside_mask(inside: Tensor, spatial: torch.Size) -> Tensor:
    """Bool mask (B, 1, *spatial), True inside the scan, from the bounds (B, 3, 2) of each patch."""
    bounds = inside[:, -len(spatial) :]
    mask = torch.ones((len(inside), 1, *spatial), dtype=torch.bool, device=inside.device)
    for axis, size in enumerate(spatial):
        index = torch.arange(size, device=inside.device)
        kept = (index >= bounds[:, axis, :1]) & (index < bounds[:, axis, 1:])
        mask &= kept.reshape(len(inside), 1, *(size if a == axis else 1 for a in range(len(spatial))))
    return mask


def random_voxels(inside: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` voxels inside the scan from each patch, uniform: int64 (B, count, 3), from bounds (B, 3, 2)."""
    lower, size = inside[:, None, :, 0], (inside[:, None, :, 1] - inside[:, None, :, 0]).clamp_min(1)
    share = torch.rand((len(inside), count, 3), generator=generator, device=inside.device)
    return lower + torch.minimum((share * size).long(), size - 1)


def by_scan(values: Tensor, scan: Tensor) -> Tensor:
    """Join the patches of each scan: (B, N, ...) -> (scans, patches per scan · N, ...).

    `scan` (B,) numbers them 0, 0, 1, 1, …; a last patch without partner is left out.
    """
    per_scan = int((scan == scan[0]).sum())
    complete = len(scan) // per_scan * per_scan
    return values[:complete].reshape(complete // per_scan, per_scan * values.shape[1], *values.shape[2:])
