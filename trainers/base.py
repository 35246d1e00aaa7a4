"""What both trainers share: settings, seeded loaders, atomic checkpoints, CPU precision, progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import torch
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, distributed, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from diffseg_nnunet.atomic import write_file
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.planning.hardware import (
    WORKER_PROCESS_GIB,
    augmentation_workers,
    available_memory_gib,
    has_c_compiler,
    requested_augmentation_workers,
    usable_cores,
)
from diffseg_nnunet.planning.section import diffseg_section
from diffseg_nnunet.training import checkpoint as checkpoints
from diffseg_nnunet.training import processes
from diffseg_nnunet.training.precision import autocast, choose_dtype, prefer_channels_last, uncompared_dtype
from diffseg_nnunet.training.seeding import seed_everything
from diffseg_nnunet.training.settings import TrainingSettings

from . import loggers
from .loaders import SeededLoader
from .loggers import TensorBoardLogger
from .serving import batches_gib, serve, shut_down

TRAINING_STREAM, VALIDATION_STREAM, PRECISION_STREAM, NOISE_STREAM, VALIDATION_NOISE_STREAM = range(5)

Progress = Callable[[int, int, str], None]
"""Called with (iterations done, iterations in all, one line of news or "")."""

_SECONDS_BETWEEN_PLOTS = 60.0
_WANDB = "nnUNet_wandb_enabled"
_FEW_CORES = 2
_CPU_PRECISION = "cpu_precision"


class ThrottledPlots:
    """nnU-Net's logger with its progress plot drawn once a minute: the plot takes seconds, a short epoch may not."""

    def __init__(self, logger: MetaLogger):
        self._logger = logger
        self._last = -_SECONDS_BETWEEN_PLOTS

    def __getattr__(self, name: str) -> Any:
        return getattr(self._logger, name)

    def plot_progress_png(self, output_folder: str, force: bool = False) -> None:
        if force or monotonic() - self._last >= _SECONDS_BETWEEN_PLOTS:
            self._logger.plot_progress_png(output_folder)
            self._last = monotonic()


