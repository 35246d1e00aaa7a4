"""nnU-Net's recipe as every strategy trains by it: left and right, few labels, rates, frozen parts, and the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn

from diffseg_nnunet.budgets.annotation import Annotation
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.inference.validation import predictor_of, validate_fold
from diffseg_nnunet.planning.section import allowed_mirror_axes
from diffseg_nnunet.training.adaptation import Adaptation, adapt, require_share
from diffseg_nnunet.training.checkpoint import initialise
from diffseg_nnunet.training.schedules import warmup_poly
from diffseg_nnunet.training.settings import Strategy, TrainingSettings

from .base import DiffSegTrainerBase, unwrapped
from .loaders import SeededLoader
from .sparse import (
    SparselyAnnotatedDataset,
    keep_single_voxels,
    sparse_annotations,
    with_ignore_label,
)

ADAMW_WEIGHT_DECAY = 1e-2


class WarmupPolyLRScheduler(PolyLRScheduler):
    """nnU-Net's poly schedule after a linear warm-up, in epochs."""

    def __init__(self, optimizer: torch.optim.Optimizer, initial_lr: float, max_steps: int, warmup_steps: int):
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, initial_lr, max_steps)

    def step(self, current_step: int | None = None) -> None:
        if current_step is None or current_step == -1:
            current_step = self.ctr
            self.ctr += 1
        rate = self.initial_lr * warmup_poly(current_step, self.max_steps, self.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class Float32Loss(nn.Module):
    """A loss computed in float32 whatever the network was autocast to: Dice sums of bfloat16 lose small structures."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, output: Tensor | list[Tensor], target: Tensor | list[Tensor]) -> Tensor:
        if isinstance(output, (list, tuple)):
            device, output = output[0].device, [o.float() for o in output]
        else:
            device, output = output.device, output.float()
        with torch.autocast(device.type, enabled=False):
            return self.loss(output, target)


def _stop_timing(transform: Any) -> None:
    """Keep transforms from timing two algorithms and taking the faster: the results differ by rounding."""
    if hasattr(transform, "benchmark"):
        transform.benchmark = False
    for inner in (*getattr(transform, "transforms", ()), getattr(transform, "transform", None)):
        if inner is not None:
            _stop_timing(inner)


class SegmentationTrainer(DiffSegTrainerBase):
    """nnU-Net's training of the planned network.

    Left and right are not swapped where the plan says so, in training and at test time. The pretrained weights are
    loaded by ``diffseg train`` (or by ``nnUNetv2_train -pretrained_weights``), not here. Of a fold that is a label
    budget, only what is annotated is learned from; its validation cases have all their labels.

    Attributes:
        strategy: its registered name.
        frozen: parts of the planned network that keep their pretrained weights bit for bit: they get no gradient, are
            no part of the optimiser, and are run in evaluation mode, so that norms with a state keep it.
        is_stock: whether the result is the planned network alone, which stock nnU-Net can run.
        votes: whether the outputs are shares of votes, whose spread is an uncertainty.
    """

    strategy: Strategy
    frozen: tuple[str, ...] = ()
    is_stock = True
    votes = False
    _annotated_cases: SparselyAnnotatedDataset | None = None

    @cached_property
    def annotations(self) -> Mapping[str, Annotation] | None:
        """What is annotated in each training case; None where whole cases are."""
        axis = self.plans_manager.transpose_forward[0]
        return sparse_annotations(self.preprocessed_dataset_folder_base, self.fold, axis)

    def initialize(self) -> None:
        if self.annotations is not None:
            if self.is_cascaded:
                raise BadInputError(
                    f"{self.configuration_name} is a cascade, which does not learn from cases annotated in part.",
                    "Choose another configuration, or a label budget of whole cases.",
                )
            # not in dataset.json: the ignore label is none of the data set's, nor of the model's
            self.label_manager = with_ignore_label(self.plans_manager, self.dataset_json)
        super().initialize()

    def apply(self, settings: TrainingSettings) -> None:
        super().apply(settings)
        self.initial_lr = settings.rate(self.strategy)

    @property
    def planned_network(self) -> nn.Module:
        """The planned network, of which pretrained weights are, after :meth:`initialize`."""
        return unwrapped(self.network)

    def _frozen_modules(self) -> list[nn.Module]:
        return [self.planned_network.get_submodule(name) for name in self.frozen]

    def start_from(self, weights: Mapping[str, Tensor], source: str) -> int:
        """Take over pretrained weights, all but the output layers, after :meth:`initialize`.

        Args:
            source: the checkpoint's name, for messages.

        Returns:
            The number of tensors taken over.

        Raises:
            BadInputError: keys or shapes differ from the plan's; the message lists them.
        """
        return initialise(self.planned_network, weights, source)

    def adapt_from(self, weights: Mapping[str, Tensor], source: str) -> Adaptation:
        """Take over the weights of a checkpoint the plan was made to start from, adapted where shapes differ, after
        :meth:`initialize`; what is skipped keeps its random weights, and so do the output layers.

        Raises:
            BadInputError: too small a share of the network fits, or not all of what stays frozen; the message holds a
                table.
        """
        network = self.planned_network
        own = network.state_dict()
        adaptation = adapt(own, weights)
        require_share(adaptation, source, self.configuration_name, self.frozen)
        network.load_state_dict(adaptation.state_for(own))
        return adaptation

    def _trained_parameters(self) -> list[nn.Parameter]:
        """What the optimiser gets."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        for module in self._frozen_modules():
            module.requires_grad_(False)
        trained = self._trained_parameters()
        stock, _ = super().configure_optimizers()
        if self.settings.optimizer == "adamw":
            optimizer = torch.optim.AdamW(trained, self.initial_lr, weight_decay=ADAMW_WEIGHT_DECAY)
        else:
            optimizer = type(stock)(trained, **stock.defaults)  # nnU-Net's takes frozen parameters, too
        return optimizer, WarmupPolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, self.warmup_epochs)

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        return Float32Loss(loss) if self.device.type == "cpu" else loss

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:  # noqa: N802 nnU-Net's name
        rotation, dummy_2d, initial_patch_size, axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        allowed = allowed_mirror_axes(self.plans_manager.plans, len(self.configuration_manager.patch_size))
        # what was never mirrored in training is not mirrored in prediction
        axes = tuple(axis for axis in axes if axis in allowed and self.augments)
        self.inference_allowed_mirroring_axes = axes or None
        return rotation, dummy_2d, initial_patch_size, axes

    def build_loaders(self) -> tuple[SeededLoader, SeededLoader]:
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        patch_size = self.configuration_manager.patch_size
        scales = self._get_deep_supervision_scales()
        rotation, dummy_2d, initial_patch_size, axes = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        labels = self._label_options()
        validation_transforms = self.get_validation_transforms(scales, **labels)
        if self.augments:
            training_transforms = self.get_training_transforms(
                patch_size, rotation, scales, axes, dummy_2d, self.configuration_manager.use_mask_for_norm, **labels
            )
            _stop_timing(training_transforms)
            if self.annotations is not None:
                keep_single_voxels(training_transforms)
        else:
            initial_patch_size, training_transforms = patch_size, validation_transforms
        training, validation = self.get_tr_and_val_datasets()
        all_labels = self.plans_manager.get_label_manager(self.dataset_json)
        return (
            self._loader(
                training,
                initial_patch_size,
                training_transforms,
                self.label_manager,
                self._training_loader(training),
            ),
            self._loader(validation, patch_size, validation_transforms, all_labels),
        )

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        training, validation = super().get_tr_and_val_datasets()
        if self.annotations is None:
            return training, validation
        if self._annotated_cases is None:  # once, since their labels are read
            self._annotated_cases = SparselyAnnotatedDataset(training, self.annotations, self.label_manager)
        return self._annotated_cases, validation

    def _label_options(self) -> dict[str, Any]:
        """What nnU-Net's transforms must know of the labels."""
        return {
            "is_cascaded": self.is_cascaded,
            "foreground_labels": self.label_manager.foreground_labels,
            "regions": self.label_manager.foreground_regions if self.label_manager.has_regions else None,
            "ignore_label": self.label_manager.ignore_label,
        }

    def random_batch(self) -> dict[str, Any]:
        # nnU-Net's validation transforms give targets their form: regions, deep supervision, the cascade's masks
        transforms = self.get_validation_transforms(self._get_deep_supervision_scales(), **self._label_options())
        patch_size = self.configuration_manager.patch_size
        masks = len(self.label_manager.foreground_labels) if self.is_cascaded else 0
        samples = []
        for _ in range(self.batch_size):
            labels = torch.tensor(self.label_manager.all_labels, dtype=torch.int16)
            segmentation = labels[torch.randint(len(labels), (2 if masks else 1, *patch_size))]
            image = torch.randn(self.num_input_channels - masks, *patch_size)
            samples.append(transforms(image=image, segmentation=segmentation))
        targets = [sample["segmentation"] for sample in samples]
        return {
            "data": torch.stack([sample["image"] for sample in samples]),
            "target": [torch.stack(scale) for scale in zip(*targets, strict=True)]
            if self.enable_deep_supervision
            else torch.stack(targets),
            "keys": [f"noise_{index}" for index in range(len(samples))],
        }

    @property
    def augments(self) -> bool:
        """Whether training patches are augmented, by nnU-Net's recipe."""
        return True

    def _training_loader(self, dataset: Any) -> Callable[..., SeededLoader]:
        """What makes the loader of the training batches, given the cases it draws from."""
        return SeededLoader

    def _loader(
        self,
        dataset: Any,
        patch_size: Any,
        transforms: Any,
        label_manager: LabelManager,
        make: Callable[..., SeededLoader] = SeededLoader,
    ) -> SeededLoader:
        return make(
            dataset,
            self.batch_size,
            patch_size,
            self.configuration_manager.patch_size,
            label_manager,
            oversample_foreground_percent=self.oversample_foreground_percent,
            probabilistic_oversampling=self.probabilistic_oversampling,
            transforms=transforms,
        )

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        for module in self._frozen_modules():
            module.eval()

    def train_step(self, batch: dict) -> dict:
        with self.cpu_autocast():
            return super().train_step(batch)

    def validation_step(self, batch: dict) -> dict:
        with self.cpu_autocast():
            return super().validation_step(batch)

    def on_epoch_end(self) -> None:
        super().on_epoch_end()
        latest = {key: self.logger.get_value(key, step=-1) for key in ("train_losses", "val_losses", "mean_fg_dice")}
        self.report_epoch(
            f"epoch {self.current_epoch}/{self.num_epochs}  training loss {latest['train_losses']:.3f}  "
            f"validation loss {latest['val_losses']:.3f}  pseudo DSC {np.round(latest['mean_fg_dice'], 3):.3f}"
        )

    def predictor(self) -> nnUNetPredictor:
        """Of the trained network as it is, for the fold's validation cases."""
        return predictor_of(self)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict and score the fold's validation cases, skipping those already predicted by this checkpoint."""
        validate_fold(self, save_probabilities)
