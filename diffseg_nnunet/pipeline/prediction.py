"""The stage *predict*: one model or an ensemble, over folds and configurations, on a folder of images."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from diffseg_nnunet import registry
from diffseg_nnunet.atomic import full_disk_named, write_json
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.inference.export import endings, is_exported, partial_folder, publish, publish_case
from diffseg_nnunet.inference.merging import merge_files_of_labels
from diffseg_nnunet.inference.predictor import STEP_SIZE, FailedCase, load_predictor, predict_cases
from diffseg_nnunet.inference.refining import RefineOptions, load_refining_predictor
from diffseg_nnunet.inference.uncertainty import UNCERTAINTY_FOLDER, Measure, entropy, measured, write_map
from diffseg_nnunet.pipeline.device import prepare_device
from diffseg_nnunet.pipeline.prediction_checks import check_refiners, models_read, require_maps, require_models
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.records import image_stamps, read_record
from diffseg_nnunet.pipeline.refining import REFINE
from diffseg_nnunet.pipeline.starting import FINAL, Fold
from diffseg_nnunet.planning.hardware import worker_count
from diffseg_nnunet.probing.ensemble import vote_entropy
from diffseg_nnunet.raw_dataset import DATASET_JSON, Case, read_json_object, split_channel, visible_files
from diffseg_nnunet.training.checkpoint import file_digest
from diffseg_nnunet.verification import listed

RECORD, _LOCK = "diffseg_prediction.json", ".diffseg_prediction.lock"
_MEMBER, _PREVIOUS_STAGE = "member_", "previous_stage_"


@dataclass(frozen=True)
class PredictionRequest:
    """What to predict with.

    Attributes:
        configurations: one, or several to average.
        folds: averaged within a configuration.
        strategy: the trainer's registered name.
        mirroring: test-time mirroring over the axes the plan allows.
        step_size: from one window to the next, as a share of the patch, within 0..1, 0 excluded.
        postprocessing: nnU-Net's postprocessing.pkl to apply, None for none.
        probabilities: also write the classes' probabilities, ``.npz`` and ``.pkl`` as nnU-Net does.
        uncertainty: also write maps of the uncertainty: how much the voters of a pixel ensemble disagree, and of all
            else the entropy of the probabilities.
        checkpoint: file name within the folds.
        refine: how the folds' refiners are used; None: not at all.
        refined_structures: take these structures alone from the refined segmentation; None: all.
    """

    configurations: tuple[str, ...]
    folds: tuple[Fold, ...]
    strategy: str = "finetune"
    mirroring: bool = True
    step_size: float = STEP_SIZE
    postprocessing: Path | None = None
    probabilities: bool = False
    uncertainty: bool = False
    checkpoint: str = FINAL
    refine: RefineOptions | None = None
    refined_structures: tuple[str, ...] | None = None

    @property
    def trainer(self) -> str:
        """The registered name of the trainer whose models are predicted with."""
        return self.strategy if self.refine is None else REFINE

    def command(self, dataset_id: int, workspace: Path | None = None) -> str:
        """The command line that predicts so.

        Args:
            workspace: as it was given.
        """
        words = ["diffseg", "predict", "-d", dataset_id, "-i", "IMAGES", "-o", "OUTPUT", "--strategy", self.strategy]
        words += ["-c", *self.configurations, "-f", *self.folds]
        if self.checkpoint != FINAL:
            words += ["--checkpoint", self.checkpoint]
        if self.postprocessing is not None:
            words += ["--postprocessing", self.postprocessing]
        if self.refine is not None:
            words.append("--refine")
        if self.refined_structures is not None:
            words += ["--refine-structures", ",".join(self.refined_structures)]
        if workspace is not None:
            words += ["--workspace", workspace]
        return shlex.join(map(str, words))


def input_cases(folder: Path, file_ending: str, channel_count: int) -> tuple[list[Case], list[FailedCase]]:
    """The cases of a folder in nnU-Net's naming, ``CASE_0000.nii.gz`` with one file per channel.

    A folder whose files have no channel numbers is understood too where the model has one channel.

    Returns:
        The cases, and those whose channel numbers are not 0 to `channel_count` - 1.

    Raises:
        BadInputError: the folder is missing or has no such images, or only some of its files have channel numbers.
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
        return [Case(stem, (path,), None) for path, stem in sorted(stems.items(), key=lambda item: item[1])], []
    if without:
        raise BadInputError(
            f"{len(without)} file(s) in {folder} have no channel number, e.g. {without[0]}.",
            f"Name them as nnU-Net does: CASE_0000{file_ending}, one file per channel.",
        )
    by_case: dict[str, dict[int, Path]] = {}
    for path, (case, channel) in numbered.items():
        by_case.setdefault(case, {})[channel] = path
    cases, misnumbered = [], []
    for case, files in sorted(by_case.items()):
        if sorted(files) == list(range(channel_count)):
            cases.append(Case(case, tuple(files[channel] for channel in range(channel_count)), None))
        else:
            channels = ", ".join(f"{channel:04d}" for channel in sorted(files))
            wanted = ", ".join(f"{channel:04d}" for channel in range(channel_count))
            reason = f"its files in {folder} have the channel numbers {channels}, the model reads {wanted}."
            misnumbered.append(FailedCase(case, f"{reason} Rename them, or add what is missing."))
    return cases, misnumbered


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
