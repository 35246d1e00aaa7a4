"""The two half-steps of HiDiff's alternate-collaborative training, as pure functions (methods.md 3.5).

Every batch trains both: first the refiner on what the segmentor says, then the segmentor on what the refiner makes of
it. Each half-step has gradients for exactly one of the two. The draws are each half-step's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffseg_nnunet.diffusion.bernoulli import BernoulliDiffusion, clean_log_odds
from diffseg_nnunet.diffusion.bernoulli_loss import diffusion_loss

SEGMENTOR_WEIGHT = 0.1
"""Of the diffusion loss beside the segmentor's own [default: the paper's is not found, the released script's is 0]."""

OverlapLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""From the log-odds of an estimate of y_0 and y_0 itself, (B, K, ...), and the voxels that count, (B, 1, ...) or None
for all, to a scalar."""


def refiner_loss(
    network: nn.Module,
    diffusion: BernoulliDiffusion,
    clean: Tensor,
    prior: Tensor,
    features: Sequence[Tensor],
    image: Tensor,
    generator: torch.Generator,
    valid: Tensor | None = None,
    start_share: float = 0.0,
    overlap: OverlapLoss | None = None,
) -> Tensor:
    """First half-step: the diffusion loss of the refiner, in bits; no gradient reaches the segmentor.

    Args:
        network: the refiner.
        diffusion: the process.
        clean: masks of the labels, (B, K, ...), of 0 and 1.
        prior, features: of the segmentor; detached here.
        image: (B, C, ...).
        generator: of the time steps and of the noise, on the masks' device.
        valid: bool (B, 1, ...), the voxels that count (padding and ignored labels do not); None for all. Where nothing
            is known, y_t is a draw from the prior, as it is in prediction.
        start_share: of the time steps that are the last one (:meth:`~.bernoulli.BernoulliDiffusion.sample_timesteps`).
        overlap: a loss that is added for what the estimate of y_0 has in common with y_0; None: nothing is.
    """
    features = [feature.detach() for feature in features]
    return _expected_loss(
        network, diffusion, clean, prior.detach(), features, image, generator, valid, start_share, overlap
    )


def segmentor_loss(
    network: nn.Module,
    diffusion: BernoulliDiffusion,
    clean: Tensor,
    prior: Tensor,
    features: Sequence[Tensor],
    image: Tensor,
    generator: torch.Generator,
    valid: Tensor | None = None,
    weight: float = SEGMENTOR_WEIGHT,
) -> Tensor:
    """Second half-step: what the segmentor's loss gains, ``weight`` · the diffusion loss; none reaches the refiner.

    Gradients pass through the prior (in the posteriors, and as the network reads it) and through the features; the
    drawn y_t carries none. Arguments as of :func:`refiner_loss`, of which `network` must be the refiner itself, not a
    distributed wrapper around it.
    """
    fixed = {name: parameter.detach() for name, parameter in network.named_parameters()}

    def refiner(*inputs: Tensor | Sequence[Tensor]) -> Tensor:
        return torch.func.functional_call(network, fixed, inputs)

    return weight * _expected_loss(refiner, diffusion, clean, prior, features, image, generator, valid)


def _expected_loss(
    network, diffusion, clean, prior, features, image, generator, valid, start_share=0.0, overlap=None
) -> Tensor:
    """One draw of the time step and of the noise for each sample; the network runs once."""
    t = diffusion.sample_timesteps(len(clean), generator, start_share)
    # an unknown y_0 is in no mask, which no y_0 is: y_t would show where nothing was annotated. With p in its place,
    # as its expectation, y_t is Bernoulli(p) at every t
    known = clean if valid is None else torch.where(valid, clean, diffusion.clamped(prior))
    noisy = diffusion.add_noise(known, prior, t, generator)
    flip_log_odds = network(noisy, t, prior, image, features)

    def of_class(*masks: Tensor) -> Tensor:
        return diffusion_loss(diffusion, *masks, t, valid).mean()

    # the loss keeps a score of tensors as large as the masks: class by class, and made again for the backward pass,
    # they take little beside the network's
    parts = zip(*(tensor.split(1, dim=1) for tensor in (flip_log_odds, noisy, clean, prior)), strict=True)
    loss = torch.stack(
        [checkpoint(of_class, *masks, use_reentrant=False, preserve_rng_state=False) for masks in parts]
    ).mean()
    return loss if overlap is None else loss + overlap(clean_log_odds(flip_log_odds, noisy), clean, valid)
