"""Refining: from the segmentor's probabilities to better ones, and how sure of them one may be.

y_T is drawn from the prior, the network says which voxels are flipped, and T steps lead to its estimate of y_0
(methods.md 3.5, "Inference"). Several samples are averaged, and where they disagree the entropy says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diffseg_nnunet.diffusion.bernoulli import BernoulliDiffusion, clean_log_odds, draw
from diffseg_nnunet.refinement.masks import as_probabilities

BernoulliSampler = Literal["ddim", "ancestral"]
BERNOULLI_SAMPLERS = get_args(BernoulliSampler)
AT_ONCE = 4
"""Samples of a batch that are refined in one pass. Without gradients they take less than a training step of two; and on
CPUs torch convolves single small volumes by a path several times as slow as that of batches."""
PredictFlip = Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[Tensor]], Tensor]
"""From y_t, t, prior, image and features to the log-odds of the flip: a :class:`~.network.Refiner`."""


class NotFiniteError(ValueError):
    """The prior, or what the network makes of it, is not finite."""


@dataclass(frozen=True)
class Refined:
    """What refining gave.

    Attributes:
        probability: float32 (B, K, ...), mean over the samples; of classes that exclude each other it sums to 1.
        entropy: float32 (B, 1, ...), of that mean, in bits (see :func:`entropy_bits`).
        share: float32 (B,), the share of the voxels that were refined; all others are the prior.
    """

    probability: Tensor
    entropy: Tensor
    share: Tensor


def entropy_bits(probability: Tensor, exclusive: bool) -> Tensor:
    """Entropy of every voxel in bits: (B, K, ...) -> float32 (B, 1, ...).

    Args:
        probability: of each class; exclusive ones sum to 1.
        exclusive: of one variable with K values, 0..log2 K; else, of regions, the mean of K variables with two, 0..1.
    """
    probability = probability.float()
    bits = _surprise(probability)
    if exclusive:
        return bits.sum(1, keepdim=True)
    return (bits + _surprise(1 - probability)).mean(1, keepdim=True)


def _surprise(probability: Tensor) -> Tensor:
    """-p log2 p, 0 at p = 0."""
    return -torch.xlogy(probability, probability) / math.log(2)


@torch.no_grad()
def refine(
    prior: Tensor,
    features: Sequence[Tensor],
    image: Tensor,
    network: PredictFlip,
    diffusion: BernoulliDiffusion,
    steps: int,
    samples: int,
    generator: torch.Generator,
    *,
    sampler: BernoulliSampler = "ddim",
    exclusive: bool = True,
    threshold_bits: float | None = None,
) -> Refined:
    """Refine the masks of a batch of patches.

    Args:
        prior: the segmentor's probabilities, (B, K, ...).
        features: its feature maps, as the network wants them.
        image: what it was given, (B, C, ...).
        network: in evaluation mode.
        diffusion: the process it was trained with.
        steps: from 1 to the diffusion's T; the network runs once a step and AT_ONCE samples.
        samples: how many masks are drawn and averaged, up to AT_ONCE in one pass; at least 1.
        generator: of all draws, on the prior's device. Equal seeds give equal results.
        sampler: "ddim" or "ancestral".
        exclusive: whether classes exclude each other (softmax) or are regions (sigmoid).
        threshold_bits: only voxels are refined whose prior has a larger entropy than this; all others keep the prior to
            the last bit, and a batch without any such voxel is returned without running the network. None: all.

    Raises:
        ValueError: steps, samples or sampler are none there can be.
        NotFiniteError: the prior or what the network says is not finite: told before anything is drawn, which on a GPU
            would end the process's use of it.
    """
    if samples < 1:
        raise ValueError(f"{samples} samples are fewer than one")
    if sampler not in BERNOULLI_SAMPLERS:
        raise ValueError(f"{sampler} is none of {', '.join(BERNOULLI_SAMPLERS)}")
    chain, prior = diffusion.respaced(steps), prior.float()
    _require_finite(prior, "the prior")
    refined = uncertain_voxels(prior, exclusive, threshold_bits)
    probability = prior
    if refined.any():
        total = torch.zeros_like(prior)
        for first in range(0, samples, AT_ONCE):
            count = min(AT_ONCE, samples - first)
            repeated = (_repeated(given, count) for given in (prior, image))
            drawn = _sample(*repeated, [_repeated(f, count) for f in features], network, chain, generator, sampler)
            total += as_probabilities(drawn, exclusive).unflatten(0, (count, -1)).sum(0)
        probability = torch.where(refined, total / samples, prior)
    return Refined(probability, entropy_bits(probability, exclusive), refined.flatten(1).float().mean(1))


def _require_finite(values: Tensor, what: str) -> None:
    if not values.isfinite().all():
        raise NotFiniteError(f"{what} is not finite in {int((~values.isfinite()).any(1).sum())} voxels")


def uncertain_voxels(prior: Tensor, exclusive: bool, threshold_bits: float | None) -> Tensor:
    """Where the prior's entropy is above the threshold; everywhere if it is None: bool (B, 1, ...)."""
    if threshold_bits is None:
        return torch.ones_like(prior[:, :1], dtype=torch.bool)
    return entropy_bits(prior, exclusive) > threshold_bits


def _repeated(given: Tensor, count: int) -> Tensor:
    """(B, ...) -> (count · B, ...)."""
    return given.repeat(count, *(1,) * (given.ndim - 1))


def _sample(
    prior: Tensor,
    image: Tensor,
    features: Sequence[Tensor],
    network: PredictFlip,
    chain: BernoulliDiffusion,
    generator: torch.Generator,
    sampler: BernoulliSampler,
) -> Tensor:
    """The log-odds of one sample's estimate of y_0, (B, K, ...)."""
    noisy = chain.start(prior, generator)
    for index in range(len(chain.timesteps) - 1, -1, -1):
        t = torch.full((len(prior),), chain.timesteps[index], dtype=torch.int64, device=prior.device)
        log_odds = clean_log_odds(network(noisy, t, prior, image, features), noisy)
        clean = log_odds.sigmoid()
        _require_finite(clean, "the refiner's estimate")
        if index:
            at = torch.full_like(t, index)
            before = chain.ddim(noisy, clean, at) if sampler == "ddim" else chain.posterior(noisy, clean, prior, at)
            noisy = draw(before, generator)
    return log_odds
