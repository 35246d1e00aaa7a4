"""HiDiff: a Bernoulli-diffusion refiner on a finished fold, trained with nnU-Net's data loading (arXiv 2407.03548).

A segmentor is surer of the cases it was trained on than of new ones, so a refiner that learns on these sees fewer
mistakes than it will meet. So of a share of the samples it is shown what the segmentor says of a worse view of the
image (``refinement.degradation``), while it reads the image as it is; priors of folds that have not seen a case would
be better still, but each fold's features are its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from diffseg_nnunet.diffusion.bernoulli import BernoulliDiffusion
from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.inference.folders import SEGMENTOR_ALONE
from diffseg_nnunet.inference.refining import RefineOptions, RefiningPredictor, RefiningSegmentor
from diffseg_nnunet.inference.validation import predictor_of, validate_fold
from diffseg_nnunet.refinement.binary import pack_state
from diffseg_nnunet.refinement.network import REFINER_FORMAT, Refiner, RefinerArchitecture
from diffseg_nnunet.refinement.sampling import refine
from diffseg_nnunet.refinement.sizing import planned_refiner
from diffseg_nnunet.training import checkpoint as checkpoints
from diffseg_nnunet.training import processes
from diffseg_nnunet.training.counting import hard_counts, mean_dsc
from diffseg_nnunet.training.ema import ExponentialMovingAverage
from diffseg_nnunet.training.precision import autocast, float_format
from diffseg_nnunet.training.refining import Collaboration, RefinementSettings, Said, Targets
from diffseg_nnunet.training.seeding import derived_seed
from diffseg_nnunet.training.settings import TrainingSettings

from .base import NOISE_STREAM, VALIDATION_NOISE_STREAM, unwrapped
from .segmentation import SegmentationTrainer, WarmupPolyLRScheduler

_CURVE_SAMPLES = 2
"""Most masks a patch that the pseudo DSC of an epoch averages: with 8, validation would take longer than training."""
_REFINER_DRAWS, _SEGMENTOR_DRAWS, _SAMPLING_DRAWS, _DEGRADATION_DRAWS = range(4)


class DiffSegRefinerTrainer(SegmentationTrainer):
    """Trains a refiner on what a trained segmentor says; "alternate" trains the segmentor in turn with it.

    ``network`` is the segmentor, and stays what ``network_weights`` of the checkpoint holds, under stock keys: without
    the refiner, which has keys of its own, stock nnU-Net predicts with the segmentor. Call :meth:`take_segmentor` after
    :meth:`initialize`.
    """

    settings: RefinementSettings
    settings_type: type[TrainingSettings] = RefinementSettings
    strategy = "refine"
    is_stock = False

    def apply(self, settings: TrainingSettings) -> None:
        super().apply(settings)
        self.enable_deep_supervision = self.learns_too
        self.segmentor_record: dict[str, str] = {}
        self._shown: list[list[np.ndarray]] = []
        self._skipped_in_a_row = {"refiner": 0, "segmentor": 0}

    @property
    def learns_too(self) -> bool:
        """Whether the segmentor is trained."""
        return self.settings.segmentor == "alternate"

    def _do_i_compile(self) -> bool:
        return False  # encoder and decoder are run apart

    def _set_batch_size_and_oversample(self) -> None:
        super()._set_batch_size_and_oversample()
        self.batch_size = self.settings.batch_size or self.batch_size

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        unwrapped(self.network).decoder.deep_supervision = enabled and self.learns_too

    # -- networks and optimisers --------------------------------------------------------------------------------------

    @classmethod
    def planned_segmentor(cls, plans: dict, configuration_name: str, dataset_json: dict) -> nn.Module:
        """The planned network, without deep supervision."""
        manager = PlansManager(plans)
        configuration = manager.get_configuration(configuration_name)
        return cls.build_network_architecture(
            manager,
            configuration,
            determine_num_input_channels(manager, configuration, dataset_json),
            manager.get_label_manager(dataset_json).num_segmentation_heads,
            enable_deep_supervision=False,
        )

    def architecture(self) -> RefinerArchitecture:
        """Of the refiner. Raises BadInputError if the planned network has no features at full resolution."""
        planned = self.configuration_manager.configuration["architecture"]["arch_kwargs"]
        heads, settings = self.label_manager.num_segmentation_heads, self.settings
        try:
            return planned_refiner(planned, self.num_input_channels, heads, settings.width, settings.binary)
        except ValueError as error:
            raise BadInputError(
                f"{self.configuration_name} has no refiner: {error}.", "Refine another configuration."
            ) from error

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, WarmupPolyLRScheduler]:
        settings, segmentor, labels = self.settings, unwrapped(self.network), self.label_manager
        self.refiner = Refiner(self.architecture(), settings.diffusion.prior_margin).to(self.device)
        targets = Targets(labels.num_segmentation_heads, labels.has_regions, labels.has_ignore_label)
        diffusion, batch_dice = BernoulliDiffusion(settings.diffusion), self.configuration_manager.batch_dice
        self.collaboration = Collaboration(segmentor, self.refiner, diffusion, targets, settings, batch_dice)
        self.ema = ExponentialMovingAverage({"refiner": self.refiner}, settings.ema_decay)
        segmentor.requires_grad_(self.learns_too)
        self.segmentor_optimizer, self._segmentor_schedule = None, None
        if self.learns_too:
            self.segmentor_optimizer, self._segmentor_schedule = self._optimised(segmentor, settings.segmentor_lr)
        return self._optimised(self.refiner, self.initial_lr)

    def learning(self) -> tuple[nn.Module, ...]:
        return (*super().learning(), self.refiner)

    def _optimised(self, module: nn.Module, rate: float) -> tuple[torch.optim.Optimizer, WarmupPolyLRScheduler]:
        optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=self.settings.weight_decay)
        return optimizer, WarmupPolyLRScheduler(optimizer, rate, self.num_epochs, self.warmup_epochs)

    def share_network(self) -> None:
        """No wrapper: two modules learn in turn, so their gradients are averaged after each half-step."""
        # once more: Dice now spans the whole batch
        self.loss = self._build_loss()
        self.collaboration.share_batch()

    def take_segmentor(self, weights: Mapping[str, Tensor], source: str, record: Mapping[str, str]) -> None:
        """Take over a finished segmentor, output layers included, after :meth:`initialize`.

        Args:
            weights: of the planned network.
            source: the checkpoint's name, for messages.
            record: where it came from, for the checkpoints: "strategy", "sha256" and "checkpoint".

        Raises:
            BadInputError: keys or shapes differ from the plan's; the message lists them.
        """
        network = unwrapped(self.network)
        checkpoints.require_same_network(network.state_dict(), weights, source, with_outputs=True)
        network.load_state_dict(dict(weights))
        self.segmentor_record = dict(record)

    def on_train_start(self) -> None:
        if not self.segmentor_record:
            raise BadInputError(
                f"{type(self).__name__} refines a finished fold, and was given none.",
                "Run `diffseg refine`, not nnUNetv2_train.",
            )
        super().on_train_start()

    # -- steps --------------------------------------------------------------------------------------------------------

    def _compute_dtype(self) -> torch.dtype | None:
        return float_format(self.device) if self.device.type == "cuda" else self._autocast_dtype

    def _generator(self, stream: int, index: int, part: int) -> torch.Generator:
        seed = derived_seed(self.settings.seed, stream, index, part, self.rank)
        return torch.Generator(device=self.device).manual_seed(seed)

    def _moved(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | list[Tensor]]:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, non_blocking=True)

        target = batch["target"]
        return moved(batch["data"]), [moved(t) for t in target] if isinstance(target, list) else moved(target)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.network.train(self.learns_too)
        self.refiner.train()
        self._shown = []
        if self._segmentor_schedule is not None:
            self._segmentor_schedule.step(self.current_epoch)

    def train_step(self, batch: dict) -> dict:
        image, target = self._moved(batch)
        losses = {"loss": self._refiner_step(image, target)}
        if self.learns_too:
            losses["segmentor_loss"] = self._segmentor_step(image, target)
        self._report_iteration()
        return losses

    def _refiner_step(self, image: Tensor, target: Any) -> float:
        generator, worsening = (
            self._generator(NOISE_STREAM, self._iteration, part) for part in (_REFINER_DRAWS, _DEGRADATION_DRAWS)
        )
        with autocast(self.device, self._compute_dtype()):
            with torch.no_grad():
                said = self.collaboration.shows(image, self.settings.degrade, worsening)
            if not self._usable(said, "refiner"):
                return math.nan
            self._shown.append(hard_counts(said.prior, target, self.collaboration.targets))
            loss = self.collaboration.refiner_loss(said, image, target, generator)
        if self._descend(loss, "refiner", self.refiner, self.optimizer):
            self.ema.update()
        return loss.item()

    def _segmentor_step(self, image: Tensor, target: Any) -> float:
        generator = self._generator(NOISE_STREAM, self._iteration, _SEGMENTOR_DRAWS)
        with autocast(self.device, self._compute_dtype()):
            said = self.collaboration.says(image)
            if not self._usable(said, "segmentor"):
                return math.nan
            loss = self.collaboration.segmentor_loss(
                said, image, target, generator, self.loss, self.settings.segmentor_weight
            )
        self._descend(loss, "segmentor", self.network, self.segmentor_optimizer)
        return loss.item()

    def _usable(self, said: Said, learner: str) -> bool:
        """Whether masks can be drawn from what every process's segmentor says; else the step is left out by all."""
        finite = processes.all_agree(said.finite, self.device)
        if not finite:
            self._note_skips(False, learner, "prior is")
        return finite

    def _descend(self, loss: Tensor, learner: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """One step of one optimiser, left out where the gradient is not finite; whether it was taken."""
        loss.backward()
        parameters = list(module.parameters())
        processes.average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.gradient_clip)
        finite = processes.all_agree(bool(torch.isfinite(norm)), self.device)
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._note_skips(finite, learner, "gradient is")
        return finite

    def _note_skips(self, finite: bool, learner: str, what: str) -> None:
        """Raises StageFailedError when too many steps of one learner, in a row, were left out."""
        in_a_row = self._skipped_in_a_row[learner] = 0 if finite else self._skipped_in_a_row[learner] + 1
        if finite:
            return
        message = f"The {learner}'s {what} not finite at iteration {self._iteration}"
        self.print_to_log_file(f"{message}: the step is skipped")
        if in_a_row >= self.settings.skip_limit:
            raise StageFailedError(
                f"{message}, {in_a_row} steps in a row by now; the last checkpoint is intact.",
                "Lower the rate with `--initial-lr`, or look at the scans with `diffseg verify`.",
            )

    # -- validation ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The refiner as it will be used: averaged, in evaluation mode."""
        self.refiner.eval()
        with self.ema.applied():
            yield

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._validation_index = 0

    def validation_step(self, batch: dict) -> dict:
        image, target = self._moved(batch)
        # the same draws every epoch, so that the curve shows the network
        noise, draws = (
            self._generator(VALIDATION_NOISE_STREAM, self._validation_index, part)
            for part in (_REFINER_DRAWS, _SAMPLING_DRAWS)
        )
        self._validation_index += 1
        diffusion, exclusive = self.collaboration.diffusion, not self.label_manager.has_regions
        options = self.sampling_options()
        with self._averaged(), autocast(self.device, self._compute_dtype()):
            said = self.collaboration.says(image)
            if not processes.all_agree(said.finite, self.device):  # the loss may be of all processes' batches
                return self._validated(math.nan, said.prior, said.prior, target)
            loss = self.collaboration.refiner_loss(said, image, target, noise)
            refined = refine(
                said.prior,
                said.features,
                image,
                self.refiner,
                diffusion,
                options.steps,
                min(options.samples, _CURVE_SAMPLES),
                draws,
                sampler=options.sampler,
                exclusive=exclusive,
            )
        return self._validated(loss.item(), refined.probability, said.prior, target)

    def _validated(self, loss: float, refined: Tensor, prior: Tensor, target: Any) -> dict:
        """What nnU-Net adds up over the batches of a validation, with the counts of the prior beside it."""
        named = {
            f"{name}_{of}": count
            for of, probability in (("hard", refined), ("prior", prior))
            for name, count in zip(
                ("tp", "fp", "fn"), hard_counts(probability, target, self.collaboration.targets), strict=True
            )
        }
        return {"loss": np.float32(loss), **named}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        prior = [[output.pop(f"{name}_prior") for name in ("tp", "fp", "fn")] for output in val_outputs]
        super().on_validation_epoch_end(val_outputs)
        alone, shown = (mean_dsc(counts) for counts in (prior, self._shown))
        self.print_to_log_file(
            f"pseudo DSC of the segmentor alone {alone:.4f}; of the priors that the refiner learnt from {shown:.4f} "
            "(training cases: it should be no better)"
        )

    def sampling_options(self) -> RefineOptions:
        """How the fold's validation cases are refined, and whatever is predicted later unless it is told otherwise."""
        return RefineOptions(seed=self.settings.seed).completed(self.settings)

    def predictor(self) -> nnUNetPredictor:
        pair = RefiningSegmentor(unwrapped(self.network), self.refiner)
        options, regions = self.sampling_options(), self.label_manager.has_regions
        predictor = RefiningPredictor(
            self.collaboration.diffusion,
            options,
            regions,
            self.settings.precision,
            device=self.device,
            allow_tqdm=False,
        )
        return predictor_of(self, predictor, pair)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        with self._averaged():
            super().perform_actual_validation(save_probabilities)
        if self.learns_too:  # what training on has given it, the refiner is not to be credited with
            validate_fold(self, False, SEGMENTOR_ALONE, predictor_of(self))

    # -- checkpoint ---------------------------------------------------------------------------------------------------

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint of tensors and plain values: the segmentor under nnU-Net's keys, the refiner beside it."""
        if self.disable_checkpointing or self.rank > 0:
            return
        with self.ema.applied():
            averaged = {key: tensor.clone() for key, tensor in pack_state(self.refiner).items()}
        learning = self.segmentor_optimizer
        content = {
            "network_weights": unwrapped(self.network).state_dict(),
            "refiner_weights": averaged,
            "refiner_architecture": self.refiner.architecture.to_json(),
            "refiner_format": REFINER_FORMAT,
            "segmentor": self.segmentor_record,
            "settings": self.settings.to_json(),
            "refiner_state": self.refiner.state_dict(),
            "refiner_ema_state": self.ema.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "segmentor_optimizer_state": None if learning is None else learning.state_dict(),
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            **self.own_state(),
        }
        checkpoints.save(filename, checkpoints.on_cpu(content))

    def load_checkpoint(self, filename_or_checkpoint: str | dict) -> None:
        """Continue from a checkpoint of this trainer; reads tensors, plain values and numpy's numbers only."""
        if not self.was_initialized:
            self.initialize()
        content = checkpoints.load_safely(filename_or_checkpoint)
        self.take_segmentor(content["network_weights"], str(filename_or_checkpoint), content["segmentor"])
        self.refiner.load_state_dict(content["refiner_state"])
        self.ema.load_state_dict(content["refiner_ema_state"])
        self.optimizer.load_state_dict(content["optimizer_state"])
        if self.segmentor_optimizer is not None:
            self.segmentor_optimizer.load_state_dict(content["segmentor_optimizer_state"])
        self.my_init_kwargs = content["init_args"]
        self.current_epoch = content["current_epoch"]
        self.logger.load_checkpoint(content["logging"])
        self._best_ema = content["_best_ema"]
        self.inference_allowed_mirroring_axes = content["inference_allowed_mirroring_axes"]
        self.take_own_state(content)
