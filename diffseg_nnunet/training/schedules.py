"""How long to train and at which rate: iterations split into epochs, warm-up followed by poly or cosine decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

NNUNET_ITERATIONS_PER_EPOCH = 250
NNUNET_ITERATIONS = 250 * 1000
_SHORT_RUN_EPOCHS = 20
_VALIDATION_SHARE = 5  # nnU-Net: 50 validation iterations for 250 training iterations


@dataclass(frozen=True)
class EpochPlan:
    """A training length in nnU-Net's words; `iterations` = epochs × iterations_per_epoch."""

    epochs: int
    iterations_per_epoch: int
    validation_iterations: int

    @property
    def iterations(self) -> int:
        return self.epochs * self.iterations_per_epoch


def split_iterations(iterations: int) -> EpochPlan:
    """Split a number of iterations into epochs of at most nnU-Net's 250.

    Short runs get about 20 epochs (11 to 20, or one per iteration), since checkpoints and learning rate follow epochs.
    The length is rounded up to whole epochs, by less than one iteration per epoch.

    Raises:
        ValueError: less than one iteration.
    """
    if iterations < 1:
        raise ValueError(f"a training needs at least 1 iteration, not {iterations}")
    epochs = max(min(_SHORT_RUN_EPOCHS, iterations), math.ceil(iterations / NNUNET_ITERATIONS_PER_EPOCH))
    per_epoch = math.ceil(iterations / epochs)
    epochs = math.ceil(iterations / per_epoch)
    return EpochPlan(epochs, per_epoch, max(1, per_epoch // _VALIDATION_SHARE))


def warmup_poly(step: int, total: int, warmup: int, exponent: float = 0.9) -> float:
    """Factor on the initial rate: linear over `warmup` steps, then nnU-Net's (1 - progress)^0.9."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 - (step - warmup) / max(1, total - warmup)) ** exponent


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """Factor on the initial rate: linear over `warmup` steps, then half a cosine to 0 (arXiv 1608.03983)."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
