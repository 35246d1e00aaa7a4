"""Prediction of a folder of images with trained folds: each case on its own, resumable, bad cases set aside."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

from diffseg_nnunet.atomic import remove_leftovers
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.inference.case_by_case import FailedCase, Steps, in_turn
from diffseg_nnunet.inference.export import export_case, is_exported
from diffseg_nnunet.inference.one_plan import require_one_plan
from diffseg_nnunet.inference.preprocessing import preprocess_case
from diffseg_nnunet.inference.uncertainty import Measure
from diffseg_nnunet.inference.voting import plans_to_predict_with
from diffseg_nnunet.raw_dataset import Case

CaseProgress = Callable[[int, int, str], None]
"""Called with (cases done, cases in all, case)."""


STEP_SIZE = 0.5
"""From one window to the next, as a share of the patch: nnU-Net's."""


def load_predictor(
    model_folder: Path,
    folds: Sequence[int | str],
    device: torch.device,
    mirroring: bool,
    checkpoint: str,
    step_size: float = STEP_SIZE,
) -> nnUNetPredictor:
    """nnU-Net's predictor with the trained folds of a model folder.

    Raises:
        BadInputError: a fold has no such checkpoint, or one of another plan.
    """
    require_trained(model_folder, folds, checkpoint)
    require_one_plan(model_folder, folds, checkpoint)
    predictor = nnUNetPredictor(step_size, use_mirroring=mirroring, device=device, allow_tqdm=False)
    with warnings.catch_warnings():
        # nnU-Net looks for the trainer in all of its modules, and libraries of some use what torch deprecates
        warnings.simplefilter("ignore", FutureWarning)
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
    overlap: bool | None = None,
) -> list[FailedCase]:
    """Predict each case and publish its segmentation in `output`, on the image's own grid.

    Args:
        predictor: from :func:`load_predictor`.
        cases: image files per channel.
        previous_stage: folder with the segmentations a cascade's last stage reads.
        skip_existing: leave cases alone whose files are already in `output`.
        uncertainty: what of the probabilities also to write into ``output/uncertainty``; None: nothing.
        overlap: whether the next case is read and the last one written while the network is at work; None: where that
            is on a GPU, which would wait for them.

    Returns:
        The cases that could not be predicted; the others are done.
    """
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    ending, kept = predictor.dataset_json["file_ending"], set()
    if skip_existing:
        kept = {c.identifier for c in cases if is_exported(output, c.identifier, ending, save_probabilities)}
    counter = itertools.count(len(kept) + 1)

    def predict(prepared: tuple[np.ndarray, dict]) -> tuple[torch.Tensor, dict]:
        data, properties = prepared
        return predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).cpu(), properties

    def export(case: Case, predicted: tuple[torch.Tensor, dict]) -> None:
        export_case(*predicted, predictor, output, case.identifier, save_probabilities, uncertainty)

    def tell(case: Case) -> None:
        if progress is not None:
            progress(next(counter), len(cases), case.identifier)

    steps = Steps(partial(_prepared, predictor, previous_stage), predict, export, tell)
    overlapping = predictor.device.type == "cuda" if overlap is None else overlap
    failed = in_turn([case for case in cases if case.identifier not in kept], steps, overlapping)
    compute_gaussian.cache_clear()
    return failed


def _prepared(predictor: nnUNetPredictor, previous_stage: Path | None, case: Case) -> tuple[np.ndarray, dict]:
    """The preprocessed image, of a cascade's last stage with the segmentation before it, and its properties."""
    previous = None
    if previous_stage is not None:
        previous = str(previous_stage / f"{case.identifier}{predictor.dataset_json['file_ending']}")
    data, segmentation, properties = preprocess_case(
        case, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json, previous
    )
    if previous is not None:
        labels = predictor.label_manager.foreground_labels
        data = np.vstack((data, convert_labelmap_to_one_hot(segmentation[0], labels, data.dtype)))
    return data, properties
