"""The stage *predict*: one model or an ensemble, over folds and configurations, on a folder of images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffseg_nnunet.atomic import write_json
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.inference.predictor import FailedCase, load_predictor, predict_cases
from diffseg_nnunet.pipeline.device import prepare_device
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.stages import FINAL, Fold, file_digest
from diffseg_nnunet.raw_dataset import Case, split_channel, visible_files

RECORD = "diffseg_prediction.json"


@dataclass(frozen=True)
class PredictionRequest:
    """What to predict with.

    Attributes:
        configurations: one, or several to average.
        folds: averaged within a configuration.
        strategy: the trainer's registered name.
        mirroring: test-time mirroring over the axes the plan allows.
        postprocessing: nnU-Net's postprocessing.pkl to apply, None for none.
        checkpoint: file name within the folds.
    """

    configurations: tuple[str, ...]
    folds: tuple[Fold, ...]
    strategy: str = "finetune"
    mirroring: bool = True
    postprocessing: Path | None = None
    checkpoint: str = FINAL


def input_cases(folder: Path, file_ending: str, channel_count: int) -> list[Case]:
    """The cases of a folder in nnU-Net's naming, ``CASE_0000.nii.gz`` with one file per channel.

    A folder whose files have no channel numbers is understood too where the model has one channel.

    Raises:
        BadInputError: the folder is missing or has no such images, or channel numbers are missing.
    """
    if not folder.is_dir():
        raise BadInputError(f"There is no folder {folder}.", "Correct -i.")
    stems = {path: path.name.removesuffix(file_ending) for path in visible_files(folder, [file_ending])}
    if not stems:
        raise BadInputError(
            f"{folder} holds no image CASE_0000{file_ending}.",
            "Name the images as nnU-Net does, with the file ending the model was trained on.",
        )
    numbered = {path: split_channel(stem) for path, stem in stems.items()}
    without = [path.name for path, (_, channel) in numbered.items() if channel is None]
    if len(without) == len(stems) and channel_count == 1:
        return [Case(stem, (path,), None) for path, stem in sorted(stems.items(), key=lambda item: item[1])]
    if without:
        raise BadInputError(
            f"{len(without)} file(s) in {folder} have no channel number, e.g. {without[0]}.",
            f"Name them as nnU-Net does: CASE_0000{file_ending}, one file per channel.",
        )
    by_case: dict[str, dict[int, Path]] = {}
    for path, (case, channel) in numbered.items():
        by_case.setdefault(case, {})[channel] = path
    return [Case(case, tuple(files[k] for k in sorted(files)), None) for case, files in sorted(by_case.items())]


def predict(
    project: Project, request: PredictionRequest, source: Path, output: Path, device_name: str
) -> list[FailedCase]:
    """Segment every case of `source` into `output`; an interrupted run goes on, a changed model starts again.

    Returns:
        The cases that were set aside; all others are done.
    """
    device = prepare_device(device_name)
    dataset_json = project.dataset_json()
    cases = input_cases(source, dataset_json["file_ending"], len(dataset_json["channel_names"]))
    record = _record(project, request, source)
    resume = _previous(output) == record
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RECORD, record)
    with project.log("predict"):
        if len(request.configurations) == 1:
            configuration = request.configurations[0]
            failed = _predict_one(project, request, configuration, cases, output, device, resume, probabilities=False)
        else:
            failed = _predict_ensemble(project, request, cases, output, device, resume)
        if request.postprocessing is not None:
            _postprocess(output, request.postprocessing)
    return failed


def _record(project: Project, request: PredictionRequest, source: Path) -> dict[str, Any]:
    checkpoints = {
        f"{configuration}/fold_{fold}": file_digest(
            project.model_folder(request.strategy, configuration) / f"fold_{fold}" / request.checkpoint
        )
        for configuration in request.configurations
        for fold in request.folds
    }
    return {
        "dataset": project.name,
        "strategy": request.strategy,
        "checkpoints": checkpoints,
        "mirroring": request.mirroring,
        "postprocessing": None if request.postprocessing is None else file_digest(request.postprocessing),
        "source": str(source),
    }


def _previous(output: Path) -> dict[str, Any] | None:
    path = output / RECORD
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        return None


def _predict_one(
    project: Project,
    request: PredictionRequest,
    configuration: str,
    cases: Sequence[Case],
    output: Path,
    device: Any,
    resume: bool,
    probabilities: bool,
) -> list[FailedCase]:
    model = project.model_folder(request.strategy, configuration)
    predictor = load_predictor(model, request.folds, device, request.mirroring, request.checkpoint)
    previous_stage, failed_before = None, []
    if (stage := predictor.configuration_manager.previous_stage_name) is not None:
        previous_stage = output / f"previous_stage_{stage}"
        failed_before = _predict_one(project, request, stage, cases, previous_stage, device, resume, False)
    failed = predict_cases(
        predictor,
        [case for case in cases if case.identifier not in {f.case for f in failed_before}],
        output,
        save_probabilities=probabilities,
        previous_stage=previous_stage,
        skip_existing=resume,
        progress=lambda done, total, case: project.reporter.progress(f"predict {configuration}", done, total),
    )
    # what nnU-Net's ensembling and postprocessing read beside predictions
    write_json(output / "dataset.json", predictor.dataset_json)
    write_json(output / "plans.json", predictor.plans_manager.plans)
    return failed_before + failed


def _predict_ensemble(
    project: Project, request: PredictionRequest, cases: Sequence[Case], output: Path, device: Any, resume: bool
) -> list[FailedCase]:
    """Average the softmax outputs of several configurations, by nnU-Net's own ensembling."""
    from nnunetv2.ensembling.ensemble import ensemble_folders

    from diffseg_nnunet.planning.hardware import usable_cores

    folders, failed = [], []
    for configuration in request.configurations:
        folder = output / f"member_{configuration}"
        failed += _predict_one(project, request, configuration, cases, folder, device, resume, probabilities=True)
        folders.append(folder)
    for case in {f.case for f in failed}:  # an ensemble needs the case from every member
        for folder in folders:
            for path in folder.glob(f"{case}.*"):
                path.unlink()
    ensemble_folders([str(f) for f in folders], str(output), num_processes=usable_cores())
    shutil.copyfile(folders[0] / "plans.json", output / "plans.json")
    for folder in folders:
        shutil.rmtree(folder)
    return failed


def _postprocess(folder: Path, pickle_file: Path) -> None:
    """Apply nnU-Net's postprocessing in place: into a folder of its own, then case by case over the raw prediction."""
    from batchgenerators.utilities.file_and_folder_operations import load_pickle
    from nnunetv2.postprocessing.remove_connected_components import apply_postprocessing_to_folder

    from diffseg_nnunet.planning.hardware import usable_cores

    # nnU-Net's own pickle, written by the selection stage of this workspace
    functions, arguments = load_pickle(str(pickle_file))
    target = folder / "postprocessed"
    apply_postprocessing_to_folder(str(folder), str(target), functions, arguments, num_processes=usable_cores())
    for path in target.iterdir():
        path.replace(folder / path.name)
    target.rmdir()
