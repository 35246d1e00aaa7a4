"""Fine-tuning of a pretrained network, in whole or its decoder alone, and its twin from scratch.

The coordinate head may stay on as a regulariser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import Tensor, nn

from diffseg_nnunet.coordinates.head import CoordinateSettings
from diffseg_nnunet.coordinates.positions import case_to_patient
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.training.adaptation import Adaptation, canonical
from diffseg_nnunet.training.settings import (
    DecoderSettings,
    FinetuningSettings,
    SegmentationSettings,
    Strategy,
    TrainingSettings,
)

from .loaders import SeededLoader
from .located import LocatedLoader
from .regulariser import CoordinateRegulariser, RegularisedLoss
from .segmentation import SegmentationTrainer

_KEY = "coordinate_regulariser"


class PlannedNetworkTrainer(SegmentationTrainer):
    """A training of the planned network, probes apart, with the coordinates kept on if the settings say so.

    Then the training loss is nnU-Net's plus a weighted label-free one of where voxels lie; the curves show nnU-Net's
    alone. ``network_weights`` of the checkpoint are a stock network's all the same.

    Attributes:
        regulariser: after :meth:`initialize`; None where coordinates are not kept.
    """

    settings: SegmentationSettings
    settings_type: type[TrainingSettings] = SegmentationSettings
    regulariser: CoordinateRegulariser | None = None
    _matrices: dict[str, np.ndarray] | None = None

    @property
    def _planned_coordinates(self) -> CoordinateSettings:
        return CoordinateSettings(**self.diffseg["coordinates"])

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        if self.settings.keep_coordinates:
            self.regulariser = CoordinateRegulariser(
                self.planned_network, self._planned_coordinates, self.settings.keep_coordinates, self.device
            )
        return super().configure_optimizers()

    def _trained_parameters(self) -> list[nn.Parameter]:
        trained = super()._trained_parameters()
        return trained if self.regulariser is None else [*trained, *self.regulariser.head.parameters()]

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        return loss if self.regulariser is None else RegularisedLoss(loss, self.regulariser)

    def share_network(self) -> None:
        super().share_network()
        if self.regulariser is not None:
            self.regulariser.share()

    # -- data ---------------------------------------------------------------------------------------------------------

    def _training_loader(self, dataset: Any) -> Callable[..., SeededLoader]:
        if self.regulariser is None:
            return super()._training_loader(dataset)
        if self._matrices is None:  # once, since the cases' properties are read
            self._matrices = {case: self._matrix(dataset, case) for case in dataset.identifiers}
        return partial(LocatedLoader, matrices=self._matrices, points=self._planned_coordinates.points_per_patch)

    def _matrix(self, dataset: Any, case: str) -> np.ndarray:
        data, _, _, properties = dataset.load_case(case)
        matrix = case_to_patient(properties, self.plans_manager.transpose_forward, data.shape[1:])
        if matrix is None:
            raise BadInputError(
                f"{case} has no 3D direction cosines, so its voxels have no place in the body.",
                "Train without --keep-coordinates.",
            )
        return matrix

    def random_batch(self) -> dict[str, Any]:
        batch = super().random_batch()
        if self.regulariser is None:
            return batch
        count, patch_size = self._planned_coordinates.points_per_patch, self.configuration_manager.patch_size
        sizes = torch.tensor([1] * (3 - len(patch_size)) + list(patch_size))
        voxels = (torch.rand(self.batch_size, count, 3) * sizes).long()
        return {
            **batch,
            "voxels": voxels,
            "positions": voxels.double(),
            "inside": torch.ones((self.batch_size, count), dtype=torch.bool),
            "scan": torch.arange(self.batch_size),
        }

    # -- steps --------------------------------------------------------------------------------------------------------

    def train_step(self, batch: dict) -> dict:
        if self.regulariser is None:
            return super().train_step(batch)
        with self.regulariser.asked(batch):
            super().train_step(batch)
        # of its own loss nnU-Net makes the curve, which so stays comparable with validation and with other trainings
        return {name: value.cpu().numpy() for name, value in self.regulariser.terms.items()}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(train_outputs)
        if self.regulariser is not None:
            mean = float(np.mean([output["coordinates"] for output in train_outputs]))
            self.print_to_log_file(f"coordinate loss {mean:.4f}")
            for logger in self.logger.loggers:
                logger.log("coordinate_losses", mean, self.current_epoch)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        if self.regulariser is not None:
            self.regulariser.close()
        super().perform_actual_validation(save_probabilities)

    # -- checkpoint ---------------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        if self.regulariser is None:
            return super().own_state()
        record = {"weight": self.settings.keep_coordinates, "head": self.regulariser.head.state_dict()}
        return super().own_state() | {_KEY: record}

    def take_own_state(self, content: Mapping[str, Any]) -> None:
        super().take_own_state(content)
        if self.regulariser is not None:
            self.regulariser.head.load_state_dict(content[_KEY]["head"])


class DiffSegTrainer(PlannedNetworkTrainer):
    """Fine-tuning of all weights, from those of the pretrained network that the settings name."""

    settings: FinetuningSettings
    settings_type: type[TrainingSettings] = FinetuningSettings
    strategy: Strategy = "finetune"

    def start_from(self, weights: Mapping[str, Tensor], source: str) -> int:
        with self._decoder_kept():
            count = super().start_from(weights, source)
        return count if self.settings.transfer == "all" else len(self._of_encoder(weights))

    def adapt_from(self, weights: Mapping[str, Tensor], source: str) -> Adaptation:
        with self._decoder_kept():
            return super().adapt_from(weights, source)

    @contextmanager
    def _decoder_kept(self) -> Iterator[None]:
        """Undo what the block does to the decoder, where the encoder alone is transferred."""
        if self.settings.transfer == "all":
            yield
            return
        before = {key: tensor.clone() for key, tensor in self.planned_network.state_dict().items()}
        yield
        encoder = self._of_encoder(self.planned_network.state_dict())
        self.planned_network.load_state_dict({**before, **encoder})

    @staticmethod
    def _of_encoder(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The encoder's, under all of their names."""
        return {key: tensor for key, tensor in weights.items() if canonical(key).startswith("encoder.")}


class DiffSegTrainerScratch(PlannedNetworkTrainer):
    """The twin: same plan, length, schedule and seed, random initial weights, nnU-Net's initial rate.

    Where coordinates are kept, its head starts from random weights, too.
    """

    strategy: Strategy = "scratch"


class DiffSegTrainerDecoder(DiffSegTrainer):
    """The pretrained encoder frozen; decoder and output layers are trained (arXiv 2402.15216, "fine-tuning decoder").

    The result is a stock network, as after fine-tuning.
    """

    settings_type: type[TrainingSettings] = DecoderSettings
    strategy: Strategy = "decoder"
    frozen = ("encoder",)
