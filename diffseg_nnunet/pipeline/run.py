"""``diffseg run``: every stage after conversion, in order; resumable, and nothing is done twice."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffseg_nnunet.budgets.budget import LabelBudget
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.evaluation.folders import Evaluation
from diffseg_nnunet.inference.predictor import FailedCase
from diffseg_nnunet.inference.refining import RefineOptions
from diffseg_nnunet.pipeline import planning, prediction, preprocessing, run_refining, selection, stages
from diffseg_nnunet.pipeline.cascades import CASCADE, refuse_cascade, require_previous_stage
from diffseg_nnunet.pipeline.evaluating import evaluate_validation
from diffseg_nnunet.pipeline.label_budgets import base_fold, check_budget, fold_of_budget
from diffseg_nnunet.pipeline.planning import PlanRequest
from diffseg_nnunet.pipeline.prediction_request import PredictionRequest
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.refiner_selection import RefinerSelection
from diffseg_nnunet.pipeline.run_request import RunRequest
from diffseg_nnunet.pipeline.splits import check_fold, expected_folds, refuse_unknown_fold
from diffseg_nnunet.pipeline.starting import Fold
from diffseg_nnunet.pipeline.verifying import verify
from diffseg_nnunet.planning.gpus import resolve_device
from diffseg_nnunet.planning.section import STANDARD_CONFIGURATIONS
from diffseg_nnunet.verification import of_severity, shortened

TEST_PREDICTIONS = "predictions_imagesTs"
_KEPT_SETTINGS = (
    *("iterations", "seed", "optimizer", "initial_lr", "precision"),
    *("pool", "balance", "accumulate", "augment", "time_steps", "noisy"),
    *("keep_coordinates", "transfer", "fold_timestep"),
)


@dataclass(frozen=True)
class RunResult:
    """Scores of the validation cases by (configuration, fold), what was selected, what of it is refined, how the test
    images were, or would be, predicted, and test cases that were set aside."""

    evaluations: dict[tuple[str, Fold], Evaluation]
    selection: selection.Selection | None
    refiner: RefinerSelection | None
    predicted: PredictionRequest | None
    failed: list[FailedCase]


def run(project: Project, request: RunRequest) -> RunResult:
    """Verify, plan, preprocess, pretrain, train, evaluate, select, and predict the test images."""
    resolve_device(request.device)  # before hours of work that end there
    named, asked_labels = request.pretrained, request.labels
    request = request.on_top_of(project.manifest.last_run())
    _check_early(project, request)
    for line in shortened(of_severity(verify(project), "warning")):
        project.reporter.warn(line)
    planned = planning.plan(project, _plan_request(project, request))
    for dataset_id in _plan_request(project, request).unlabelled:
        verify(Project.open(project.workspace, dataset_id, project.reporter))
    _report_mirroring(project, planned)
    configurations = request.configurations or _default_configurations(planned)
    for configuration in configurations:
        project.configuration(configuration)
    project.manifest.remember_run(request.kept())  # what cannot be is no default of the next run
    if named is None and any(planning.starts_from_source(project, each) for each in configurations):
        request = replace(request, pretrained=None)  # the plan's is newer than the last run's
    preprocessing.preprocess(project, configurations)
    if not project.raw().labelled_cases():
        for configuration in configurations:
            _pretrain(project, request, configuration, "all")
        project.reporter.info(f"{project.name} has no labels: it is pretrained, and there is nothing to train")
        return RunResult({}, None, None, None, [])
    for fold in request.folds:
        check_fold(project, configurations[0], fold)
    if (labels := request.labels) is not None:
        if asked_labels is None:
            project.reporter.warn(f"labels: {labels} of each fold, as in the last run; --labels all learns from all")
        drawn = (fold_of_budget(project, configurations[0], each, labels, request.label_seed) for each in request.folds)
        request = replace(request, folds=tuple(drawn))
    _require_previous_stages(project, request, configurations)
    if request.strategy != "scratch" and request.pretrained is None:
        for configuration in configurations:
            planning.planned_source(project, configuration)  # before hours of work that end there
    if run_refining.refines(request):
        run_refining.check_refiners(project, request, configurations)
    evaluations = {}
    for configuration in configurations:
        for fold in request.folds:
            evaluation = _train_fold(project, request, configuration, fold, len(configurations))
            if evaluation is not None:
                evaluations[configuration, fold] = evaluation
    selected = _select(project, request, configurations)
    refiner = run_refining.refine_selected(project, request, selected)
    wanted = _prediction(request, configurations, selected, refiner)
    return RunResult(evaluations, selected, refiner, wanted, _predict_test(project, request, wanted))


def _check_early(project: Project, request: RunRequest) -> None:
    """Raises BadInputError for what can be known before anything is read."""
    known = STANDARD_CONFIGURATIONS
    planned = project.plans()["configurations"] if planning.has_own_plans(project) else ()
    if wrong := [name for name in request.configurations or () if name not in (*known, *planned)]:
        raise BadInputError(f"nnU-Net has no configuration '{wrong[0]}'.", f"Choose of {', '.join(known)} with -c.")
    if labelled := [case.identifier for case in project.raw().labelled_cases()]:
        for fold in request.folds:
            if fold != "all":
                refuse_unknown_fold(project, expected_folds(project, labelled), fold)
            if request.labels is not None:
                check_budget(project, fold, request.labels)
        budget = None if request.labels is None else LabelBudget.parse(request.labels)
        for name in request.configurations or ():
            if _reads_segmentations(project, name, planned):
                refuse_cascade(name, request.strategy, request.pretrained, budget)
    if request.label_seed and request.labels is None:
        raise BadInputError("--label-seed draws the labels of a budget, and none is given.", "Give --labels, too.")
    if request.pretrained is not None and request.strategy == "scratch":
        raise BadInputError("--pretrained does not go with --strategy scratch.", "Leave one of them out.")
    if request.pretrained is not None and not request.pretrained.is_file():
        raise BadInputError(
            f"There is no checkpoint {request.pretrained}.",
            "Correct --pretrained; where the last run had it, `--pretrained none` pretrains.",
        )
    run_refining.check_request(project, request)


def _reads_segmentations(project: Project, configuration: str, planned: Container[str]) -> bool:
    """Whether it is a cascade's later stage: by the plan, else by nnU-Net's name."""
    if configuration in planned:
        return project.configuration(configuration).previous_stage_name is not None
    return configuration == CASCADE


def _require_previous_stages(project: Project, request: RunRequest, configurations: Sequence[str]) -> None:
    """Raises BadInputError if a cascade's last stage would find cases that its first has not segmented by then."""
    cases = {fold: stages.fold_cases(project, configurations[0], fold) for fold in request.folds}
    for number, name in enumerate(configurations):
        previous = project.configuration(name).previous_stage_name
        if previous is not None:
            coming = {case for each in cases.values() for case in each["val"] if previous in configurations[:number]}
            for fold, each in cases.items():
                require_previous_stage(project, name, fold, each, request.strategy, coming)


