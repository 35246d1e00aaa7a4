"""Priors of training cases, made as unsure as those of new cases are [default]. Knows no nnU-Net.

A segmentor is surer, and more often right, on the cases it was trained on, and a refiner that sees only such priors
learns to copy them. So while the refiner learns, the segmentor is shown a worse view of the image, and its logits are
softened; the refiner itself reads the image as it is. All draws are the generator's, sample by sample, on its device:
the libraries' transforms draw from numpy or from the process-wide state, which a resumed run would not find again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_LEAST_GAMMA, _MOST_GAMMA = 0.5, 2.0
_MOST_NOISE = 0.5
_COARSEST = 4.0
_MOST_BOXES, _LARGEST_BOX = 3, 0.4
_HOTTEST = 8.0
_FIELD_STRIDE, _FIELD_DEVIATION = 16, 1.0


def chosen_samples(count: int, share: float, generator: torch.Generator) -> Tensor:
    """Which samples of a batch are degraded, each with probability `share`: bool (count,)."""
    return torch.rand(count, generator=generator, device=generator.device) < share


def degraded_view(image: Tensor, generator: torch.Generator) -> Tensor:
    """A worse view of each image of a batch, (B, C, ...): of the four ways below each with probability 1/2."""
    ways = torch.rand((len(image), 7), generator=generator, device=generator.device).tolist()
    return torch.stack([_worse(one, drawn, generator) for one, drawn in zip(image, ways, strict=True)])


def _worse(image: Tensor, drawn: list[float], generator: torch.Generator) -> Tensor:
    bends, blurs, hides, shakes, exponent, factor, level = drawn
    if bends < 0.5:
        image = with_gamma(image, _LEAST_GAMMA * (_MOST_GAMMA / _LEAST_GAMMA) ** exponent)
    if blurs < 0.5:
        image = at_low_resolution(image, 1 + (_COARSEST - 1) * factor)
    if hides < 0.5:
        image = with_cut_outs(image, generator)
    if shakes < 0.5:
        noise = torch.randn(image.shape, generator=generator, device=image.device, dtype=image.dtype)
        image = image + level * _MOST_NOISE * _per_channel(image.flatten(1).std(1), image) * noise
    return image


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def with_gamma(image: Tensor, exponent: float) -> Tensor:
    """Intensities of each channel, (C, ...), bent within their range: the least, the largest and their order stay."""
    flat = image.flatten(1)
    low, high = (_per_channel(values, image) for values in (flat.amin(1), flat.amax(1)))
    span = (high - low).clamp_min(torch.finfo(image.dtype).tiny)
    return low + span * ((image - low) / span).clamp(0, 1) ** exponent


def at_low_resolution(image: Tensor, factor: float) -> Tensor:
    """(C, ...) as if scanned with voxels `factor` times as large: means over them, interpolated linearly."""
    shape = image.shape[1:]
    coarse = functional.interpolate(image[None], [max(1, round(size / factor)) for size in shape], mode="area")
    return functional.interpolate(coarse, shape, mode="bilinear" if len(shape) == 2 else "trilinear")[0]


def with_cut_outs(image: Tensor, generator: torch.Generator) -> Tensor:
    """(C, ...) with one to three boxes, each axis of them at most 0.4 of the image's, at its channels' means."""
    shape = image.shape[1:]
    drawn = torch.rand((1 + _MOST_BOXES, 2, len(shape)), generator=generator, device=generator.device).tolist()
    hidden = torch.zeros(shape, dtype=torch.bool, device=image.device)
    for places, sizes in drawn[1 : 2 + int(drawn[0][0][0] * _MOST_BOXES)]:
        box = []
        for size, place, share in zip(shape, places, sizes, strict=True):
            length = max(1, int(size * _LARGEST_BOX * share))
            start = int(place * (size - length + 1))
            box.append(slice(start, start + length))
        hidden[tuple(box)] = True
    return torch.where(hidden, _per_channel(image.flatten(1).mean(1), image), image)


def softened(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Logits (B, K, ...) of a less sure segmentor: by a temperature, log-uniform in 1..8 and each sample's own, and
    with a field of errors that spread over about 16 voxels, of deviation 1 at its nodes; float32."""
    heat = _HOTTEST ** torch.rand(len(logits), generator=generator, device=generator.device)
    return logits.float() / _per_channel(heat, logits) + coarse_field(logits.shape, generator)


def coarse_field(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A smooth random field (B, K, ...), float32: normal at nodes up to 16 voxels apart, linear between them."""
    nodes = [1 + math.ceil((size - 1) / _FIELD_STRIDE) for size in shape[2:]]
    drawn = torch.randn((*shape[:2], *nodes), generator=generator, device=generator.device)
    mode = "bilinear" if len(nodes) == 2 else "trilinear"
    return _FIELD_DEVIATION * functional.interpolate(drawn, shape[2:], mode=mode, align_corners=True)
