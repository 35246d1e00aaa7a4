"""``diffseg run``: every stage after conversion, in order; resumable, and nothing is done twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from diffseg_nnunet.evaluation.folders import Evaluation
from diffseg_nnunet.inference.predictor import FailedCase
from diffseg_nnunet.pipeline import planning, prediction, preprocessing, selection, stages
from diffseg_nnunet.pipeline.evaluating import evaluate_validation
from diffseg_nnunet.pipeline.planning import PlanRequest
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.stages import Fold

TEST_PREDICTIONS = "predictions_imagesTs"
_KEPT_SETTINGS = ("iterations", "seed", "optimizer", "initial_lr", "precision")


@dataclass(frozen=True)
class RunRequest:
    """What to run. Settings that are None keep what an earlier command of the data set used, else the default.

    Attributes:
        configurations: empty: 3d_fullres, or 2d where the data are.
        folds: trained one after the other.
        strategy: "finetune" or "scratch".
        pretrain_on: "fold" (each fold's own training cases: validation cases stay unseen) or "all" (once, all cases).
        plan: fields of PlanRequest that were given.
        pretraining, training: fields of the stages' settings that were given.
        device: "auto", "cpu" or "cuda".
        predict_test: segment imagesTs with the result.
    """

    configurations: tuple[str, ...] = ()
    folds: tuple[Fold, ...] = (0,)
    strategy: str = "finetune"
    pretrain_on: str = "fold"
    plan: Mapping[str, Any] = field(default_factory=dict)
    pretraining: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    predict_test: bool = True


@dataclass(frozen=True)
class RunResult:
    """Scores of the validation cases by (configuration, fold), and test cases that were set aside."""

    evaluations: dict[tuple[str, Fold], Evaluation]
    selection: selection.Selection | None
    failed: list[FailedCase]


def run(project: Project, request: RunRequest) -> RunResult:
    """Verify, plan, preprocess, pretrain, train, evaluate, select, and predict the test images."""
    for finding in planning.verify(project):
        project.reporter.warn(str(finding))
    planned = planning.plan(project, _plan_request(project, request))
    _report_mirroring(project, planned)
    configurations = request.configurations or _default_configurations(planned)
    preprocessing.preprocess(project, configurations)
    if not project.raw().labelled_cases():
        for configuration in configurations:
            _pretrain(project, request, configuration, "all")
        project.reporter.info(f"{project.name} has no labels: it is pretrained, and there is nothing to train")
        return RunResult({}, None, [])
    evaluations = {}
    for configuration in configurations:
        for fold in request.folds:
            evaluations[configuration, fold] = _train_fold(project, request, configuration, fold, len(configurations))
    selected = _select(project, request, configurations)
    return RunResult(evaluations, selected, _predict_test(project, request, configurations, selected))


def _plan_request(project: Project, request: RunRequest) -> PlanRequest:
    """What was given on top of what the plan was last made with."""
    stored = project.manifest.stage("plan").get("settings")
    return replace(PlanRequest.from_json(stored) if stored else PlanRequest(), **request.plan)


def _default_configurations(plans: Mapping[str, Any]) -> tuple[str, ...]:
    return ("3d_fullres",) if "3d_fullres" in plans["configurations"] else ("2d",)


def _report_mirroring(project: Project, plans: Mapping[str, Any]) -> None:
    mirroring = plans["diffseg"]["mirroring"]
    project.reporter.info(f"mirroring: {mirroring['reason']}")
    if mirroring["warning"]:
        project.reporter.warn(mirroring["warning"])


def _train_fold(project: Project, request: RunRequest, configuration: str, fold: Fold, members: int) -> Evaluation:
    strategy = request.strategy
    if strategy == "finetune":
        _pretrain(project, request, configuration, fold if request.pretrain_on == "fold" else "all")
    stage = f"train/{strategy}/{configuration}/fold_{fold}"
    settings = _kept(project, stage, _KEPT_SETTINGS, request.training)
    # ensembling configurations reads the softmax outputs of the validation cases
    stages.train(project, configuration, fold, request.device, strategy, save_probabilities=members > 1, **settings)
    return evaluate_validation(project, strategy, configuration, fold)


def _pretrain(project: Project, request: RunRequest, configuration: str, fold: Fold) -> None:
    stage = f"pretrain/{configuration}/fold_{fold}"
    settings = _kept(project, stage, _KEPT_SETTINGS, request.pretraining)
    stages.pretrain(project, configuration, fold, request.device, **settings)


def _kept(project: Project, stage: str, names: tuple[str, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the last run of a stage, with what was given on top."""
    stored = project.manifest.stage(stage).get("settings", {})
    return {**{name: stored[name] for name in names if name in stored}, **given}


def _select(project: Project, request: RunRequest, configurations: tuple[str, ...]) -> selection.Selection | None:
    """None for a model of all cases: it has no validation cases of its own to choose by."""
    if "all" in request.folds:
        return None
    return selection.select(project, configurations, request.folds, request.strategy)


def _predict_test(
    project: Project,
    request: RunRequest,
    configurations: tuple[str, ...],
    selected: selection.Selection | None,
) -> list[FailedCase]:
    source = project.raw().folder / "imagesTs"
    if not (request.predict_test and project.raw().test_cases()):
        return []
    wanted = prediction.PredictionRequest(
        configurations=selected.configurations if selected else configurations,
        folds=request.folds,
        strategy=request.strategy,
        postprocessing=selected.postprocessing if selected else None,
    )
    return prediction.predict(project, wanted, source, project.results / TEST_PREDICTIONS, request.device)
