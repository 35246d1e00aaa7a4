"""TensorBoard as one more logger of nnU-Net's; W&B is nnU-Net's own, by its variables (``nnUNet_wandb_enabled=1``)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nnunetv2.training.logging.nnunet_logger import WandbLogger


class TensorBoardLogger:
    """Writes what nnU-Net's loggers get into an event file; the file is begun with the first value."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: Any = None

    @staticmethod
    def is_available() -> bool:
        """Whether the package tensorboard is installed (the extra ``tensorboard``)."""
        from importlib.util import find_spec

        return find_spec("tensorboard") is not None

    def update_config(self, config: dict[str, Any]) -> None:
        """Nothing: plans and settings lie beside the event file as JSON."""

    def log(self, key: str, value: Any, step: int) -> None:
        """One scalar at an epoch."""
        if isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0:
            self._open().add_scalar(key, float(value), step)

    def log_summary(self, key: str, value: Any) -> None:
        self._open().add_text(key, str(value))

    def picture(self, key: str, path: Path, step: int) -> None:
        """A PNG."""
        import matplotlib.image

        self._open().add_image(key, matplotlib.image.imread(path)[..., :3], step, dataformats="HWC")

    def close(self) -> None:
        """End the event file; a later value begins another."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
        return self._writer


def log_picture(loggers: Iterable[Any], key: str, path: Path, step: int) -> None:
    """Hand a PNG to those of nnU-Net's further loggers that take pictures."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.picture(key, path, step)
        elif isinstance(logger, WandbLogger):
            import wandb  # there, since its logger is

            logger.log(key, wandb.Image(str(path)), step)


def close(loggers: Iterable[Any], failed: bool = False) -> None:
    """End what nnU-Net's further loggers hold open; nothing the second time.

    A run of W&B ends with its training: the next one of this process would go on with it otherwise.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.close()
        elif isinstance(logger, WandbLogger):
            logger.run.finish(exit_code=int(failed))
