"""From refined probabilities back to logits, so that what follows is the segmentor's own way."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def refined_logits(
    logits: Tensor, probability: Tensor, refined: Tensor, margin: float, exclusive: bool, where: Tensor
) -> Tensor:
    """Logits of the refined probabilities where voxels were refined, the segmentor's, bounded, everywhere else.

    Windows and folds are averaged by their logits, so all voxels are on one scale: that of probabilities within
    [margin, 1 - margin], whose log-odds are at most log((1 - margin) / margin), 9.2 of the default margin. The
    segmentor's own go to 20 and 40; unbounded, one window that was not refined, or in which refining changed nothing,
    would outvote all others.

    Where the clamp of the priors is all that changed (no finding), they are the segmentor's logits, bounded to that
    scale (:func:`bounded_logits`). Elsewhere they are those of the refined probabilities, clamped. Of exclusive
    classes logits are defined up to a constant, so log-probabilities may stand beside the segmentor's.

    Args:
        logits: of the segmentor, (B, K, ...).
        probability: theirs, float32.
        refined: float32, what refining made of them.
        margin: of the diffusion's priors.
        exclusive: whether classes exclude each other (softmax) or are regions (sigmoid).
        where: bool (B, 1, ...), the voxels that were refined.

    Returns:
        Of the shape and dtype of `logits`.
    """
    unchanged = probability.clamp(margin, 1 - margin)
    if exclusive:
        unchanged = unchanged / unchanged.sum(1, keepdim=True)
    changed = where & ((refined - unchanged).abs().amax(1, keepdim=True) > margin / 10)
    clamped = refined.clamp(margin, 1 - margin)
    found = clamped.log() if exclusive else clamped.logit()
    return torch.where(changed, found.to(logits.dtype), bounded_logits(logits, margin, exclusive))


def bounded_logits(logits: Tensor, margin: float, exclusive: bool) -> Tensor:
    """The logits, with log-odds of at most log((1 - margin) / margin), of the most probable class to each other one or
    of each region: those within to the last bit, and no voxel's label changes."""
    most = math.log((1 - margin) / margin)
    return logits.maximum(logits.amax(1, keepdim=True) - most) if exclusive else logits.clamp(-most, most)
