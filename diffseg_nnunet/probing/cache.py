"""Features of patches that come again: a frozen network says the same of them every time."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor

Pyramid = list[Tensor]


class FeatureCache:
    """The features of each patch, computed once and kept in the host's memory, found again by the patch's content.

    Patches are computed one at a time, so that what is computed does not depend on what is there already, and a resumed
    training goes on as it would have. When the cache is full, what is not in it is computed every time: patches are
    drawn at random, so none is worth more than another.

    Args:
        limit_bytes: of all features together.
    """

    def __init__(self, limit_bytes: float):
        self._left = limit_bytes
        self._known: dict[bytes, Pyramid] = {}

    def __len__(self) -> int:
        return len(self._known)

    @torch.compiler.disable
    def of(self, images: Tensor, compute: Callable[[Tensor], Pyramid]) -> Pyramid:
        """Features of a batch.

        Args:
            images: (B, C, ...).
            compute: the features (1, C_i, ...) of one image (1, C, ...), coarse to fine.

        Returns:
            (B, C_i, ...), coarse to fine, on the images' device.
        """
        pyramids = [self._of_one(image[None], compute) for image in images]
        return [torch.cat(scale) for scale in zip(*pyramids, strict=True)]

    def _of_one(self, image: Tensor, compute: Callable[[Tensor], Pyramid]) -> Pyramid:
        key = blake2b(image.cpu().contiguous().numpy().tobytes(), digest_size=16).digest()
        known = self._known.get(key)
        if known is not None:
            return [features.to(image.device) for features in known]
        pyramid = compute(image)
        size = sum(features.numel() * features.element_size() for features in pyramid)
        if size <= self._left:
            self._left -= size
            self._known[key] = [features.cpu() for features in pyramid]
        return pyramid
