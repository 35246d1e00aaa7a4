"""The loss of a Bernoulli denoiser: variational bound plus focal loss, in bits (methods.md 3.4; arXiv 2407.03548).

All of it is computed from log-odds, so nothing is infinite and no constant has to be added within a logarithm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from diffseg_nnunet.diffusion.bernoulli import (
    BernoulliDiffusion,
    clean_log_odds,
    evidence_log_odds,
    exclusive_or,
    likelihood_log_odds,
)

_LN2 = math.log(2)


def bernoulli_kl(log_odds: Tensor, other_log_odds: Tensor) -> Tensor:
    """KL(Bernoulli(a) || Bernoulli(b)) in nats from the log-odds of a and b, elementwise: same shape, at least 0."""
    log_odds, other_log_odds = log_odds.float(), other_log_odds.float()
    divergence = (
        functional.softplus(other_log_odds)
        - functional.softplus(log_odds)
        - log_odds.sigmoid() * (other_log_odds - log_odds)
    )
    return divergence.clamp_min(0)  # rounding alone takes it below


def focal_loss(flip_log_odds: Tensor, flip: Tensor, gamma: float) -> Tensor:
    """(1 - pt)^γ · BCE with pt = exp(-BCE), in nats, elementwise (arXiv 1708.02002, no α); γ = 0 is BCE."""
    entropy = functional.binary_cross_entropy_with_logits(flip_log_odds.float(), flip.float(), reduction="none")
    return (-torch.expm1(-entropy)).pow(gamma) * entropy if gamma else entropy


def variational_bound(
    diffusion: BernoulliDiffusion, flip_log_odds: Tensor, noisy: Tensor, clean: Tensor, prior: Tensor, t: Tensor
) -> Tensor:
    """One term of the variational bound, in nats, elementwise: float32 (B, K, ...).

    KL(q(y_{t-1} | y_t, y_0, p) || p_θ(y_{t-1} | y_t, p)), and at index 0 -log p_θ(y_0 | y_1), which is the binary
    cross entropy of the flip.
    """
    step, prior = diffusion.step(t, noisy.ndim), diffusion.clamped(prior)
    estimate = clean_log_odds(flip_log_odds, noisy).sigmoid()
    likelihood = likelihood_log_odds(noisy, prior, step)
    divergence = bernoulli_kl(
        likelihood + evidence_log_odds(clean, prior, step), likelihood + evidence_log_odds(estimate, prior, step)
    )
    entropy = functional.binary_cross_entropy_with_logits(
        flip_log_odds.float(), exclusive_or(noisy, clean), reduction="none"
    )
    return torch.where(step.first, entropy, divergence)


def diffusion_loss(
    diffusion: BernoulliDiffusion,
    flip_log_odds: Tensor,
    noisy: Tensor,
    clean: Tensor,
    prior: Tensor,
    t: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """L = L_vb + focal_weight · L_focal of each sample, in bits per class channel and voxel: float32, shape (B,).

    Args:
        diffusion: the process.
        flip_log_odds: what the network predicts at y_t, (B, K, ...).
        noisy, clean, prior: y_t, y_0 and p, (B, K, ...). Gradients reach the prior, too.
        t: step indices, (B,).
        valid: bool (B, 1, ...), the voxels that count; None for all. A sample without any has loss 0.
    """
    bits = variational_bound(diffusion, flip_log_odds, noisy, clean, prior, t)
    settings = diffusion.settings
    focal = focal_loss(flip_log_odds, exclusive_or(noisy, clean), settings.focal_gamma)
    bits = bits + settings.focal_weight * focal
    if valid is None:
        return bits.flatten(1).mean(1) / _LN2
    count = valid.flatten(1).sum(1) * bits.shape[1]
    return (bits * valid).flatten(1).sum(1) / count.clamp_min(1) / _LN2
