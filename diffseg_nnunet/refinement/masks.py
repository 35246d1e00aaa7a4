"""Label maps as the masks that are diffused, and back.

One mask a class, as many as the segmentor has output channels: of labels that exclude each other one-hot *with* the
background (HiDiff: 9 masks for the 8 organs of Synapse), so that the prior is the segmentor's softmax as it is and the
label is the largest channel, as without refinement; of nnU-Net's regions, which overlap, one mask a region, whose prior
is a sigmoid. HiDiff gives binary tasks one mask without background; here they have nnU-Net's two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def masks_of(labels: Tensor, classes: Sequence[int | Sequence[int]]) -> Tensor:
    """The masks of label maps: float32 (B, K, ...) of 0 and 1, from integers (B, 1, ...).

    Args:
        labels: values that no class has, as nnU-Net's ignore label, are in no mask.
        classes: of each mask its label, or the labels that its region is made of.
    """
    members = [[entry] if isinstance(entry, int) else list(entry) for entry in classes]
    masks = [torch.isin(labels, torch.tensor(values, device=labels.device)) for values in members]
    return torch.cat(masks, dim=1).float()


def as_probabilities(log_odds: Tensor, exclusive: bool) -> Tensor:
    """Probabilities, float32 (B, K, ...), of the log-odds of each mask.

    Args:
        exclusive: of classes that exclude each other they sum to 1, to which nothing else brings them: each mask is
            diffused on its own.
    """
    probability = log_odds.float().sigmoid()
    if not exclusive:
        return probability
    return probability / probability.sum(1, keepdim=True).clamp_min(torch.finfo(probability.dtype).tiny)


def labels_of(probability: Tensor, region_values: Sequence[int] | None = None) -> Tensor:
    """The label maps, int64 (B, 1, ...), of probabilities (B, K, ...).

    Args:
        probability: of each mask.
        region_values: None: the index of the largest channel. Else nnU-Net's ``regions_class_order``: the value that
            each region writes where its probability is above 1/2, later ones over earlier ones, on a background of 0.
    """
    if region_values is None:
        return probability.argmax(dim=1, keepdim=True)
    labels = torch.zeros_like(probability[:, :1], dtype=torch.int64)
    for channel, value in enumerate(region_values):
        labels = torch.where(probability[:, channel : channel + 1] > 0.5, value, labels)
    return labels
