"""Features are computed once for each patch, and are the same as if they were computed every time."""

from __future__ import annotations

import torch
from torch import Tensor

from diffseg_nnunet.probing.cache import FeatureCache


class Counted:
    """A pyramid of two scales, which counts the images it was made of."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, image: Tensor) -> list[Tensor]:
        self.images += len(image)
        return [image[..., ::2, ::2].mean(1, keepdim=True), image * 2]


def test_every_patch_is_computed_once() -> None:
    cache, compute = FeatureCache(1e9), Counted()
    images = torch.randn(4, 2, 6, 4)
    for batch in (images[:2], images[1:3], images.flip(0)):
        for found, expected in zip(cache.of(batch, compute), Counted()(batch), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert compute.images == len(cache) == 4


def test_a_full_cache_computes_what_it_does_not_hold() -> None:
    one = sum(features.numel() * features.element_size() for features in Counted()(torch.randn(1, 2, 6, 4)))
    cache, compute = FeatureCache(2.5 * one), Counted()
    images = torch.randn(3, 2, 6, 4)
    for _ in range(3):
        torch.testing.assert_close(cache.of(images, compute)[1], images * 2, rtol=0, atol=0)
    assert len(cache) == 2
    assert compute.images == 3 + 1 + 1


def test_what_is_kept_is_not_what_was_handed_out() -> None:
    cache, compute = FeatureCache(1e9), Counted()
    image = torch.randn(1, 2, 6, 4)
    before = cache.of(image, compute)[0].clone()
    cache.of(image, compute)[0].zero_()
    torch.testing.assert_close(cache.of(image, compute)[0], before, rtol=0, atol=0)
