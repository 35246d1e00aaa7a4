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
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits, resample_and_save
from numpy.typing import NDArray

from diffseg_nnunet.atomic import full_disk_named, remove_leftovers, temporary_sibling
from diffseg_nnunet.inference.slabs import resampled_slabs
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
        if with_probabilities:
            export_prediction_from_logits(
                logits,
                properties,
                predictor.configuration_manager,
                predictor.plans_manager,
                predictor.dataset_json,
                str(partial / case),
                save_probabilities=True,
            )
        if not with_probabilities or uncertainty is not None:
            segmentation, uncertain = _in_slabs(logits, properties, predictor, uncertainty)
            if not with_probabilities:
                writer = predictor.plans_manager.image_reader_writer_class()
                writer.write_seg(segmentation, str(partial / f"{case}{file_ending}"), properties)
            if uncertain is not None:
                write_map(uncertain, partial / case, file_ending)
        publish_case(partial, folder, case, file_ending, with_probabilities, uncertainty is not None)


@torch.inference_mode()
def _in_slabs(
    logits: Any, properties: dict, predictor: Any, uncertainty: Measure | None
) -> tuple[NDArray, NDArray | None]:
    """The segmentation, as nnU-Net's export makes it, and what is uncertain of it, float32; both on the scan's grid."""
    plans = predictor.plans_manager
    labels = plans.get_label_manager(predictor.dataset_json)
    shape = properties["shape_before_cropping"]
    # what was cropped away is background for certain
    segmentation = np.zeros(shape, np.uint8 if len(labels.foreground_labels) < 255 else np.uint16)
    uncertain = None if uncertainty is None else np.zeros(shape, np.float32)
    box = tuple(slice(*bounds) for bounds in properties["bbox_used_for_cropping"])
    logits = torch.from_numpy(logits) if isinstance(logits, np.ndarray) else logits
    for slices, slab in resampled_slabs(logits, properties, plans, predictor.configuration_manager):
        segmentation[box][slices] = labels.convert_logits_to_segmentation(slab).numpy()
        if uncertain is not None:
            uncertain[box][slices] = uncertainty(labels.apply_inference_nonlin(slab)).numpy()
    back = plans.transpose_backward
    return segmentation.transpose(back), None if uncertain is None else uncertain.transpose(back)


def publish_case(
    partial: Path, folder: Path, case: str, file_ending: str, with_probabilities: bool, with_uncertainty: bool
) -> None:
    """Move the files of a finished case out of `partial`, its segmentation last.

    Raises:
        OSError: as :func:`publish`.
    """
    if with_uncertainty:
        (folder / UNCERTAINTY_FOLDER).mkdir(exist_ok=True)
        publish(partial / UNCERTAINTY_FOLDER / f"{case}{file_ending}", folder / UNCERTAINTY_FOLDER)
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