def unwrapped(network: nn.Module) -> nn.Module:
    """The network itself, without the wrappers of several processes and of torch.compile."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network


def _own_device(device: torch.device) -> torch.device:
    """The GPU of this process on its node, for any GPU."""
    if device.type != "cuda":
        return device
    # whoever started several processes, torchrun or nnUNetv2_train, has given each its GPU
    together = distributed.is_available() and distributed.is_initialized()
    return torch.device("cuda", torch.cuda.current_device() if together else 0)


class DiffSegTrainerBase(nnUNetTrainer):
    """An nnU-Net trainer whose length, seed and precision are settings, and whose epochs end in whole checkpoints.

    The signature is nnU-Net's and must stay so. Stock commands train with the default settings; :meth:`apply` sets
    others before :meth:`initialize`.
    """

    settings: TrainingSettings
    settings_type: type[TrainingSettings] = TrainingSettings
    samples_per_group = 1
    batches_per_iteration = 1

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        self.diffseg = diffseg_section(plans)
        if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0:
            os.environ[_WANDB] = "0"  # nnU-Net would begin a run in every process, in one folder
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.device = _own_device(device)  # nnU-Net takes the rank among all nodes for the index of a GPU
        self.rank = distributed.get_rank() if self.is_ddp else 0
        self.processes = distributed.get_world_size() if self.is_ddp else 1
        if self.rank == 0 and TensorBoardLogger.is_available():
            self.logger.loggers.append(TensorBoardLogger(Path(self.output_folder) / "tensorboard"))
        self.logger = ThrottledPlots(self.logger)
        self.results_folder = Path(self.output_folder)
        self.save_every = 1
        self.progress: Progress | None = None
        self._autocast_dtype: torch.dtype | None = None
        self._cpu_precision: str | None = None
        """torch's name of the format that was chosen on a CPU, here or before an interruption."""
        self._precision_sample: Tensor | None = None
        self._iteration = 0
        self.apply(self.default_settings())

    def default_settings(self) -> TrainingSettings:
        return self.settings_type()

    def apply(self, settings: TrainingSettings) -> None:
        """Take over settings; before :meth:`initialize`."""
        self.settings = settings
        epochs = settings.epochs
        self.num_epochs = epochs.epochs
        self.num_iterations_per_epoch = epochs.iterations_per_epoch
        self.num_val_iterations_per_epoch = epochs.validation_iterations

    @property
    def warmup_epochs(self) -> int:
        return round(self.settings.warmup_share * self.num_epochs)

    @property
    def final_checkpoint(self) -> Path:
        return self.results_folder / "checkpoint_final.pth"

    @property
    def latest_checkpoint(self) -> Path:
        return self.results_folder / "checkpoint_latest.pth"

    def initialize(self) -> None:
        seed_everything(self.settings.seed)
        if self.rank > 0:
            # nnU-Net writes some files from every process: those of the others go nowhere
            self._unread = TemporaryDirectory(prefix="diffseg_")
            self.output_folder_base = self._unread.name
            self.output_folder = str(Path(self._unread.name) / f"fold_{self.fold}")
        if super()._do_i_compile() and not has_c_compiler():
            self.print_to_log_file("torch.compile is off, training is slower: it needs a C compiler, and none is found")
        together, self.is_ddp = self.is_ddp, False  # nnU-Net's own wrapping is for the GPUs of one node
        super().initialize()
        self.is_ddp = together
        if together:
            self.batch_size = self.own_batch_size(self.batch_size, self.processes)
            self.share_network()

    def _do_i_compile(self) -> bool:
        return has_c_compiler() and super()._do_i_compile()

    @classmethod
    def own_batch_size(cls, batch_size: int, together: int) -> int:
        """Samples of each of the processes that train together.

        Raises:
            BadInputError: they cannot share the batch equally.
        """
        try:
            return processes.share_of_batch(batch_size, cls.samples_per_group, together)
        except ValueError as error:
            raise BadInputError(str(error), "Start torchrun with one of them, or plan for another batch.") from error

    def share_network(self) -> None:
        """Prepare the initialised network for several processes, of one or many nodes."""
        if self.device.type == "cuda":
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        devices = [self.device.index] if self.device.type == "cuda" else None
        self.network = DistributedDataParallel(self.network, device_ids=devices)
        self.loss = self._build_loss()  # once more: its Dice now spans the whole batch

    def learning(self) -> tuple[nn.Module, ...]:
        """The networks of a step, after :meth:`initialize`."""
        return (self.network,)

    # -- data ---------------------------------------------------------------------------------------------------------

    def build_loaders(self) -> tuple[SeededLoader, SeededLoader]:
        """Loaders of training and validation batches, not started."""
        raise NotImplementedError

    def random_batch(self) -> dict[str, Any]:
        """A batch of noise in the form of the loaders' training batches, after :meth:`initialize`; no data are read."""
        raise NotImplementedError

    def largest_epoch(self) -> int:
        """An epoch whose iterations take the most memory of all, after :meth:`initialize`."""
        return 0

    def worker_count(self, loader: SeededLoader) -> int:
        """Processes that make the batches of `loader`: as set, else as exported for nnU-Net, else as fit in.

        None on a small CPU: training needs its cores.
        """
        requested = requested_augmentation_workers() if self.settings.workers is None else self.settings.workers
        if requested is not None:
            return requested
        sharing = processes.local_world_size()
        cores = max(1, usable_cores() // sharing)
        if self.device.type == "cpu" and cores <= _FEW_CORES:
            return 0
        worker_gib = WORKER_PROCESS_GIB + batches_gib(loader, self.num_input_channels)
        return augmentation_workers(cores, available_memory_gib() / sharing, worker_gib)

    def get_dataloaders(self) -> tuple[Any, Any]:
        training, validation = self.build_loaders()
        workers, pin = self.worker_count(training), self.device.type == "cuda"
        validation_workers = min(1, workers)
        seed, epoch = self.settings.seed, self.current_epoch
        first = epoch * self.num_iterations_per_epoch * self.batches_per_iteration
        first_validation = epoch * self.num_val_iterations_per_epoch
        share = (self.rank, self.processes)
        if self.device.type == "cpu" and self._certain_dtype() is None:
            sample = serve(training.start_at(seed, PRECISION_STREAM, 0, 1), 0, pin_memory=False)
            self._precision_sample = next(sample)["data"][:2]
        training.start_at(seed, TRAINING_STREAM, first, workers, *share)
        validation.start_at(seed, VALIDATION_STREAM, first_validation, validation_workers, *share)
        return serve(training, workers, pin), serve(validation, validation_workers, pin)

    # -- precision ----------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.device.type == "cpu":
            self._autocast_dtype, reason = self._certain_dtype() or self._choose_dtype(self._precision_sample)
            self._precision_sample = None
            self._cpu_precision = str(self._autocast_dtype or torch.float32).removeprefix("torch.")
            self.print_to_log_file(f"precision: {reason}")
            for network in self.learning():
                # torch's wrapper adds up gradients by the layout that weights had when it was made
                if not isinstance(network, DistributedDataParallel):
                    prefer_channels_last(network, self.device, self._autocast_dtype)

    def _certain_dtype(self) -> tuple[torch.dtype | None, str] | None:
        """Autocast dtype on the CPU and the reason, where no comparison is needed."""
        if self._cpu_precision is None:
            return uncompared_dtype(self.settings.precision)
        # the network has learnt since, and could now compare otherwise
        dtype = None if self._cpu_precision == "float32" else getattr(torch, self._cpu_precision)
        return dtype, f"{self._cpu_precision}: as before it was interrupted"

    def _choose_dtype(self, sample: Tensor) -> tuple[torch.dtype | None, str]:
        """Autocast dtype on the CPU and the reason, by a comparison on some patches."""
        return choose_dtype(self.settings.precision, unwrapped(self.network), sample)

    def cpu_autocast(self) -> Any:
        """bfloat16 autocast where it was chosen; nothing on CUDA, where nnU-Net's own autocast applies."""
        return autocast(self.device, self._autocast_dtype)

    # -- life cycle ---------------------------------------------------------------------------------------------------

    def train_step(self, batch: dict) -> dict:
        result = super().train_step(batch)
        self._report_iteration()
        return result

    def _report_iteration(self) -> None:
        self._iteration += 1
        if self.progress is not None and self.rank == 0:
            self.progress(self._iteration, self.settings.epochs.iterations, "")

    def on_train_epoch_start(self) -> None:
        self._iteration = self.current_epoch * self.num_iterations_per_epoch
        super().on_train_epoch_start()

    def run_training(self) -> None:
        try:
            super().run_training()
        finally:  # also after an error or Ctrl-C; nnU-Net ends only the augmenters it knows
            shut_down(self.dataloader_train)
            shut_down(self.dataloader_val)

    def on_train_end(self) -> None:
        super().on_train_end()
        if self.rank == 0:
            self.logger.plot_progress_png(self.output_folder, force=True)
            self.close_loggers()

    def close_loggers(self, failed: bool = False) -> None:
        """End what further loggers hold open, after a training that did its work or failed."""
        loggers.close(self.logger.loggers, failed)

    def report_epoch(self, news: str) -> None:
        """One line about the epoch that has just ended."""
        if self.progress is not None and self.rank == 0:
            self.progress(self._iteration, self.settings.epochs.iterations, news)

    def save_checkpoint(self, filename: str) -> None:
        if self.rank == 0 and not self.disable_checkpointing:
            write_file(filename, self.write_checkpoint)

    def write_checkpoint(self, path: Path) -> None:
        """Write nnU-Net's checkpoint, and what is ours beside it, to a file that takes its name once it is whole."""
        super().save_checkpoint(str(path))
        if own := self.own_state():
            torch.save({**checkpoints.load_safely(path), **own}, path)

    def own_state(self) -> dict[str, Any]:
        """What a checkpoint holds besides nnU-Net's: tensors and plain values, under keys of their own."""
        return {} if self._cpu_precision is None else {_CPU_PRECISION: self._cpu_precision}

    def take_own_state(self, content: Mapping[str, Any]) -> None:
        """Take over what :meth:`own_state` put into a checkpoint."""
        if self.device.type == "cpu":
            self._cpu_precision = content.get(_CPU_PRECISION)

    def load_checkpoint(self, filename_or_checkpoint: str | dict) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        is_read = isinstance(filename_or_checkpoint, dict)
        self.take_own_state(filename_or_checkpoint if is_read else checkpoints.load_safely(filename_or_checkpoint))

    def plot_network_architecture(self) -> None:
        """Nothing: nnU-Net's plot needs a package that no longer installs, and only fills the log."""
