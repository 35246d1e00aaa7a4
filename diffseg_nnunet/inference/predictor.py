"""Prediction of a folder of images with trained folds: each case on its own, resumable, bad cases set aside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

from diffseg_nnunet.atomic import remove_leftovers
from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.inference.export import export_case, is_exported
from diffseg_nnunet.inference.one_plan import require_one_plan
from diffseg_nnunet.inference.preprocessing import preprocess_case
from diffseg_nnunet.inference.uncertainty import Measure
from diffseg_nnunet.inference.voting import plans_to_predict_with
from diffseg_nnunet.raw_dataset import Case

CaseProgress = Callable[[int, int, str], None]
"""Called with (cases done, cases in all, case)."""


@dataclass(frozen=True)
class FailedCase:
    """A case that was set aside, and why."""

    case: str
    reason: str


def load_predictor(
    model_folder: Path, folds: Sequence[int | str], device: torch.device, mirroring: bool, checkpoint: str
) -> nnUNetPredictor:
    """nnU-Net's predictor with the trained folds of a model folder.

    Raises:
        BadInputError: a fold has no such checkpoint, or one of another plan.
    """
    require_trained(model_folder, folds, checkpoint)
    require_one_plan(model_folder, folds, checkpoint)
    predictor = nnUNetPredictor(use_mirroring=mirroring, device=device, allow_tqdm=False)
    # nnU-Net's own checkpoint format, which is a pickle: only models of this workspace are read here
    predictor.initialize_from_trained_model_folder(str(model_folder), tuple(folds), checkpoint)
    predictor.plans_manager = plans_to_predict_with(predictor.plans_manager, predictor.network)
    return predictor


def require_trained(model_folder: Path, folds: Sequence[int | str], checkpoint: str, command: str = "train") -> None:
    """Raises BadInputError if a fold has no such checkpoint; the message says that ``diffseg`` with `command` and the
    fold trains it."""
    for fold in folds:
        path = model_folder / f"fold_{fold}" / checkpoint
        if not path.is_file():
            trained = ", ".join(sorted(p.parent.name for p in model_folder.glob(f"fold_*/{checkpoint}"))) or "none"
            raise BadInputError(
                f"There is no trained model {path} (trained there: {trained}).",
                f"Run `diffseg {command} -f {fold}` first, or choose another with -f, -c or --strategy.",
            )


def predict_cases(
    predictor: nnUNetPredictor,
    cases: Sequence[Case],
    output: Path,
    *,
    save_probabilities: bool = False,
    previous_stage: Path | None = None,
    skip_existing: bool = False,
    uncertainty: Measure | None = None,
    progress: CaseProgress | None = None,
) -> list[FailedCase]:
    """Predict each case and publish its segmentation in `output`, on the image's own grid.

    Args:
        predictor: from :func:`load_predictor`.
        cases: image files per channel.
        previous_stage: folder with the segmentations a cascade's last stage reads.
        skip_existing: leave cases alone whose files are already in `output`.
        uncertainty: what of the probabilities also to write into ``output/uncertainty``; None: nothing.

    Returns:
        The cases that could not be predicted; the others are done.
    """
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    ending = predictor.dataset_json["file_ending"]
    failed = []
    for number, case in enumerate(cases, start=1):
        if not (skip_existing and is_exported(output, case.identifier, ending, save_probabilities)):
            try:
                _predict(predictor, case, output, save_probabilities, previous_stage, uncertainty)
            except torch.OutOfMemoryError as error:
                raise StageFailedError(
                    f"The GPU's memory does not suffice for {case.identifier}.",
                    "Free the GPU of other work, or predict with --device cpu; finished cases are kept.",
                ) from error
            except MemoryError as error:
                failed.append(FailedCase(case.identifier, f"the memory does not suffice for its size: {error}"))
            except (BadInputError, RuntimeError, ValueError, AssertionError) as error:
                failed.append(FailedCase(case.identifier, str(error) or type(error).__name__))
        if progress is not None:
            progress(number, len(cases), case.identifier)
    compute_gaussian.cache_clear()
    return failed


def _predict(
    predictor: nnUNetPredictor,
    case: Case,
    output: Path,
    save_probabilities: bool,
    previous_stage: Path | None,
    uncertainty: Measure | None,
) -> None:
    previous = None
    if previous_stage is not None:
        previous = str(previous_stage / f"{case.identifier}{predictor.dataset_json['file_ending']}")
    data, segmentation, properties = preprocess_case(
        case, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json, previous
    )
    if previous is not None:
        labels = predictor.label_manager.foreground_labels
        data = np.vstack((data, convert_labelmap_to_one_hot(segmentation[0], labels, data.dtype)))
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).cpu()
    export_case(logits, properties, predictor, output, case.identifier, save_probabilities, uncertainty)
