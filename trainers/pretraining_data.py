"""What a pretraining reads: the pool of its fold, pairs of patches with their places in the body, or noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id

from diffseg_nnunet.coordinates.positions import case_to_patient, geometry_from_properties
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.preprocessed import preprocessed_cases
from diffseg_nnunet.training.settings import PATCHES_PER_SCAN, PretrainingSettings

from .augmentation import PatchAugmentation
from .base import DiffSegTrainerBase
from .loaders import PatchPairLoader, SeededLoader
from .pool import PooledDataset, pools_of_fold, united

_MUCH_COARSER = 3  # nnU-Net's ratio of axes from which on it augments slices
_FEWEST_GUIDED_EPOCHS = 2  # one for the regressor, one for the denoiser


class PretrainingDataTrainer(DiffSegTrainerBase):
    """A trainer that reads pairs of patches of each scan of a pool."""

    settings: PretrainingSettings
    samples_per_group = PATCHES_PER_SCAN

    def apply(self, settings: PretrainingSettings) -> None:
        super().apply(settings)
        self.held_back: Sequence[str] = ()
        """``source/case`` of unlabelled scans that are not learnt from: the fold's validation patients."""
        self._seen_before: dict[str, list[str]] = {}  # by an interrupted run; a checkpoint forgets no case

    def pools(self) -> tuple[PooledDataset, PooledDataset]:
        """The cases to learn from and those to watch the loss on; the latter never touch a weight.

        Raises:
            BadInputError: there is nothing to learn from, or a validation case of the fold would be learnt from.
        """
        folder, data = Path(self.preprocessed_dataset_folder_base), self.configuration_manager.data_identifier
        training, validation = self.do_split() if preprocessed_cases(folder / data) else ([], [])
        return pools_of_fold(folder, data, self.settings.pool, self.fold, training, validation, self.held_back)

    @staticmethod
    def check_data(
        preprocessed: Path,
        data_identifier: str,
        fold: int | str,
        cases: Mapping[str, Sequence[str]],
        settings: PretrainingSettings,
        held_back: Sequence[str] = (),
    ) -> None:
        """Look at what would be pretrained on, and for how long, before there is a trainer.

        Args:
            preprocessed: the data set's folder in nnUNet_preprocessed.
            data_identifier: of the configuration.
            fold: or "all".
            cases: the fold's labelled ones, "train" and "val".
            settings: of the pretraining.
            held_back: as in :func:`pools_of_fold`.

        Raises:
            BadInputError: as :meth:`pools`; the cases have no place in the body, and coordinates are wanted; guidance
                has no epoch left to train the denoiser in.
        """
        if settings.coordinates.mode == "guidance" and settings.epochs.epochs < _FEWEST_GUIDED_EPOCHS:
            raise BadInputError(
                f"Guidance trains a regressor before the denoiser: {settings.iterations} iteration(s) are too few for "
                "both.",
                "Give more --iterations, or `--coordinates auxiliary`.",
            )
        training, validation = cases["train"], cases["val"]
        own = (settings.pool, fold, training, validation, held_back)
        for dataset in pools_of_fold(preprocessed, data_identifier, *own):
            if settings.coordinates.mode == "none":
                continue
            for identifier in dataset.one_of_each_source():  # one reader has read them all
                if geometry_from_properties(dataset.described(identifier)[0]) is None:
                    raise _without_place(identifier, preprocessed.name)

    def build_loaders(self) -> tuple[SeededLoader, SeededLoader]:
        pool, watched = self.pools()
        self.pool_record = united(self._seen_before, pool.record())
        augmentation = PatchAugmentation(self.patch_size, self._is_anisotropic()) if self.settings.augment else None
        return self._loader(pool, augmentation), self._loader(watched, None)

    def random_batch(self) -> dict[str, Any]:
        scans = self.batch_size // self.samples_per_group
        shape = tuple(self.patch_size)
        batch = {
            "data": torch.randn(self.batch_size, self.num_input_channels, *shape),
            "mask": torch.ones((self.batch_size, 1, *shape), dtype=torch.bool),
            "scan": torch.arange(scans).repeat_interleave(self.samples_per_group),
            "keys": [f"noise_{scan}" for scan in range(scans) for _ in range(self.samples_per_group)],
        }
        if self.settings.coordinates.mode != "none":
            batch["affine"] = torch.eye(3, 4, dtype=torch.float64).expand(self.batch_size, 3, 4).clone()
        return batch

    def _is_anisotropic(self) -> bool:
        """Whether turning a patch out of its last two axes would mix voxels of very different size."""
        spacing, patch = self.configuration_manager.spacing, self.patch_size
        flat = len(patch) == 3 and max(patch) / patch[0] > _MUCH_COARSER
        return flat or max(spacing) / min(spacing) > _MUCH_COARSER

    def _loader(self, dataset: PooledDataset, augmentation: PatchAugmentation | None) -> PatchPairLoader:
        coordinates = self.settings.coordinates.mode != "none"
        return PatchPairLoader(
            dataset,
            self.batch_size,
            self.patch_size,
            self.label_manager,
            augmentation,
            self._matrices(dataset) if coordinates else None,
            dataset.probabilities(self.settings.balance),
        )

    def _matrices(self, dataset: PooledDataset) -> dict[str, np.ndarray]:
        matrices = {}
        for identifier in dataset.identifiers:
            properties, shape = dataset.described(identifier)
            matrix = case_to_patient(properties, self.plans_manager.transpose_forward, shape)
            if matrix is None:
                raise _without_place(identifier, self.plans_manager.dataset_name)
            matrices[identifier] = matrix
        return matrices


def _without_place(identifier: str, dataset: str) -> BadInputError:
    plan = f"diffseg plan {convert_dataset_name_to_id(dataset)} --coordinates none"
    return BadInputError(
        f"{identifier} has no 3D direction cosines, so its voxels have no place in the body.",
        f"Pretrain without coordinates: `--coordinates none`; for `diffseg run`, plan without: `{plan}`, with the "
        "other options the plan had.",
    )