def _plan_request(project: Project, request: RunRequest) -> PlanRequest:
    """What was given on top of what the plan was last made with."""
    return replace(planning.last_request(project), **request.plan)


def _default_configurations(plans: Mapping[str, Any]) -> tuple[str, ...]:
    return ("3d_fullres",) if "3d_fullres" in plans["configurations"] else ("2d",)


def _report_mirroring(project: Project, plans: Mapping[str, Any]) -> None:
    mirroring = plans["diffseg"]["mirroring"]
    project.reporter.info(f"mirroring: {mirroring['reason']}")
    if mirroring["warning"]:
        project.reporter.warn(mirroring["warning"])


def _train_fold(
    project: Project, request: RunRequest, configuration: str, fold: Fold, members: int
) -> Evaluation | None:
    strategy, pretrained = request.strategy, None
    if strategy != "scratch":
        pretrained = request.pretrained or planning.planned_source(project, configuration)
        if pretrained is None:
            pretrained = _pretrain(project, request, configuration, fold if request.pretrain_on == "fold" else "all")
    stage = stages.training_stage(strategy, configuration, fold)
    settings = _kept(project, stage, request.training) | {"workers": request.workers}
    # ensembling configurations reads the softmax outputs of the validation cases
    probabilities = members > 1
    stages.train(project, configuration, fold, request.device, strategy, pretrained, probabilities, **settings)
    return evaluate_validation(project, strategy, configuration, fold)


def _pretrain(project: Project, request: RunRequest, configuration: str, fold: Fold) -> Path:
    fold = base_fold(project, configuration, fold)
    settings = _kept(project, f"pretrain/{configuration}/fold_{fold}", request.pretraining)
    return stages.pretrain(project, configuration, fold, request.device, workers=request.workers, **settings)


def _kept(project: Project, stage: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What the run wants, on top of the settings a single command gave the stage."""
    stored = project.manifest.stage(stage).get("settings", {})
    kept = {name: stored[name] for name in _KEPT_SETTINGS if name in stored}
    if wanted.get("optimizer", kept.get("optimizer")) != kept.get("optimizer"):
        kept.pop("initial_lr", None)
    # a new plan is a newer decision than what a single command changed of an older one
    section = project.plans()["diffseg"]
    planned = stored.get("planned", {})
    kept |= {name: stored[name] for name in planned if planned[name] == section[name]}
    return {**kept, **wanted}


def _select(project: Project, request: RunRequest, configurations: tuple[str, ...]) -> selection.Selection | None:
    """None for a model of all cases: it has no validation cases of its own to choose by."""
    if "all" in request.folds:
        return None
    return selection.select(project, configurations, request.folds, request.strategy)


def _prediction(
    request: RunRequest,
    configurations: tuple[str, ...],
    selected: selection.Selection | None,
    refiner: RefinerSelection | None,
) -> PredictionRequest:
    """What the validation cases speak for."""
    used = refiner if refiner is not None and refiner.structures else None
    best = used.crossval if used else selected
    return PredictionRequest(
        configurations=selected.configurations if selected else configurations,
        folds=request.folds,
        strategy=request.strategy,
        postprocessing=best.postprocessing if best else None,
        refine=RefineOptions() if used else None,
        refined_structures=used.structures if used and not used.complete else None,
    )


def _predict_test(project: Project, request: RunRequest, wanted: PredictionRequest) -> list[FailedCase]:
    source = project.raw().folder / "imagesTs"
    if not (request.predict_test and project.raw().test_cases()):
        return []
    # of its own for each strategy and choice of folds: jobs of single folds may be at work at once
    output = project.results / TEST_PREDICTIONS / f"{request.strategy}__{selection.folds_named(request.folds)}"
    return prediction.predict(project, wanted, source, output, request.device)
