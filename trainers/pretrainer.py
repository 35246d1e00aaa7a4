"""Diffusion pretraining of the planned network, with the coordinate head beside it (arXiv 2501.19265)."""

from __future__ import annotations

from pathlib import Path
from time import time
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from diffseg_nnunet.coordinates.head import CoordinateHead, FeatureTap
from diffseg_nnunet.coordinates.positions import geometry_from_properties, preprocessed_to_patient
from diffseg_nnunet.diffusion.conditioning import TimeConditioning, fold
from diffseg_nnunet.diffusion.gaussian import GaussianDiffusion
from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.planning.section import UNLABELLED_SUFFIX, stage_plan
from diffseg_nnunet.preprocessed import preprocessed_cases
from diffseg_nnunet.training import checkpoint as checkpoints
from diffseg_nnunet.training.ema import ExponentialMovingAverage
from diffseg_nnunet.training.history import History
from diffseg_nnunet.training.objective import PretrainingObjective
from diffseg_nnunet.training.precision import autocast
from diffseg_nnunet.training.schedules import warmup_cosine
from diffseg_nnunet.training.seeding import derived_seed
from diffseg_nnunet.training.settings import PretrainingSettings

from .base import NOISE_STREAM, VALIDATION_NOISE_STREAM, DiffSegTrainerBase, unwrapped
from .loaders import PatchPairLoader, SeededLoader
from .pool import PooledDataset, PoolMember


