"""The stage *predict*: one model or an ensemble, over folds and configurations, on a folder of images."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from diffseg_nnunet import registry
from diffseg_nnunet.atomic import full_disk_named, write_json
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.inference.export import endings, is_exported, partial_folder, publish, publish_case
from diffseg_nnunet.inference.input_cases import input_cases
from diffseg_nnunet.inference.merging import merge_files_of_labels
from diffseg_nnunet.inference.predictor import STEP_SIZE, FailedCase, load_predictor, predict_cases
from diffseg_nnunet.inference.refining import load_refining_predictor
from diffseg_nnunet.inference.uncertainty import UNCERTAINTY_FOLDER, Measure, entropy, measured, write_map
from diffseg_nnunet.pipeline.device import prepare_device
from diffseg_nnunet.pipeline.prediction_checks import check_refiners, models_read, require_maps, require_models
from diffseg_nnunet.pipeline.prediction_request import PredictionRequest
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.records import image_stamps, read_record
from diffseg_nnunet.pipeline.refining import REFINE
from diffseg_nnunet.planning.hardware import worker_count
from diffseg_nnunet.probing.ensemble import vote_entropy
from diffseg_nnunet.raw_dataset import DATASET_JSON, Case, read_json_object
from diffseg_nnunet.training.checkpoint import file_digest
from diffseg_nnunet.verification import listed

RECORD, _LOCK = "diffseg_prediction.json", ".diffseg_prediction.lock"
_MEMBER, _PREVIOUS_STAGE = "member_", "previous_stage_"


def predict(
    project: Project, request: PredictionRequest, source: Path, output: Path, device_name: str
) -> list[FailedCase]:
    """Segment every case of `source` into `output`; an interrupted run goes on.

    Cases are predicted again where the model, the settings or the images have changed.

    Returns:
        The cases that were set aside; all others are done.

    Raises:
        BadInputError: a model is not trained, the refiners do not go together or with the request, `source` has no
            images, it is the same folder as `output`, `output` holds what is not of a prediction, another process is
            predicting into it, or the uncertainty cannot be told; what is in `output` is left as it is.
    """
    if request.postprocessing is not None:
        _refuse_foreign_pickle(project, request.postprocessing)
    device = prepare_device(device_name)
    models = [project.model_folder(request.trainer, configuration) for configuration in request.configurations]
    require_models(project, request)
    if request.refine is not None:
        check_refiners(project, request)
    require_maps(request, models[0])
    dataset_json = read_json_object(models[0] / DATASET_JSON)
    ending = dataset_json["file_ending"]
    cases, failed = input_cases(source, ending, len(dataset_json["channel_names"]))
    if output.resolve() == source.resolve():
        raise BadInputError(f"{output} holds the images.", "Choose another folder with -o.")
    with _only_one(output):
        _refuse_foreign(output, cases, ending)
        return failed + _predict(project, request, source, output, cases, device, ending)


@contextmanager
def _only_one(output: Path) -> Iterator[None]:
    """One process at a time: of two with different models, each would take the other's segmentations for its own."""
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BadInputError(
            f"Another process is predicting into {output}.", "Wait for it, or choose another folder with -o."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _refuse_foreign(output: Path, cases: Sequence[Case], file_ending: str) -> None:
    """Raises BadInputError if files that are not of `diffseg predict` would be replaced."""
    if (output / RECORD).is_file():
        return
    written = endings(file_ending, with_probabilities=True)
    names = [f"{case.identifier}{ending}" for case in cases for ending in written]
    there = [name for name in names if (output / name).exists()]
    if there or (output / UNCERTAINTY_FOLDER).exists():
        raise BadInputError(
            f"{output} holds {listed(there or [UNCERTAINTY_FOLDER])}, which `diffseg predict` has not written.",
            "Choose another folder with -o, or move that away.",
        )


def _predict(
    project: Project,
    request: PredictionRequest,
    source: Path,
    output: Path,
    cases: Sequence[Case],
    device: Any,
    ending: str,
) -> list[FailedCase]:
    failed: list[FailedCase] = []
    model, inputs, previous = _model(project, request), image_stamps(cases), read_record(output / RECORD)
    before = {"step_size": STEP_SIZE, **previous.get("model", {})}  # what it was while there was no choice
    known = previous.get("inputs", {}) if before == model else {}
    outdated = [case for case in cases if known.get(case.identifier) != inputs[case.identifier]]
    exported = all(is_exported(output, case.identifier, ending, request.probabilities) for case in cases)
    if previous.get("finished") and not outdated and exported:
        return failed
    record = {"source": str(source), "model": model, "inputs": {**known, **inputs}}
    _discard(output, outdated, ending)
    write_json(output / RECORD, record)
    with project.log("predict"):
        if request.refined_structures is not None:
            failed += _predict_partly_refined(project, request, cases, output, device)
        elif len(request.configurations) == 1:
            (only,) = request.configurations
            failed += _predict_one(project, request, only, cases, output, device, request.probabilities)
        else:
            failed += _predict_ensemble(project, request, cases, output, device)
        if request.postprocessing is not None:
            _postprocess(output, request.postprocessing)
    write_json(output / RECORD, {**record, "finished": True})
    return failed


def _model(project: Project, request: PredictionRequest) -> dict[str, Any]:
    """What the segmentation of an image depends on, as JSON."""
    if request.postprocessing is not None and not request.postprocessing.is_file():
        raise BadInputError(f"There is no file {request.postprocessing}.", "Correct --postprocessing.")
    checkpoints = {
        f"{configuration if trainer == request.trainer else f'{trainer}/{configuration}'}/fold_{fold}": file_digest(
            project.model_folder(trainer, configuration) / f"fold_{fold}" / request.checkpoint
        )
        for trainer, configuration in models_read(project, request)
        for fold in request.folds
    }
    return {
        "dataset": project.name,
        "strategy": request.strategy,
        "checkpoints": checkpoints,
        "mirroring": request.mirroring,
        "step_size": request.step_size,
        "postprocessing": None if request.postprocessing is None else file_digest(request.postprocessing),
        "uncertainty": request.uncertainty,
        "refine": None if request.refine is None else asdict(request.refine),
        "refined_structures": None if request.refined_structures is None else list(request.refined_structures),
    }


def _discard(output: Path, outdated: Sequence[Case], file_ending: str) -> None:
    """Remove segmentations of another model or of other images, before the record says they were this model's."""
    if not (output / RECORD).is_file():  # what is there is not ours
        return
    for case in outdated:
        for ending in reversed(endings(file_ending, with_probabilities=True)):
            (output / f"{case.identifier}{ending}").unlink(missing_ok=True)
        (output / UNCERTAINTY_FOLDER / f"{case.identifier}{file_ending}").unlink(missing_ok=True)
    if outdated:
        for pattern in (f"{_MEMBER}*", f"{_PREVIOUS_STAGE}*"):
            for folder in output.glob(f"{pattern}/"):
                shutil.rmtree(folder)


def _predict_one(
    project: Project,
    request: PredictionRequest,
    configuration: str,
    cases: Sequence[Case],
    output: Path,
    device: Any,
    probabilities: bool,
) -> list[FailedCase]:
    predictor = _predictor(project, request, configuration, device)
    previous_stage, failed_before = None, []
    if (stage := predictor.configuration_manager.previous_stage_name) is not None:
        previous_stage = output / f"{_PREVIOUS_STAGE}{stage}"
        plain = replace(request, refine=None, uncertainty=False)
        failed_before = _predict_one(project, plain, stage, cases, previous_stage, device, False)
    failed = predict_cases(
        predictor,
        [case for case in cases if case.identifier not in {f.case for f in failed_before}],
        output,
        save_probabilities=probabilities,
        previous_stage=previous_stage,
        skip_existing=True,
        uncertainty=_measure(request, predictor.label_manager),
        progress=lambda done, total, case: project.reporter.progress(f"predict {configuration}", done, total),
    )
    if request.refine is not None and predictor.seen_voxels:
        project.reporter.info(f"{configuration}: {predictor.share:.1%} of the windows' voxels were refined")
    # what nnU-Net's ensembling and postprocessing read beside predictions
    write_json(output / DATASET_JSON, predictor.dataset_json)
    write_json(output / "plans.json", predictor.plans_manager.plans)
    return failed_before + failed


def _predictor(project: Project, request: PredictionRequest, configuration: str, device: Any) -> Any:
    model = project.model_folder(request.trainer, configuration)
    chosen = (model, request.folds, device, request.mirroring, request.checkpoint)
    if request.refine is None:
        return load_predictor(*chosen, request.step_size)
    return load_refining_predictor(*chosen, request.refine, request.step_size)


def _measure(request: PredictionRequest, labels: Any) -> Measure | None:
    """Of the uncertainty, if it is asked for."""
    if not request.uncertainty:
        return None
    return vote_entropy if registry.load("trainers", request.trainer).votes else entropy(labels.has_regions)


def _predict_partly_refined(
    project: Project, request: PredictionRequest, cases: Sequence[Case], output: Path, device: Any
) -> list[FailedCase]:
    """Predict with and without the refiner, and take the chosen structures from the refined segmentation."""
    (configuration,) = request.configurations
    dataset_json = read_json_object(project.model_folder(REFINE, configuration) / DATASET_JSON)
    ending = dataset_json["file_ending"]
    missing, failed = [case for case in cases if not is_exported(output, case.identifier, ending, False)], []
    folders = [output / f"{_MEMBER}{name}" for name in ("plain", "refined")]
    for folder, refine in zip(folders, (None, request.refine), strict=True) if missing else ():
        failed += _predict_one(project, replace(request, refine=refine), configuration, missing, folder, device, False)
        missing = [case for case in missing if case.identifier not in {f.case for f in failed}]
    values = [dataset_json["labels"][name] for name in request.refined_structures]
    for case in missing:
        name = f"{case.identifier}{ending}"
        with partial_folder(output) as partial, full_disk_named(output / name):
            merge_files_of_labels(*(folder / name for folder in folders), values, partial / name)
            publish(partial / name, output)
    for name in (DATASET_JSON, "plans.json") if missing else ():
        write_json(output / name, read_json_object(folders[0] / name))
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return failed


def _predict_ensemble(
    project: Project, request: PredictionRequest, cases: Sequence[Case], output: Path, device: Any
) -> list[FailedCase]:
    """Average the probabilities of several configurations, by nnU-Net's own ensembling."""
    from nnunetv2.ensembling.ensemble import average_probabilities, merge_files
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    model = project.model_folder(request.trainer, request.configurations[0])
    plans, dataset_json = read_json_object(model / "plans.json"), read_json_object(model / DATASET_JSON)
    ending = dataset_json["file_ending"]
    missing = [case for case in cases if not is_exported(output, case.identifier, ending, request.probabilities)]
    member, folders, failed = replace(request, uncertainty=False), [], []
    for configuration in request.configurations if missing else ():
        folders.append(output / f"{_MEMBER}{configuration}")
        failed += _predict_one(project, member, configuration, missing, folders[-1], device, True)
        # an ensemble needs the case from every member
        missing = [case for case in missing if case.identifier not in {f.case for f in failed}]
    manager = PlansManager(plans)
    writer, labels = manager.image_reader_writer_class(), manager.get_label_manager(dataset_json)
    measure = _measure(request, labels)
    for case in [case.identifier for case in missing]:
        with partial_folder(output) as partial, full_disk_named(output / f"{case}{ending}"):
            probabilities, kept = [str(folder / f"{case}.npz") for folder in folders], request.probabilities
            merge_files(probabilities, str(partial / case), ending, writer, labels, kept)
            if measure is not None:
                write_map(measured(average_probabilities(probabilities), measure), partial / case, ending)
            publish_case(partial, output, case, ending, kept, measure is not None)
    write_json(output / DATASET_JSON, dataset_json)
    write_json(output / "plans.json", plans)
    for folder in folders:
        shutil.rmtree(folder)
    return failed


def _refuse_foreign_pickle(project: Project, path: Path) -> None:
    """A pickle can run any code when it is read; only what this workspace wrote is."""
    if not path.resolve().is_relative_to(project.workspace.results.resolve()):
        raise BadInputError(
            f"{path} lies outside {project.workspace.results}, and postprocessing files are pickles, which run code.",
            "Give one that `diffseg run` wrote, in this workspace's results.",
        )


def _postprocess(folder: Path, pickle_file: Path) -> None:
    """Apply nnU-Net's postprocessing in place: into a folder of its own, then case by case over the raw prediction."""
    from batchgenerators.utilities.file_and_folder_operations import load_pickle
    from nnunetv2.postprocessing.remove_connected_components import apply_postprocessing_to_folder

    # nnU-Net's own pickle, written by the selection stage of this workspace: _refuse_foreign_pickle has seen to that
    functions, arguments = load_pickle(str(pickle_file))
    with partial_folder(folder) as partial, full_disk_named(folder / "postprocessed"):
        apply_postprocessing_to_folder(str(folder), str(partial), functions, arguments, num_processes=worker_count())
        for path in partial.iterdir():
            publish(path, folder)
