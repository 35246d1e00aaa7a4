"""Settings of the two training stages, one dataclass each, stored as JSON beside what they produced."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

from diffseg_nnunet.coordinates.head import CoordinateSettings
from diffseg_nnunet.diffusion.gaussian import DiffusionSettings
from diffseg_nnunet.probing.settings import ProbeSettings
from diffseg_nnunet.training.precision import Precision
from diffseg_nnunet.training.schedules import NNUNET_ITERATIONS, EpochPlan, split_iterations

PATCHES_PER_SCAN = 2
"""Patches of one scan in a pretraining batch; pairs let the coordinate loss reach across patches."""

Strategy = Literal["finetune", "scratch", "decoder", "linear", "nonlinear", "pixel-ensemble"]
"""What is trained of the planned network, and from what; each is a registered trainer."""
Transfer = Literal["all", "encoder"]
TRANSFERS = get_args(Transfer)
Pool = Literal["unlabeled", "training", "all"]
POOLS = get_args(Pool)
OptimizerName = Literal["sgd", "adamw"]
INITIAL_LR: dict[tuple[OptimizerName, Strategy], float] = {
    ("sgd", "scratch"): 1e-2,  # nnU-Net
    ("sgd", "finetune"): 1e-3,  # nnU-Net's own trainers of pretrained networks
    ("sgd", "decoder"): 1e-3,
    ("sgd", "linear"): 1e-2,  # a head starts from random weights
    ("sgd", "nonlinear"): 1e-2,
    ("sgd", "pixel-ensemble"): 1e-2,
    ("adamw", "scratch"): 2e-3,
    ("adamw", "finetune"): 2e-3,
    ("adamw", "decoder"): 2e-3,
    ("adamw", "linear"): 5e-2,  # heads alone, chosen on training cases
    ("adamw", "nonlinear"): 3e-2,
    ("adamw", "pixel-ensemble"): 1e-3,  # Baranchuk et al.
}
"""Of an optimizer and a strategy, where the settings give none."""
PROBED_SHARES = (0.05, 0.15, 0.25)
"""Of the diffusion's time steps, those that a probe reads at: 50, 150 and 250 of 1000 as Baranchuk et al. (arXiv
2112.03126); of clean images the best on training cases (benchmarks/RESULTS.md, "What a probe should read")."""


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
        precision: of forward passes on the CPU. On CUDA training keeps nnU-Net's own autocast, and pretraining takes
            bfloat16 where the GPU has it, else float32.
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

    def rate(self, strategy: Strategy) -> float:
        """The initial learning rate."""
        return INITIAL_LR[self.optimizer, strategy] if self.initial_lr is None else self.initial_lr

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SegmentationSettings(TrainingSettings):
    """Settings of a training of the planned network, whole or in part: of the twin from scratch, and of fine-tuning.

    Attributes:
        keep_coordinates: weight of the relative-position loss beside nnU-Net's (1 beside the denoising loss in
            pretraining); 0: there is none.
    """

    keep_coordinates: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.keep_coordinates < math.inf:
            raise ValueError(f"keep_coordinates {self.keep_coordinates} is no weight from 0")


@dataclass(frozen=True)
class FinetuningSettings(SegmentationSettings):
    """Settings of fine-tuning.

    Attributes:
        transfer: which pretrained weights are started from: "all" but the output layers, or those of the "encoder",
            the decoder from random weights: one that gives noise is slow to give organs (benchmarks/RESULTS.md).
        fold_timestep: the time step at which the conditioning of a pretraining of ours is folded in, instead of the one
            it was folded at in the end; None: that one.
    """

    transfer: Transfer = "encoder"
    fold_timestep: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transfer not in TRANSFERS:
            raise ValueError(f"transfer {self.transfer} is none of {', '.join(TRANSFERS)}")
        if self.fold_timestep is not None and self.fold_timestep < 0:
            raise ValueError(f"fold_timestep {self.fold_timestep} is negative")


@dataclass(frozen=True)
class DecoderSettings(FinetuningSettings):
    """Settings of a training of the decoder alone, from the pretrained one (arXiv 2402.15216)."""

    transfer: Transfer = "all"


@dataclass(frozen=True)
class ProbingSettings(TrainingSettings):
    """Settings of a probe's training.

    Attributes:
        time_steps: of the pretraining's diffusion, at which the features are read (none: of the network as it was
            folded); None: those that suit what is started from, :meth:`reading`.
        noisy: whether the image is noised as far as it was at each of them, or read clean; None: as the strategy does.
        augment: patches from anywhere, augmented by nnU-Net's recipe; False: windows of the scans as they are, a
            quarter of a patch apart, so that the frozen features of each are computed once. Then prediction does not
            mirror either.
    """

    usually_noisy: ClassVar[bool] = False

    time_steps: tuple[int, ...] | None = None
    noisy: bool | None = None
    augment: bool = False

    def __post_init__(self) -> None:
        checked = self.probe.time_steps  # a tuple, where it was a list in JSON
        object.__setattr__(self, "time_steps", None if self.time_steps is None else checked)

    @property
    def probe(self) -> ProbeSettings:
        """What is read; of the network as it was folded where the time steps are not resolved."""
        return ProbeSettings(self.time_steps or (), self.usually_noisy if self.noisy is None else self.noisy)

    def reading(self, timesteps: int | None) -> ProbingSettings:
        """The settings with all that is read, where it was not given.

        Args:
            timesteps: T of the diffusion of the network that is started from; None: it is none that can be read at a
                time step.
        """
        usual = [] if timesteps is None else [round(share * timesteps) for share in PROBED_SHARES]
        # each once, however few there are
        steps = tuple(dict.fromkeys(usual)) if self.time_steps is None else self.time_steps
        return replace(self, time_steps=steps, noisy=bool(steps) and self.probe.noisy)


@dataclass(frozen=True)
class PixelEnsembleSettings(ProbingSettings):
    """Settings of the pixel ensemble, which reads noised images as Baranchuk et al. do (arXiv 2112.03126)."""

    usually_noisy: ClassVar[bool] = True


@dataclass(frozen=True)
class PretrainingSettings(TrainingSettings):
    """Settings of the diffusion pretraining. [default] values of ours unless a source is named.

    Attributes:
        weight_decay: of AdamW.
        ema_decay: final decay of the moving average that is folded and fine-tuned.
        gradient_clip: largest norm of the gradient.
        accumulate: batches whose gradients make one iteration.
        skip_limit: iterations in a row that may be skipped because their loss or gradient is not finite.
        augment: turn, scale and brighten patches.
        pool: what is pretrained on: "unlabeled" images alone, these and the "training" cases of the fold, or "all".
        balance: between 0, every case of the pool is drawn alike, and 1, every data set alike; 0.5 as in MultiTalent
            (arXiv 2303.14444).
        pictures: about so many pictures of the validation are drawn in the course of the training.
        diffusion, coordinates: the two tasks.
    """

    optimizer: OptimizerName = "adamw"
    initial_lr: float | None = 1e-3
    weight_decay: float = 1e-2
    ema_decay: float = 0.999
    gradient_clip: float = 1.0
    accumulate: int = 1
    skip_limit: int = 10
    augment: bool = True
    pool: Pool = "training"
    balance: float = 0.5
    pictures: int = 10
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    coordinates: CoordinateSettings = field(default_factory=CoordinateSettings)

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise ValueError(f"pool {self.pool} is none of {', '.join(POOLS)}")
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance {self.balance} is not in 0..1")
        if self.accumulate < 1:
            raise ValueError(f"accumulate {self.accumulate} is less than 1")

    @classmethod
    def from_plan(
        cls,
        section: dict[str, Any],
        *,
        diffusion: dict[str, Any] | None = None,
        coordinates: dict[str, Any] | None = None,
        **changes: Any,
    ) -> PretrainingSettings:
        """The settings the plan's ``diffseg`` section states, with changes on top.

        Args:
            section: the plan's.
            diffusion, coordinates: fields of the two tasks that differ from the plan's.
            changes: other fields.
        """
        planned, changed = section["diffusion"], dict(diffusion or {})
        if "timesteps" in changed:  # the same noise is folded in
            share = planned["fold_timestep"] / planned["timesteps"]
            changed.setdefault("fold_timestep", round(share * changed["timesteps"]))
        return cls(
            diffusion=DiffusionSettings(**{**planned, **changed}),
            coordinates=CoordinateSettings(**{**section["coordinates"], **(coordinates or {})}),
            **changes,
        )

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> PretrainingSettings:
        """The settings :meth:`to_json` gave, e.g. those in a checkpoint."""
        return cls(
            **{
                **content,
                "diffusion": DiffusionSettings(**content["diffusion"]),
                "coordinates": CoordinateSettings(**content["coordinates"]),
            }
        )