class DiffSegPretrainer(DiffSegTrainerBase):
    """Trains the planned network to denoise, and a head on its decoder to tell where each voxel lies.

    Fold N pretrains on the training cases of fold N and the unlabelled pool, so that its validation cases stay unseen;
    fold "all" on every case. The checkpoint's ``network_weights`` are a stock network's.
    """

    settings: PretrainingSettings

    def default_settings(self) -> PretrainingSettings:
        return PretrainingSettings.from_plan(self.diffseg)

    def apply(self, settings: PretrainingSettings) -> None:
        super().apply(settings)
        self.enable_deep_supervision = False
        stage = stage_plan(self.plans_manager.plans, self.configuration_name, "pretraining")
        self.patch_size, self._planned_batch_size = stage["patch_size"], stage["batch_size"]
        self.history = History()

    # -- network and optimiser ----------------------------------------------------------------------------------------

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The planned network with as many outputs as inputs: it predicts noise, not classes."""
        return nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_input_channels, enable_deep_supervision=False
        )

    def _do_i_compile(self) -> bool:
        return False  # the conditioning enters by hooks, which change with every time step

    def _set_batch_size_and_oversample(self) -> None:
        self.batch_size = self._planned_batch_size
        self.oversample_foreground_percent = 0.0

    def initialize(self) -> None:
        if not preprocessed_cases(Path(self.preprocessed_dataset_folder)):
            # an unlabelled data set: nnU-Net only wants a folder to read the file format from
            folders = [member.folder for member in self._unlabelled_members()]
            self.preprocessed_dataset_folder = str(folders[0]) if folders else self.preprocessed_dataset_folder
        super().initialize()

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, None]:
        network = unwrapped(self.network)
        self.conditioning = TimeConditioning(network).to(self.device)
        self.modules = {"network": network, "conditioning": self.conditioning}
        head, tap = None, None
        if self.settings.coordinates.mode == "auxiliary":
            last_stage = network.decoder.stages[-1]
            tap = FeatureTap(last_stage)
            head = CoordinateHead(network.encoder.output_channels[0]).to(self.device)
            self.modules["coordinate_head"] = head
        self.objective = PretrainingObjective(
            network, self.conditioning, GaussianDiffusion(self.settings.diffusion), self.settings.coordinates, head, tap
        )
        self.ema = ExponentialMovingAverage(self.modules, self.settings.ema_decay)
        self.parameters = [p for module in self.modules.values() for p in module.parameters()]
        optimizer = torch.optim.AdamW(
            self.parameters, self.settings.initial_lr, weight_decay=self.settings.weight_decay
        )
        return optimizer, None

    def _build_loss(self) -> None:
        """None: the objective needs the time step and the positions, not a target alone."""

    # -- data ---------------------------------------------------------------------------------------------------------

    def _unlabelled_members(self) -> list[PoolMember]:
        root = Path(self.preprocessed_dataset_folder_base) / (
            self.configuration_manager.data_identifier + UNLABELLED_SUFFIX
        )
        sources = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        members = [PoolMember(path.name, path, preprocessed_cases(path)) for path in sources]
        return [member for member in members if member.cases]

    def pools(self) -> tuple[PooledDataset, PooledDataset]:
        """The cases to learn from and those to watch the loss on; the latter never touch a weight."""
        own = Path(self.preprocessed_dataset_folder_base) / self.configuration_manager.data_identifier
        name = self.plans_manager.dataset_name
        unlabelled = self._unlabelled_members()
        if not preprocessed_cases(own):
            pool = PooledDataset(unlabelled)
            return pool, pool
        training, validation = self.do_split()
        pool = PooledDataset([PoolMember(name, own, tuple(training)), *unlabelled])
        return pool, PooledDataset([PoolMember(name, own, tuple(validation))])

    def build_loaders(self) -> tuple[SeededLoader, SeededLoader]:
        pool, watched = self.pools()
        self.pool_record = dict(pool.record())
        return self._loader(pool), self._loader(watched)

    def _loader(self, dataset: PooledDataset) -> PatchPairLoader:
        coordinates = self.settings.coordinates.mode != "none"
        return PatchPairLoader(
            dataset,
            self.batch_size,
            self.patch_size,
            self.patch_size,
            self.label_manager,
            matrices=self._matrices(dataset) if coordinates else None,
        )

    def _matrices(self, dataset: PooledDataset) -> dict[str, np.ndarray]:
        matrices = {}
        for identifier in dataset.identifiers:
            properties = dataset.properties(identifier)
            geometry = geometry_from_properties(properties)
            if geometry is None:
                raise BadInputError(
                    f"{identifier} has no 3D direction cosines, so its voxels have no place in the body.",
                    "Plan without coordinates: `diffseg plan ID --coordinates none`.",
                )
            matrices[identifier] = preprocessed_to_patient(
                geometry,
                self.plans_manager.transpose_forward,
                [start for start, _ in properties["bbox_used_for_cropping"]],
                properties["shape_after_cropping_and_before_resampling"],
                dataset.shape(identifier),
            )
        return matrices

    # -- steps --------------------------------------------------------------------------------------------------------

    def _compute_dtype(self) -> torch.dtype | None:
        if self.device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
        return self._autocast_dtype

    def _generator(self, stream: int, index: int) -> torch.Generator:
        generator = torch.Generator(device=self.device)
        return generator.manual_seed(derived_seed(self.settings.seed, stream, index))

    def _losses(self, batch: dict, generator: torch.Generator) -> dict[str, Tensor]:
        batch = {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with autocast(self.device, self._compute_dtype()):
            return self.objective(batch, generator)

    def train_step(self, batch: dict) -> dict:
        iterations = self.settings.epochs.iterations
        rate = self.settings.initial_lr * warmup_cosine(
            self._iteration, iterations, round(self.settings.warmup_share * iterations)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._losses(batch, self._generator(NOISE_STREAM, self._iteration))
        if not torch.isfinite(losses["loss"]):
            raise StageFailedError(
                f"The pretraining loss is not finite at iteration {self._iteration} "
                f"(cases {', '.join(sorted(set(batch['keys'])))}); the last checkpoint is intact.",
                "Look at these scans with `diffseg verify`, or lower the rate with `--initial-lr`.",
            )
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.parameters, self.settings.gradient_clip)
        self.optimizer.step()
        self.ema.update()
        self._report_iteration()
        return {name: float(value.detach()) for name, value in losses.items()}

    def on_train_epoch_start(self) -> None:
        self._iteration = self.current_epoch * self.num_iterations_per_epoch
        for module in self.modules.values():
            module.train()
        self.print_to_log_file("")
        self.print_to_log_file(f"Epoch {self.current_epoch}")

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        self._training_means = _means(train_outputs)

    def on_validation_epoch_start(self) -> None:
        for module in self.modules.values():
            module.eval()
        self._validation_index = 0

    def validation_step(self, batch: dict) -> dict:
        # the same noise every epoch, so that the curve shows the network and not the draw
        generator = self._generator(VALIDATION_NOISE_STREAM, self._validation_index)
        self._validation_index += 1
        with self.ema.applied():
            losses = self._losses(batch, generator)
        return {name: float(value) for name, value in losses.items()}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        self._validation_means = _means(val_outputs)

    def on_epoch_start(self) -> None:
        self._epoch_start = time()

    def on_epoch_end(self) -> None:
        row = {
            "epoch": self.current_epoch,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **{f"training_{name}": value for name, value in self._training_means.items()},
            **{f"validation_{name}": value for name, value in self._validation_means.items()},
            "seconds": time() - self._epoch_start,
        }
        self.history.add(row)
        self.print_to_log_file(row)
        self.current_epoch += 1
        self.save_checkpoint(str(self.latest_checkpoint))
        self.history.write(Path(self.output_folder))
        news = "  ".join(f"{name} {row[f'validation_{name}']:.3f}" for name in self._validation_means if name != "loss")
        self.report_epoch(f"epoch {self.current_epoch}/{self.num_epochs}  validation: {news}")

    def on_train_end(self) -> None:
        self.save_checkpoint(str(self.final_checkpoint))
        self.latest_checkpoint.unlink(missing_ok=True)
        self.history.plot(Path(self.output_folder) / "progress.png")
        self.print_to_log_file("Pretraining done.")

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Nothing to predict: the network denoises."""

    # -- checkpoint ---------------------------------------------------------------------------------------------------

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint whose ``network_weights`` stock nnU-Net starts from; the rest has keys of its own."""
        if self.disable_checkpointing:
            return
        with self.ema.applied():
            folded = fold(self.modules["network"], self.conditioning, self.settings.diffusion.fold_timestep)
        own = {f"{name}_state": module.state_dict() for name, module in self.modules.items()}
        content = {
            "network_weights": folded,
            **own,
            "ema_state": self.ema.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "current_epoch": self.current_epoch,
            "history": self.history.rows,
            "settings": self.settings.to_json(),
            "pool": self.pool_record,
            "trainer_name": type(self).__name__,
            "plans": self.plans_manager.plans,
            "configuration": self.configuration_name,
            "fold": self.fold,
            "dataset_json": self.dataset_json,
        }
        # on the CPU: stock nnU-Net reads checkpoints without map_location
        checkpoints.save(filename, _to_cpu(content))

    def load_checkpoint(self, filename_or_checkpoint: str | dict) -> None:
        """Continue from a checkpoint of this trainer; reads tensors and plain values only."""
        if not self.was_initialized:
            self.initialize()
        content = checkpoints.load_safely(filename_or_checkpoint)
        for name, module in self.modules.items():
            module.load_state_dict(content[f"{name}_state"])
        self.ema.load_state_dict(content["ema_state"])
        self.optimizer.load_state_dict(content["optimizer_state"])
        self.current_epoch = content["current_epoch"]
        self.pool_record = content["pool"]
        self.history = History(content["history"])


def _means(outputs: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([output[name] for output in outputs])) for name in outputs[0]}


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_cpu(entry) for entry in value)
    return value
