"""Settings of the two training stages, one dataclass each, stored as JSON beside what they produced."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from diffseg_nnunet.coordinates.head import CoordinateSettings
from diffseg_nnunet.diffusion.gaussian import DiffusionSettings
from diffseg_nnunet.training.precision import Precision
from diffseg_nnunet.training.schedules import NNUNET_ITERATIONS, EpochPlan, split_iterations

PATCHES_PER_SCAN = 2
"""Patches of one scan in a pretraining batch; pairs let the coordinate loss reach across patches."""

Strategy = Literal["finetune", "scratch"]
OptimizerName = Literal["sgd", "adamw"]


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of the segmentation training.

    Attributes:
        iterations: training length; nnU-Net's 250 × 1000 by default.
        seed: of every generator.
        optimizer: "sgd", nnU-Net's (Nesterov momentum 0.99), or "adamw", which learns much faster when training is
            short.
        initial_lr: None takes the optimizer's and the strategy's.
        warmup_share: share of the epochs with linearly rising rate (50 of 1000 in nnU-Net's pretrained trainers).
        precision: of forward passes on the CPU; on CUDA nnU-Net's own autocast is kept.
        workers: augmentation processes; None sizes them to the cgroup's cores.
    """

    iterations: int = NNUNET_ITERATIONS
    seed: int = 0
    optimizer: OptimizerName = "sgd"
    initial_lr: float | None = None
    warmup_share: float = 0.05
    precision: Precision = "auto"
    workers: int | None = None

    @property
    def epochs(self) -> EpochPlan:
        return split_iterations(self.iterations)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PretrainingSettings(TrainingSettings):
    """Settings of the diffusion pretraining. [default] values of ours unless a source is named.

    Attributes:
        weight_decay: of AdamW.
        ema_decay: final decay of the moving average that is folded and fine-tuned.
        gradient_clip: largest norm of the gradient.
        diffusion, coordinates: the two tasks.
    """

    optimizer: OptimizerName = "adamw"
    initial_lr: float | None = 1e-3
    weight_decay: float = 1e-2
    ema_decay: float = 0.999
    gradient_clip: float = 1.0
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    coordinates: CoordinateSettings = field(default_factory=CoordinateSettings)

    @classmethod
    def from_plan(cls, section: dict[str, Any], **changes: Any) -> PretrainingSettings:
        """The settings the plan's ``diffseg`` section states, with `changes` on top."""
        planned = cls(
            diffusion=DiffusionSettings(**section["diffusion"]),
            coordinates=CoordinateSettings(**section["coordinates"]),
        )
        return replace(planned, **changes)
