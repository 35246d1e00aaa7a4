"""Diffusion pretraining of the planned network, with body coordinates beside it (arXiv 2501.19265)."""

from __future__ import annotations

import copy
from pathlib import Path
from time import time
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from diffseg_nnunet.coordinates.guidance import MAP_CHANNELS
from diffseg_nnunet.coordinates.head import CoordinateRegressor
from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.planning.section import stage_plan
from diffseg_nnunet.preprocessed import preprocessed_cases
from diffseg_nnunet.training import checkpoint as checkpoints
from diffseg_nnunet.training import processes
from diffseg_nnunet.training.assembly import assemble
from diffseg_nnunet.training.draws import draw
from diffseg_nnunet.training.history import History
from diffseg_nnunet.training.objective import DenoisingObjective, RegressionObjective
from diffseg_nnunet.training.precision import autocast, choose_dtype, float_format
from diffseg_nnunet.training.processes import mean_of_rows
from diffseg_nnunet.training.schedules import warmup_cosine
from diffseg_nnunet.training.seeding import derived_seed
from diffseg_nnunet.training.settings import PretrainingSettings

from .base import NOISE_STREAM, VALIDATION_NOISE_STREAM, unwrapped
from .loggers import log_picture
from .phases import Phase
from .pool import unlabelled_members
from .pretraining_data import PretrainingDataTrainer

_REGRESSOR_THINNER = 2  # the regressor's share of a step stays small
_FEWEST_FEATURES = 4


