"""What the training of a refiner is: its settings, and the two half-steps of one batch (arXiv 2407.03548)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn

from diffseg_nnunet.diffusion.bernoulli import BernoulliDiffusion, BernoulliSettings
from diffseg_nnunet.refinement.degradation import chosen_samples, degraded_view, softened
from diffseg_nnunet.refinement.losses import SEGMENTOR_WEIGHT, OverlapLoss, refiner_loss, segmentor_loss
from diffseg_nnunet.refinement.masks import as_probabilities, masks_of
from diffseg_nnunet.refinement.network import Refiner
from diffseg_nnunet.refinement.sampling import BERNOULLI_SAMPLERS, BernoulliSampler
from diffseg_nnunet.refinement.sizing import WIDTHS
from diffseg_nnunet.training.settings import OptimizerName, TrainingSettings

SegmentorMode = Literal["frozen", "alternate"]
SEGMENTOR_MODES = get_args(SegmentorMode)


@dataclass(frozen=True)
class RefinementSettings(TrainingSettings):
    """Settings of a refiner's training. Tags as in the methods' specification.

    Attributes:
        iterations: 40,000 [code].
        initial_lr: of the refiner [default; the code's 1e-4 is for a network four times as wide].
        segmentor: "frozen" keeps it bit for bit; refiners of such gained on training scans, on those of abdomens
            after 600 iterations in which they learnt overlap, too (benchmarks/RESULTS.md, "Refinement (HiDiff)").
            "alternate" trains it in turn with the refiner, as the paper does.
        segmentor_lr: initial rate of the segmentor where it learns [code].
        segmentor_weight: of the diffusion loss beside the segmentor's own [default].
        weight_decay: of both [code].
        ema_decay: final decay of the refiner's moving average, which is what refines [default; 0.9999 in the code].
        gradient_clip: largest norm of a half-step's gradient [default].
        binary: 1-bit weights and activations.
        width: channels of the refiner's first stage.
        batch_size: patches; None: the plan's.
        skip_limit: iterations in a row that may be skipped because a gradient is not finite.
        diffusion: the process.
        dice_weight: of the soft Dice loss of the estimate of y_0 beside the diffusion loss, taken a voxel and all its
            classes [default; the paper has none]: that asks for each voxel's likeliest class, which may leave out small
            structures of which one is nowhere sure.
        start_share: of the samples, whose time step is the last, where the reverse process starts, and not any of the T
            [default].
        degrade: share of the samples of which the refiner is shown what the segmentor says of a worse view, less surely
            [default]: of training cases it is surer than of new ones
            (:mod:`~diffseg_nnunet.refinement.degradation`).
        samples: masks drawn and averaged where the refiner is used, by default 4 [default]: one draw of the posterior
            lies further from the truth than the prior's most probable class, the mean of a few does not.
        sampling_steps: of the reverse process where the refiner is used, by default 1 [default]: the first estimate is
            of each voxel's posterior already, while later ones say much of what was drawn voxel by voxel, and a map of
            classes asks for no more (benchmarks/RESULTS.md, "What a refiner's layers speak of"); None: the
            diffusion's T [code].
        sampler: of these steps, "ddim" or "ancestral".
    """

    iterations: int = 40_000
    optimizer: OptimizerName = "adamw"
    initial_lr: float | None = 1e-3
    segmentor: SegmentorMode = "frozen"
    segmentor_lr: float = 1e-4
    segmentor_weight: float = SEGMENTOR_WEIGHT
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    gradient_clip: float = 1.0
    binary: bool = False
    width: int = WIDTHS[0]
    batch_size: int | None = None
    skip_limit: int = 10
    diffusion: BernoulliSettings = field(default_factory=BernoulliSettings)
    dice_weight: float = 1.0
    start_share: float = 0.5
    degrade: float = 0.6
    samples: int = 4
    sampling_steps: int | None = 1
    sampler: BernoulliSampler = "ddim"

    def __post_init__(self) -> None:
        if isinstance(self.diffusion, Mapping):  # from JSON
            object.__setattr__(self, "diffusion", BernoulliSettings(**self.diffusion))
        if self.segmentor not in SEGMENTOR_MODES:
            raise ValueError(f"segmentor {self.segmentor} is none of {', '.join(SEGMENTOR_MODES)}")
        if self.optimizer != "adamw":
            raise ValueError(f"refiners are trained with adamw, not {self.optimizer}")
        for name in ("degrade", "start_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is not in 0..1")
        if self.dice_weight < 0:
            raise ValueError(f"dice_weight {self.dice_weight} is negative")
        if self.samples < 1:
            raise ValueError(f"{self.samples} samples are fewer than one")
        if self.sampling_steps is not None and not 1 <= self.sampling_steps <= self.diffusion.timesteps:
            raise ValueError(f"sampling_steps {self.sampling_steps} are not within 1..{self.diffusion.timesteps}")
        if self.sampler not in BERNOULLI_SAMPLERS:
            raise ValueError(f"sampler {self.sampler} is none of {', '.join(BERNOULLI_SAMPLERS)}")


class Said(NamedTuple):
    """What the segmentor says of a batch: outputs as its loss wants them, probabilities, features fine to coarse."""

    outputs: Tensor | list[Tensor]
    prior: Tensor
    features: list[Tensor]

    @property
    def finite(self) -> bool:
        """Whether masks can be drawn from the prior."""
        return bool(self.prior.isfinite().all())


@dataclass(frozen=True)
class Targets:
    """How nnU-Net's targets tell the masks that are diffused.

    Attributes:
        classes: of the segmentor's outputs.
        regions: whether they are regions, one mask each, which may overlap; else labels, 0 the background.
        ignore: whether there is an ignore label: the highest value, or with regions the last channel.
    """

    classes: int
    regions: bool
    ignore: bool

    def masks(self, target: Tensor | list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The masks, float32 (B, K, ...), and the voxels that count, bool (B, 1, ...) or None for all."""
        finest = target[0] if isinstance(target, (list, tuple)) else target
        if self.regions:
            return finest[:, : self.classes].float(), ~finest[:, -1:].bool() if self.ignore else None
        labels = finest.long()
        return masks_of(labels, range(self.classes)), labels < self.classes if self.ignore else None

    def probabilities(self, logits: Tensor) -> Tensor:
        """float32, of the same shape."""
        return logits.float().sigmoid() if self.regions else logits.float().softmax(1)

    def dice_loss(self, weight: float, batch_dice: bool, shared: bool = False) -> OverlapLoss:
        """nnU-Net's soft Dice loss of masks told by their log-odds, the background left out; regions have none.

        Args:
            weight: beside a loss that is summed over the classes; :func:`refiner_loss` has its mean.
            batch_dice: whether a class's overlap is that in the whole batch, as nnU-Net plans it.
            shared: whether the batch is that of all processes, which are then to ask for the loss together.
        """
        dice = MemoryEfficientSoftDiceLoss(None, batch_dice, do_bg=self.regions, smooth=1e-5, ddp=shared)

        def loss(log_odds: Tensor, clean: Tensor, valid: Tensor | None) -> Tensor:
            return weight / self.classes * (1 + dice(as_probabilities(log_odds, not self.regions), clean, valid))

        return loss


class Collaboration:
    """A segmentor and its refiner, and what each of them learns from a batch.

    Args:
        segmentor: a U-Net with ``encoder`` and ``decoder``, as nnU-Net plans them.
        refiner: of the same grids; itself, not a wrapper around it.
        diffusion: the process.
        targets: how targets are read.
        settings: what the refiner learns by.
        batch_dice: as nnU-Net plans it.
    """

    def __init__(
        self,
        segmentor: nn.Module,
        refiner: Refiner,
        diffusion: BernoulliDiffusion,
        targets: Targets,
        settings: RefinementSettings,
        batch_dice: bool = False,
    ):
        self.segmentor, self.refiner, self.diffusion, self.targets = segmentor, refiner, diffusion, targets
        self.start_share, self._dice = settings.start_share, (settings.dice_weight, batch_dice)
        self.share_batch(False)

    def share_batch(self, shared: bool = True) -> None:
        """Whether the batch, of which the Dice loss may be, is that of all processes."""
        self.overlap = self.targets.dice_loss(*self._dice, shared) if self._dice[0] else None

    def says(self, image: Tensor) -> Said:
        """What the segmentor says of an image (B, C, ...); one pass."""
        return self._said(image, lambda logits: logits)

    def shows(self, image: Tensor, share: float, generator: torch.Generator) -> Said:
        """What the refiner learns from: as :meth:`says`, but of a share of the samples what the segmentor says of a
        worse view of them, and less sure of it."""
        if not share:
            return self.says(image)
        chosen = chosen_samples(len(image), share, generator).reshape(-1, *(1,) * (image.ndim - 1))
        view = torch.where(chosen, degraded_view(image, generator), image)
        return self._said(view, lambda logits: torch.where(chosen, softened(logits, generator), logits.float()))

    def _said(self, image: Tensor, changed: Callable[[Tensor], Tensor]) -> Said:
        skips = self.segmentor.encoder(image)
        outputs = self.segmentor.decoder(skips)
        finest = outputs[0] if isinstance(outputs, (list, tuple)) else outputs
        maps = len(self.refiner.architecture.pyramid_channels)
        return Said(outputs, self.targets.probabilities(changed(finest)), list(skips[-maps:]))

    def refiner_loss(
        self, said: Said, image: Tensor, target: Tensor | list[Tensor], generator: torch.Generator
    ) -> Tensor:
        """First half-step, in bits, of what the segmentor has said; gradients for the refiner alone."""
        clean, valid = self.targets.masks(target)
        drawn = (said.prior, said.features, image, generator, valid)
        return refiner_loss(self.refiner, self.diffusion, clean, *drawn, self.start_share, self.overlap)

    def segmentor_loss(
        self,
        said: Said,
        image: Tensor,
        target: Tensor | list[Tensor],
        generator: torch.Generator,
        own_loss: Callable[[Any, Any], Tensor],
        weight: float,
    ) -> Tensor:
        """Second half-step: the segmentor's own loss plus ``weight`` · the diffusion loss through prior and features;
        gradients for the segmentor alone, by what it has said."""
        clean, valid = self.targets.masks(target)
        return own_loss(said.outputs, target) + segmentor_loss(
            self.refiner, self.diffusion, clean, said.prior, said.features, image, generator, valid, weight
        )
