"""Predict and score the validation cases of a trained fold; a killed run goes on with the case it was at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from torch.nn.parallel import DistributedDataParallel

from diffseg_nnunet.atomic import remove_leftovers
from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.inference.export import export_case, export_for_next_stage, is_exported
from diffseg_nnunet.inference.folders import VALIDATION
from diffseg_nnunet.inference.voting import plans_to_predict_with
from diffseg_nnunet.torch_errors import errors_of_torch_told_apart
from diffseg_nnunet.training import processes


def validate_fold(
    trainer: Any, save_probabilities: bool, name: str = VALIDATION, predictor: nnUNetPredictor | None = None
) -> dict:
    """nnU-Net's final validation: predictions and ``summary.json`` in ``fold_X/validation``; cases are shared among
    the processes that train together.

    Args:
        trainer: a segmentation trainer with its final weights.
        save_probabilities: also store softmax outputs, which ensembling reads.
        name: of the folder.
        predictor: None: the trainer's.

    Returns:
        nnU-Net's summary.

    Raises:
        BadInputError: a case cannot be predicted; the message names it.
        StageFailedError: one is too large for the memory; the message names it, too.
    """
    folder = trainer.results_folder / name
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.rank == 0:
        remove_leftovers(folder)
    processes.wait_for_all()
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = predictor or trainer.predictor()
    _, cases = trainer.do_split()
    own = sorted(cases)[trainer.rank :: trainer.processes]
    for number, case in enumerate(own, start=1):
        if not _is_done(trainer, folder, case, save_probabilities):
            try:
                with errors_of_torch_told_apart():
                    _predict_case(trainer, predictor, folder, case, save_probabilities)
            except BadInputError as error:
                raise BadInputError(f"{case}: {error.message}", error.mend) from error
            except MemoryError as error:
                raise StageFailedError(
                    f"The memory does not suffice to predict {case}, a validation case: {error}.",
                    "Free memory, or run the same command on a machine with more; finished cases are kept.",
                ) from error
        trainer.report_epoch(f"{name.replace('_', ', ')} case {number}/{len(own)}: {case}")
    compute_gaussian.cache_clear()
    trainer.set_deep_supervision_enabled(True)
    processes.wait_for_all()
    return processes.from_first(_score(trainer, folder) if trainer.rank == 0 else None)


def predictor_of(
    trainer: Any, predictor: nnUNetPredictor | None = None, network: torch.nn.Module | None = None
) -> nnUNetPredictor:
    """A predictor with what a trainer knows; nnU-Net's own and the trained network, unless others are given."""
    predictor = predictor or nnUNetPredictor(device=trainer.device, allow_tqdm=False)
    if network is None:
        wrapped = isinstance(trainer.network, DistributedDataParallel)  # refiners and their segmentors are not
        network = trainer.network.module if wrapped else trainer.network
    predictor.manual_initialization(
        network,
        plans_to_predict_with(trainer.plans_manager, network),
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    return predictor


def _next_stage_folders(trainer: Any) -> dict[str, Path]:
    """Where the cascade's next stages look for this stage's segmentations."""
    root = trainer.results_folder.parent / "predicted_next_stage"
    return {name: root / name for name in trainer.configuration_manager.next_stage_names or []}


def _is_done(trainer: Any, folder: Path, case: str, save_probabilities: bool) -> bool:
    exported = is_exported(folder, case, trainer.dataset_json["file_ending"], save_probabilities)
    return exported and all((path / f"{case}.b2nd").is_file() for path in _next_stage_folders(trainer).values())


def _predict_case(trainer: Any, predictor: nnUNetPredictor, folder: Path, case: str, save_probabilities: bool) -> None:
    dataset = trainer.dataset_class(
        trainer.preprocessed_dataset_folder, [case], trainer.folder_with_segs_from_previous_stage
    )
    data, _, previous, properties = dataset.load_case(case)
    data = np.array(data[:])
    if trainer.is_cascaded:
        labels = trainer.label_manager.foreground_labels
        data = np.vstack((data, convert_labelmap_to_one_hot(previous[:], labels, output_dtype=data.dtype)))
    logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(data)).cpu()
    for name, target in _next_stage_folders(trainer).items():
        target.mkdir(parents=True, exist_ok=True)
        shape = _preprocessed_shape(trainer, name, case)
        export_for_next_stage(logits, shape, properties, trainer, target, case)
    export_case(logits, properties, predictor, folder, case, save_probabilities)


def _preprocessed_shape(trainer: Any, configuration: str, case: str) -> tuple[int, ...]:
    identifier = trainer.plans_manager.get_configuration(configuration).data_identifier
    folder = str(Path(trainer.preprocessed_dataset_folder_base) / identifier)
    return tuple(infer_dataset_class(folder)(folder, [case]).load_case(case)[0].shape[1:])


def _score(trainer: Any, folder: Path) -> dict:
    labels = trainer.label_manager
    summary = compute_metrics_on_folder(
        str(Path(trainer.preprocessed_dataset_folder_base) / "gt_segmentations"),
        str(folder),
        str(folder / "summary.json"),
        trainer.plans_manager.image_reader_writer_class(),
        trainer.dataset_json["file_ending"],
        labels.foreground_regions if labels.has_regions else labels.foreground_labels,
        labels.ignore_label,
        default_num_processes,
        chill=True,
    )
    trainer.print_to_log_file("Mean Validation Dice: ", summary["foreground_mean"]["Dice"])
    return summary
