"""Predictions on disk: written whole or not at all, one case at a time, through nnU-Net's own export."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.inference.export_prediction import export_prediction_from_logits, resample_and_save

from diffseg_nnunet.atomic import full_disk_named, remove_leftovers, temporary_sibling
from diffseg_nnunet.inference.uncertainty import UNCERTAINTY_FOLDER, Measure, write_map
from diffseg_nnunet.raw_dataset import VOLUME_ENDINGS
from diffseg_nnunet.verification import UnreadableVolumeError, read_volume


def endings(file_ending: str, with_probabilities: bool) -> tuple[str, ...]:
    """The files of one exported case; the segmentation is published last, so its presence means the case is done."""
    return (".npz", ".pkl", file_ending) if with_probabilities else (file_ending,)


def is_exported(folder: Path, case: str, file_ending: str, with_probabilities: bool) -> bool:
    """True if every file of the case is there."""
    return all((folder / f"{case}{ending}").is_file() for ending in endings(file_ending, with_probabilities))


def export_case(
    logits: Any,
    properties: dict,
    predictor: Any,
    folder: Path,
    case: str,
    with_probabilities: bool = False,
    uncertainty: Measure | None = None,
) -> None:
    """Resample logits to the image's grid and publish ``folder/case`` + ending.

    Args:
        logits: (classes, *preprocessed shape), tensor or array, as the predictor returns them.
        properties: of the case, as preprocessing returned them.
        predictor: nnU-Net's, initialised.
        with_probabilities: also ``.npz`` and ``.pkl``, which ensembling reads.
        uncertainty: what also to write into ``folder/uncertainty/case`` + ending, of the probabilities; published
            before the segmentation. None: nothing.

    Raises:
        OSError: the disk is full, or what was written cannot be read back.
    """
    file_ending = predictor.dataset_json["file_ending"]
    with partial_folder(folder) as partial, full_disk_named(folder / f"{case}{file_ending}"):
        export_prediction_from_logits(
            logits,
            properties,
            predictor.configuration_manager,
            predictor.plans_manager,
            predictor.dataset_json,
            str(partial / case),
            with_probabilities or uncertainty is not None,
        )
        publish_case(partial, folder, case, file_ending, with_probabilities, uncertainty)


def publish_case(
    partial: Path, folder: Path, case: str, file_ending: str, with_probabilities: bool, uncertainty: Measure | None
) -> None:
    """Move a finished case out of `partial`, its segmentation last; a map of its uncertainty is made on the way.

    Args:
        partial: holds the segmentation, and nnU-Net's ``.npz`` and ``.pkl`` where they are published or measured.
        folder, case, with_probabilities, uncertainty: as of :func:`export_case`.
        file_ending: of the segmentation.

    Raises:
        OSError: as :func:`publish`.
    """
    if uncertainty is not None:
        written = partial / UNCERTAINTY_FOLDER / f"{case}{file_ending}"
        for place in (written.parent, folder / UNCERTAINTY_FOLDER):
            place.mkdir(exist_ok=True)
        write_map(partial / f"{case}.npz", partial / f"{case}{file_ending}", written, uncertainty)
        publish(written, folder / UNCERTAINTY_FOLDER)
    for ending in endings(file_ending, with_probabilities):
        publish(partial / f"{case}{ending}", folder)


def export_for_next_stage(
    logits: np.ndarray, target_shape: tuple[int, ...], properties: dict, trainer: Any, folder: Path, case: str
) -> None:
    """The segmentation a cascade's next stage reads, on that stage's preprocessed grid."""
    with partial_folder(folder) as partial, full_disk_named(folder / case):
        resample_and_save(
            logits,
            list(target_shape),
            str(partial / case),
            trainer.plans_manager,
            trainer.configuration_manager,
            properties,
            trainer.dataset_json,
        )
        for path in partial.iterdir():
            publish(path, folder)


def publish(path: Path, folder: Path) -> None:
    """Move a finished file into `folder`; a volume is read back first, since SimpleITK reports success on a full disk.

    Raises:
        OSError: the volume is not whole.
    """
    target = folder / path.name
    if path.name.endswith(VOLUME_ENDINGS):
        try:
            read_volume(path)
        except UnreadableVolumeError as error:
            raise OSError(errno.EIO, f"written, but cannot be read back, {error.reason}", str(target)) from error
    os.replace(path, target)


@contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` for unfinished files: nnU-Net lists files, not folders, so none is taken for done."""
    name = "predictions"
    remove_leftovers(folder, name)
    path = temporary_sibling(folder / name)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
