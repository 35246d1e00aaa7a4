"""From refined probabilities back to logits, so that what follows is the segmentor's own way."""

from __future__ import annotations

import torch
from torch import Tensor


def refined_logits(
    logits: Tensor, probability: Tensor, refined: Tensor, margin: float, exclusive: bool, where: Tensor
) -> Tensor:
    """The segmentor's logits where refining changed nothing, and elsewhere those of the refined probabilities.

    The diffusion sees priors clamped to [margin, 1 - margin]; that the clamp is all that changed is no finding, and the
    voxel keeps its logits to the last bit. Refined probabilities are clamped likewise. Of exclusive classes logits are
    defined up to a constant, so log-probabilities may stand beside them.

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
    return torch.where(changed, found.to(logits.dtype), logits)