class DiffSegPretrainer(PretrainingDataTrainer):
    """Trains the planned network to denoise, and to tell where each voxel lies.

    What it is trained on is the setting ``pool``: by default the training cases of the fold and the unlabelled images,
    so that the fold's validation cases stay unseen. The checkpoint's ``network_weights`` are a stock network's.
    """

    def default_settings(self) -> PretrainingSettings:
        return PretrainingSettings.from_plan(self.diffseg)

    def apply(self, settings: PretrainingSettings) -> None:
        super().apply(settings)
        self.enable_deep_supervision = False
        self.batches_per_iteration = settings.accumulate
        stage = stage_plan(self.plans_manager.plans, self.configuration_name, "pretraining")
        self.patch_size, self._planned_batch_size = stage["patch_size"], stage["batch_size"]
        self.history = History()
        self._skipped_in_a_row = 0

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

    @staticmethod
    def build_regressor(plans_manager: Any, configuration_manager: Any, num_input_channels: int) -> nn.Module:
        """The planned topology with half its features: gives the coordinate map of guidance."""
        thin = copy.deepcopy(configuration_manager)
        arguments = thin.configuration["architecture"]["arch_kwargs"]
        features = [max(_FEWEST_FEATURES, n // _REGRESSOR_THINNER) for n in arguments["features_per_stage"]]
        arguments["features_per_stage"] = features
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, thin, num_input_channels, MAP_CHANNELS, enable_deep_supervision=False
        )
        return CoordinateRegressor(network)

    def _set_batch_size_and_oversample(self) -> None:
        self.batch_size = self._planned_batch_size
        self.oversample_foreground_percent = 0.0

    def initialize(self) -> None:
        if not preprocessed_cases(Path(self.preprocessed_dataset_folder)):
            # an unlabelled data set: nnU-Net only wants a folder to read the file format from
            folder, data = Path(self.preprocessed_dataset_folder_base), self.configuration_manager.data_identifier
            folders = [member.folder for member in unlabelled_members(folder, data)]
            self.preprocessed_dataset_folder = str(folders[0]) if folders else self.preprocessed_dataset_folder
        super().initialize()

    def share_network(self) -> None:
        """Nothing to wrap: several modules learn together, so their gradients are averaged after each step."""

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Nothing: the network is built without."""

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, None]:
        settings, regressor, first_epoch = self.settings, None, 0
        self.phases: list[Phase] = []
        if settings.coordinates.mode == "guidance":
            regressor = self.build_regressor(self.plans_manager, self.configuration_manager, self.num_input_channels)
            regressor = regressor.to(self.device)
            share = settings.coordinates.regressor_share
            first_epoch = min(max(1, round(share * self.num_epochs)), self.num_epochs - 1)
            objective = RegressionObjective(regressor, settings.coordinates)
            modules = {"regressor": regressor}
            self.phases.append(Phase("regressor", modules, objective, range(first_epoch), settings))
        network = unwrapped(self.network)
        compiled = None if network is self.network else self.network
        self.assembly = assemble(network, regressor, settings, self.device, compiled)
        self.denoiser = self.assembly.denoiser
        objective = DenoisingObjective(self.denoiser, settings.coordinates, self.assembly.head, self.assembly.tap)
        epochs = range(first_epoch, self.num_epochs)
        self.phases.append(Phase("denoiser", self.assembly.modules, objective, epochs, settings))
        return self.phases[0].optimizer, None

    @property
    def phase(self) -> Phase:
        """The phase of the current epoch; the last one when the training is over."""
        return next((phase for phase in self.phases if self.current_epoch in phase.epochs), self.phases[-1])

    def _build_loss(self) -> None:
        """None: the objective needs the time step and the positions, not a target alone."""

    def largest_epoch(self) -> int:
        return self.phases[-1].epochs.start  # the denoiser's, with guidance's regressor frozen beside it

    # -- steps --------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.device.type == "cuda":
            reason = "" if self._compute_dtype() else " (this GPU has no bfloat16: slower, and twice the memory)"
            self.print_to_log_file(f"precision: {self._compute_dtype() or torch.float32}{reason}")

    def _choose_dtype(self, sample: Tensor) -> tuple[torch.dtype | None, str]:
        t = torch.full((len(sample),), self.settings.diffusion.fold_timestep)

        def denoise(patches: Tensor) -> Tensor:
            return self.denoiser(patches, t)

        return choose_dtype(self.settings.precision, denoise, sample)

    def _compute_dtype(self) -> torch.dtype | None:
        if self.device.type == "cuda":
            return float_format(self.device)
        return self._autocast_dtype

    def _generators(self, stream: int, index: int, scans: Tensor) -> list[torch.Generator]:
        """One for each scan of a batch, whichever process holds it."""
        keys = [derived_seed(self.settings.seed, stream, index, int(scan)) for scan in scans.unique()]
        return [torch.Generator(device=self.device).manual_seed(key) for key in keys]

    def _losses(self, batch: dict, stream: int, index: int) -> dict[str, Tensor]:
        generators = self._generators(stream, index, batch["scan"])
        batch = {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        draws = draw(batch, self.denoiser.diffusion, self.settings.coordinates, generators)
        with autocast(self.device, self._compute_dtype()):
            return self.phase.objective(batch, draws)

    def train_step(self, batch: dict) -> dict:
        phase = self.phase
        self._set_rate(phase)
        phase.optimizer.zero_grad(set_to_none=True)
        rows, cases = [], set()
        for part in range(self.batches_per_iteration):
            batch = batch if part == 0 else next(self.dataloader_train)
            cases |= set(batch["keys"])
            losses = self._losses(batch, NOISE_STREAM, self._iteration * self.batches_per_iteration + part)
            (losses["loss"] / self.batches_per_iteration).backward()
            rows.append({name: float(value.detach()) for name, value in losses.items()})
        processes.average_gradients(phase.parameters)
        norm = nn.utils.clip_grad_norm_(phase.parameters, self.settings.gradient_clip)
        finite = bool(np.isfinite([row["loss"] for row in rows]).all() and torch.isfinite(norm))
        if processes.all_agree(finite, self.device):
            phase.optimizer.step()
            phase.ema.update()
            self._skipped_in_a_row = 0
        else:
            self._skip(sorted(set().union(*processes.gathered(cases))))
        self._report_iteration()
        return mean_of_rows(rows)

    def _set_rate(self, phase: Phase) -> None:
        per_epoch = self.num_iterations_per_epoch
        iterations = len(phase.epochs) * per_epoch
        step = self._iteration - phase.epochs.start * per_epoch
        warmup = round(self.settings.warmup_share * iterations)
        for group in phase.optimizer.param_groups:
            group["lr"] = self.settings.initial_lr * warmup_cosine(step, iterations, warmup)

    def _skip(self, cases: list[str]) -> None:
        """Leave out an iteration whose loss or gradient is not finite; end the training when that goes on."""
        self._skipped_in_a_row += 1
        message = f"The pretraining loss or its gradient is not finite at iteration {self._iteration}"
        self.print_to_log_file(f"{message}: skipped. Cases: {', '.join(cases)}")
        self.report_epoch(f"iteration {self._iteration} skipped, not finite; cases {', '.join(cases)}")
        if self._skipped_in_a_row >= self.settings.skip_limit:
            raise StageFailedError(
                f"{message}, {self._skipped_in_a_row} times in a row by now (last cases: {', '.join(cases)}); "
                "the last checkpoint is intact.",
                "Look at these scans with `diffseg verify`, or lower the rate with `--initial-lr`.",
            )

    def on_train_epoch_start(self) -> None:
        self._iteration = self.current_epoch * self.num_iterations_per_epoch
        self.optimizer = self.phase.optimizer
        for phase in self.phases:
            if phase.epochs.stop == self.current_epoch:  # from now on it is used as it will be: averaged and frozen
                phase.ema.keep()
            phase.train(phase is self.phase)
        self.print_to_log_file("")
        self.print_to_log_file(f"Epoch {self.current_epoch}")

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        self._training_means = _means(train_outputs)

    def on_validation_epoch_start(self) -> None:
        for phase in self.phases:
            phase.train(False)
        self._validation_index = 0

    def validation_step(self, batch: dict) -> dict:
        # the same noise levels every epoch, so that the curve shows the network rather than the draw
        with self.phase.ema.applied():
            losses = self._losses(batch, VALIDATION_NOISE_STREAM, self._validation_index)
        if self._validation_index == 0:
            self._pictured = batch
        self._validation_index += 1
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
        if self.rank == 0:
            self.history.write(self.results_folder)
            self._log(row)
            self._picture()
        shown = {n: v for n, v in self._validation_means.items() if n != "loss" and not n.startswith("denoising_")}
        news = "  ".join(f"{name} {value:.3f}" for name, value in shown.items() if np.isfinite(value))
        self.report_epoch(f"epoch {self.current_epoch}/{self.num_epochs}  validation: {news}")

    def _log(self, row: dict[str, float]) -> None:
        """To nnU-Net's further loggers (W&B, TensorBoard); its local one knows segmentation's values only."""
        for logger in self.logger.loggers:
            for name, value in row.items():
                if name != "epoch" and np.isfinite(value):
                    logger.log(name, value, row["epoch"])

    def _picture(self) -> None:
        every = max(1, self.num_epochs // max(1, self.settings.pictures))
        if not self.settings.pictures or self.current_epoch % every:
            return
        from .pretraining_picture import draw_progress

        path = self.results_folder / "pictures" / f"epoch_{self.current_epoch - 1:04d}.png"
        try:
            draw_progress(self, self._pictured, path)
        except Exception as error:  # a picture is no reason to end a training
            self.report_epoch(f"the picture of this epoch could not be drawn: {error}")
            return
        log_picture(self.logger.loggers, "denoising", path, self.current_epoch - 1)

    def on_train_end(self) -> None:
        self.save_checkpoint(str(self.final_checkpoint))
        if self.rank == 0:
            self.latest_checkpoint.unlink(missing_ok=True)
            self.history.plot(self.results_folder / "progress.png")
            self.close_loggers()
        processes.wait_for_all()
        self.print_to_log_file("Pretraining done.")

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Nothing to predict: the network denoises."""

    # -- checkpoint ---------------------------------------------------------------------------------------------------

    def folded(self) -> dict[str, Tensor]:
        """The averaged weights, folded at the planned time step, without the inputs of guidance: a stock network's."""
        with self.phases[-1].ema.applied():
            return self.denoiser.folded(self.settings.diffusion.fold_timestep)

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint whose ``network_weights`` stock nnU-Net starts from; the rest has keys of its own."""
        if self.disable_checkpointing or self.rank > 0:
            return
        content = {
            "network_weights": self.folded(),
            "phases": {phase.name: phase.state_dict() for phase in self.phases},
            "current_epoch": self.current_epoch,
            "precision": str(self._compute_dtype() or torch.float32).removeprefix("torch."),
            "device": self.device.type,
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
        checkpoints.save(filename, checkpoints.on_cpu(content))

    def load_checkpoint(self, filename_or_checkpoint: str | dict) -> None:
        """Continue from a checkpoint of this trainer; reads tensors and plain values only.

        Raises:
            BadInputError: it is another trainer's, or another plan's; the message lists what differs.
        """
        if not self.was_initialized:
            self.initialize()
        content = checkpoints.load_safely(filename_or_checkpoint)
        self._require_same_mode(content, str(filename_or_checkpoint))
        checkpoints.require_same_network(self.folded(), content["network_weights"], str(filename_or_checkpoint))
        for phase in self.phases:
            phase.load_state_dict(content["phases"][phase.name])
        self.current_epoch = content["current_epoch"]
        self._cpu_precision = content["precision"] if self.device.type == content["device"] == "cpu" else None
        self.pool_record = self._seen_before = content["pool"]
        self.history = History(content["history"])

    def _require_same_mode(self, content: dict[str, Any], source: str) -> None:
        theirs = content.get("settings", {}).get("coordinates", {}).get("mode", "unknown")
        ours = self.settings.coordinates.mode
        if theirs != ours:
            raise BadInputError(
                f"{source} was pretrained with coordinates in mode '{theirs}', this pretraining is in mode '{ours}'.",
                f"Go on with `--coordinates {theirs}`, or begin afresh with `--no-resume`.",
            )


def _means(outputs: list[dict[str, float]]) -> dict[str, float]:
    """Means over an epoch's iterations, and over the processes that shared them."""
    return mean_of_rows([mean_of_rows(rows) for rows in processes.gathered(outputs)])
