"""Bernoulli diffusion of masks, centred on a prior: schedule, forward process, posterior, reverse steps.

Chen et al., "HiDiff", IEEE TMI 2024, arXiv 2407.03548; precursor BerDiff, arXiv 2304.04429 (the prior is 1/2 there).
Every class channel of every voxel is a Bernoulli variable of its own: y_0 in {0, 1}, the prior p in [0, 1] is what a
segmentor says, and noise draws the mask towards p, not towards 1/2. MONAI supplies the noise schedules.

Shapes: masks, priors and probabilities (B, K, ...), 2D or 3D; time steps int64 (B,), counted 0..T-1, where y at step
index t has seen t + 1 draws. Everything is computed in float32, also within autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from monai.networks.schedulers.scheduler import NoiseSchedules
from torch import Tensor

from diffseg_nnunet.diffusion.gaussian import DiffusionSettings
from diffseg_nnunet.diffusion.sampling import sampling_timesteps

BernoulliSchedule = Literal["cosine", "linear_beta", "linear_alpha_bar"]
BERNOULLI_SCHEDULES = get_args(BernoulliSchedule)


@dataclass(frozen=True)
class BernoulliSettings:
    """Settings of the Bernoulli diffusion. The tags are those of the methods' specification.

    Attributes:
        timesteps: T. 10 steps in training and in sampling [code].
        schedule: "cosine", squared, β at most 0.999 (arXiv 2102.09672 eq. 17) [default: the paper's is not found];
            "linear_beta", as in :class:`DiffusionSettings`, which never passes 1, whatever T is; or "linear_alpha_bar",
            ᾱ falling evenly to 0.
        prior_margin: priors are clamped to [margin, 1 - margin] [default]: at 0 and 1 the divergence is infinite.
        focal_weight: of the focal loss beside the variational bound [code].
        focal_gamma: γ of the focal loss [code]; 0: cross entropy. Near the last time step the bound says next to
            nothing of y_0, and a focal loss alone is least where a probability is drawn towards 1/2, 0.9 to 0.7
            (arXiv 2011.09172). That makes up for what refiners learn on, cases of which they grow too sure: without
            it their calibration error on others was larger by a fifth to three quarters (benchmarks/RESULTS.md,
            "Refinement (HiDiff): hippocampus").
    """

    timesteps: int = 10
    schedule: BernoulliSchedule = "cosine"
    prior_margin: float = 1e-4
    focal_weight: float = 1.0
    focal_gamma: float = 2.0

    def __post_init__(self) -> None:
        if self.schedule not in BERNOULLI_SCHEDULES:
            raise ValueError(f"{self.schedule} is none of {', '.join(BERNOULLI_SCHEDULES)}")
        if self.timesteps < 2:
            raise ValueError(f"{self.timesteps} time steps are fewer than two")
        if not 0 < self.prior_margin < 0.5:
            raise ValueError(f"prior_margin {self.prior_margin} is not within 0..0.5, both excluded")
        if self.focal_weight < 0:
            raise ValueError(f"focal_weight {self.focal_weight} is negative")
        if self.focal_gamma < 0:
            raise ValueError(f"focal_gamma {self.focal_gamma} is negative")

    def betas(self) -> Tensor:
        """β of every step: float64, shape (T,), each in (0, 1]."""
        if self.schedule == "linear_alpha_bar":
            return 1 / torch.arange(self.timesteps, 0, -1, dtype=torch.float64)
        arguments = DiffusionSettings(self.timesteps, self.schedule, fold_timestep=0).schedule_arguments
        found = NoiseSchedules[self.schedule](self.timesteps, **arguments)
        return (found[0] if isinstance(found, tuple) else found).double()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Step(NamedTuple):
    """The numbers of one step, from index t to the one before: float32, each of shape (B, 1, ...).

    `kept` is ᾱ_t and `lost` 1 - ᾱ_t, the shares of y_0 and of the prior in y_t; `kept_before` and `lost_before` those
    one step earlier (1 and 0 for index 0); `alpha` and `beta` those of the step itself. Of each pair both are kept,
    since one minus the other would lose digits in float32. `first`: bool, index 0, whose step ends at y_0.
    """

    kept: Tensor
    lost: Tensor
    kept_before: Tensor
    lost_before: Tensor
    alpha: Tensor
    beta: Tensor
    first: Tensor


class BernoulliDiffusion:
    """The forward process q and its reversal, for all time steps or for some of them.

    Args:
        settings: of the process.
        timesteps: the kept time steps, rising; None for all. Their ᾱ are a chain of its own (see :meth:`respaced`).
    """

    def __init__(self, settings: BernoulliSettings, timesteps: Sequence[int] | None = None):
        self.settings = settings
        self.timesteps = tuple(range(settings.timesteps)) if timesteps is None else tuple(timesteps)
        kept = torch.cumprod(1 - settings.betas(), dim=0)[list(self.timesteps)]
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        alpha = kept / before
        self._table = torch.stack([kept, 1 - kept, before, 1 - before, alpha, 1 - alpha]).float()

    def respaced(self, steps: int) -> BernoulliDiffusion:
        """The chain of `steps` of the time steps, the last among them (arXiv 2102.09672 §4); indices are 0..steps-1.

        Raises:
            ValueError: `steps` is not within 1..T.
        """
        kept = sampling_timesteps(len(self.timesteps), steps)
        return BernoulliDiffusion(self.settings, [self.timesteps[index] for index in reversed(kept)])

    @property
    def alpha_bar(self) -> Tensor:
        """ᾱ of each step index: float32, shape (steps,); the share of y_0 that is left."""
        return self._table[0]

    def step(self, t: Tensor, dimensions: int) -> Step:
        """The numbers of the steps with indices t, for tensors of so many dimensions."""
        shape = (-1, *(1,) * (dimensions - 1))
        numbers = self._table.to(t.device)[:, t]
        return Step(*(row.reshape(shape) for row in numbers), first=(t == 0).reshape(shape))

    def clamped(self, prior: Tensor) -> Tensor:
        """The prior within [margin, 1 - margin], float32; every method here does this to the priors it is given."""
        margin = self.settings.prior_margin
        return prior.float().clamp(margin, 1 - margin)

    def sample_timesteps(self, count: int, generator: torch.Generator, start_share: float = 0.0) -> Tensor:
        """`count` step indices: int64, shape (count,), on the generator's device.

        Args:
            start_share: of the draws that are the last index, where every reverse process starts; the others are
                uniform over all indices.
        """
        t = torch.randint(0, len(self.timesteps), (count,), generator=generator, device=generator.device)
        if not start_share:
            return t
        starts = torch.rand(count, generator=generator, device=generator.device) < start_share
        return torch.where(starts, len(self.timesteps) - 1, t)

    def marginal(self, clean: Tensor, prior: Tensor, t: Tensor) -> Tensor:
        """P(y_t = 1 | y_0, p) = ᾱ_t y_0 + (1 - ᾱ_t) p (methods.md 3.1)."""
        step = self.step(t, clean.ndim)
        return mixture(clean, self.clamped(prior), step.kept, step.lost)

    def transition(self, before: Tensor, prior: Tensor, t: Tensor) -> Tensor:
        """P(y_t = 1 | y_{t-1}, p) = (1 - β_t) y_{t-1} + β_t p (methods.md 3.1)."""
        step = self.step(t, before.ndim)
        return mixture(before, self.clamped(prior), step.alpha, step.beta)

    def add_noise(self, clean: Tensor, prior: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        """A draw of y_t, float32 of 0 and 1; carries no gradient."""
        return draw(self.marginal(clean, prior, t), generator)

    def start(self, prior: Tensor, generator: torch.Generator) -> Tensor:
        """A draw of y at the last time step, where nothing but the prior is left: Bernoulli(p)."""
        return draw(self.clamped(prior), generator)

    def posterior_log_odds(self, noisy: Tensor, clean: Tensor, prior: Tensor, t: Tensor) -> Tensor:
        """Log-odds of y_{t-1} = 1 given y_t, y_0 and p, by Bayes' rule (methods.md 3.1, th2 / th1).

        The posterior is the transition's likelihood times the marginal one step earlier. With an estimate of y_0 in
        [0, 1] in place of y_0 this is p_θ(y_{t-1} | y_t). At index 0, where the posterior is y_0 itself, the likelihood
        alone: finite, without a gradient to y_0, and to be replaced by the caller.
        """
        step, prior = self.step(t, noisy.ndim), self.clamped(prior)
        return likelihood_log_odds(noisy, prior, step) + evidence_log_odds(clean, prior, step)

    def posterior(self, noisy: Tensor, clean: Tensor, prior: Tensor, t: Tensor) -> Tensor:
        """P(y_{t-1} = 1 | y_t, y_0, p), and y_0 itself at index 0."""
        probability = self.posterior_log_odds(noisy, clean, prior, t).sigmoid()
        return torch.where(self.step(t, noisy.ndim).first, clean.float(), probability)

    def ddim(self, noisy: Tensor, clean: Tensor, t: Tensor) -> Tensor:
        """P(y_{t-1} = 1) of the DDIM step: σ y_t + (ᾱ_{t-1} - σ ᾱ_t) y_0 with σ = (1 - ᾱ_{t-1}) / (1 - ᾱ_t).

        It keeps the marginals of the forward process, and is y_0 itself at index 0 (methods.md 3.1).
        """
        step = self.step(t, noisy.ndim)
        sigma = step.lost_before / step.lost
        return mixture(noisy, clean, sigma, 1 - sigma)


def mixture(mask: Tensor, prior: Tensor, share: Tensor, rest: Tensor) -> Tensor:
    """share · mask + rest · prior: the mean of a mask of which `rest` has been replaced by draws from the prior."""
    return share * mask.float() + rest * prior.float()


def exclusive_or(one: Tensor, other: Tensor) -> Tensor:
    """|a - b|: the flip between two masks; or, of a mask and the probability that it was flipped, the clean mask's."""
    return (one.float() - other.float()).abs()


def draw(probability: Tensor, generator: torch.Generator) -> Tensor:
    """A Bernoulli draw, float32 of 0 and 1, on the generator's device; carries no gradient."""
    return torch.bernoulli(probability.detach(), generator=generator)


def flip_signs(noisy: Tensor) -> Tensor:
    """1 where y_t is 0, -1 where it is 1: times the log-odds of the flip this is the log-odds of y_0, and back."""
    return 1 - 2 * noisy.float()


def clean_log_odds(flip_log_odds: Tensor, noisy: Tensor) -> Tensor:
    """Log-odds of the estimated y_0 = |y_t - ε|, from those of the flip ε that the network predicts (3.1)."""
    return flip_signs(noisy) * flip_log_odds.float()


def likelihood_log_odds(noisy: Tensor, prior: Tensor, step: Step) -> Tensor:
    """log q(y_t | y_{t-1} = 1) - log q(y_t | y_{t-1} = 0)."""
    agreeing = exclusive_or(1 - noisy.float(), prior)  # p where y_t is 1, 1 - p where it is 0
    redrawn = step.beta * agreeing
    return -flip_signs(noisy) * ((step.alpha + redrawn).log() - redrawn.log())


def evidence_log_odds(clean: Tensor, prior: Tensor, step: Step) -> Tensor:
    """Log-odds of y_{t-1} = 1 given y_0 and p; 0 for index 0."""
    # there the odds of a mask are infinite; where() around them would still let NaN into the gradients
    clean = torch.where(step.first, 0.5, clean.float())
    one = mixture(clean, prior, step.kept_before, step.lost_before)
    zero = mixture(1 - clean, 1 - prior, step.kept_before, step.lost_before)
    return one.log() - zero.log()
