"""What is drawn at random for a batch of pretraining, one stream a scan.

Each scan of the global batch has a generator of its own, so a batch is the same however its scans are shared among
processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from diffseg_nnunet.coordinates.head import CoordinateSettings
from diffseg_nnunet.diffusion.gaussian import GaussianDiffusion


@dataclass(frozen=True)
class Draws:
    """Random numbers of B patches, two or more of each scan.

    Attributes:
        noise: float32 (B, C, ...), standard normal.
        t: int64 (B,), time steps.
        clean: bool (B,), the patches shown without noise, the same for all patches of a scan.
        voxels: int64 (B, N, 3), voxels to ask for coordinates, inside the scan (0 on the first axis in 2D).
        dropped: bool (B,), the patches that are denoised without their coordinate map.
    """

    noise: Tensor
    t: Tensor
    clean: Tensor
    voxels: Tensor
    dropped: Tensor


def draw(
    batch: dict[str, Tensor],
    diffusion: GaussianDiffusion,
    coordinates: CoordinateSettings,
    generators: Sequence[torch.Generator],
) -> Draws:
    """Draw for a batch of :class:`~diffseg_nnunet.trainers.loaders.PatchPairLoader`.

    Args:
        generators: one for each scan, in the order of the batch, on its device.
    """
    per_scan = len(batch["data"]) // len(generators)
    parts = []
    for index, generator in enumerate(generators):
        own = slice(index * per_scan, (index + 1) * per_scan)
        parts.append(_draw_scan(batch["data"][own], batch["mask"][own], diffusion, coordinates, generator))
    return Draws(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Draws)))


def _draw_scan(
    data: Tensor,
    mask: Tensor,
    diffusion: GaussianDiffusion,
    coordinates: CoordinateSettings,
    generator: torch.Generator,
) -> Draws:
    count, device = len(data), data.device
    noise = torch.randn(data.shape, generator=generator, device=device)
    t = diffusion.sample_timesteps(count, generator)
    share = coordinates.clean_share if coordinates.mode == "auxiliary" else 0.0
    clean = (torch.rand(1, generator=generator, device=device) < share).expand(count)
    dropped = torch.rand(count, generator=generator, device=device) < coordinates.condition_dropout
    points = coordinates.points_per_patch if coordinates.mode != "none" else 0
    return Draws(noise, t, clean, random_voxels(mask, points, generator), dropped)


def random_voxels(mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` voxels from each patch, uniform over its mask: int64 (B, count, 3), from bool (B, 1, ...).

    In 2D the first of the three numbers is 0.
    """
    spatial = mask.shape[2:]
    voxels = torch.zeros((len(mask), count, 3), dtype=torch.int64, device=mask.device)
    if not count:
        return voxels
    index = torch.stack([_random_places(each, count, generator) for each in mask.flatten(1)])
    for axis in range(len(spatial) - 1, -1, -1):
        voxels[..., axis - len(spatial)] = index % spatial[axis]
        index = index // spatial[axis]
    return voxels


def _random_places(mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices of a flat mask that are True; of all, in a patch that lies outside its scan altogether.

    Exact for any size: torch.multinomial takes 2^24 places at most.
    """
    inside = mask.nonzero()[:, 0]
    if not len(inside):
        inside = torch.arange(len(mask), device=mask.device)
    return inside[torch.randint(len(inside), (count,), generator=generator, device=mask.device)]
