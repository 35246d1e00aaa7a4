"""``diffseg run``: every stage after conversion, in order; resumable, and nothing is done twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.evaluation.folders import Evaluation
from diffseg_nnunet.inference.predictor import FailedCase
from diffseg_nnunet.inference.refining import RefineOptions
from diffseg_nnunet.pipeline import planning, prediction, preprocessing, refining, selection, stages
from diffseg_nnunet.pipeline.evaluating import evaluate_validation
from diffseg_nnunet.pipeline.label_budgets import base_fold
from diffseg_nnunet.pipeline.planning import PlanRequest
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.refiner_selection import RefinerSelection, select_refiner
from diffseg_nnunet.pipeline.splits import check_fold, expected_folds, refuse_unknown_fold
from diffseg_nnunet.pipeline.starting import Fold
from diffseg_nnunet.pipeline.verifying import verify
from diffseg_nnunet.planning.gpus import resolve_device
from diffseg_nnunet.verification import of_severity, shortened

TEST_PREDICTIONS = "predictions_imagesTs"
NO_CHECKPOINT = Path("none")
_KEPT_SETTINGS = (
    *("iterations", "seed", "optimizer", "initial_lr", "precision"),
    *("pool", "balance", "accumulate", "augment", "time_steps", "noisy"),
    *("keep_coordinates", "transfer", "fold_timestep"),
)
_KEPT_REFINING = (
    "iterations",
    "seed",
    "initial_lr",
    "precision",
    "segmentor",
    "segmentor_weight",
    "binary",
    "diffusion",
    "degrade",
    "samples",
    "sampling_steps",
    "sampler",
)

_EQUAL_REFINING = ("width", "binary", "diffusion", "samples", "sampling_steps", "sampler")
"""What folds that predict together have in common."""


@dataclass(frozen=True)
class RunRequest:
    """What to run. What is None, or missing in a mapping, is as in the data set's last run, else the default.

    Attributes:
        configurations: default: 3d_fullres, or 2d where the data are.
        folds: trained one after the other; default: 0.
        strategy: "finetune" (default), or another of `diffseg train`.
        pretrained: checkpoint that all folds start from; None, or NO_CHECKPOINT in place of the last run's: the one the
            plan was made to start from, if it was, else they are pretrained.
        pretrain_on: "fold" (default; each fold's own training cases: validation cases stay unseen) or "all" (once, all
            cases).
        refine: train a refiner on each fold, and use it for the structures it improves (default: no).
        plan: fields of PlanRequest that were given.
        pretraining, training, refining: fields of the stages' settings that were given.
        device: "auto", "cpu" or "cuda".
        predict_test: segment imagesTs with the result.
    """

    configurations: tuple[str, ...] | None = None
    folds: tuple[Fold, ...] | None = None
    strategy: str | None = None
    pretrained: Path | None = None
    pretrain_on: str | None = None
    refine: bool | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)
    pretraining: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    refining: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    predict_test: bool = True

    def on_top_of(self, last: Mapping[str, Any]) -> RunRequest:
        """This request with the gaps filled from the options of the last run, as :meth:`kept` stored them."""
        return replace(
            self,
            configurations=self.configurations or tuple(last.get("configurations") or ()) or None,
            folds=self.folds or tuple(last.get("folds") or (0,)),
            strategy=self.strategy or last.get("strategy") or "finetune",
            pretrained=self._starting_point(last),
            pretrain_on=self.pretrain_on or last.get("pretrain_on") or "fold",
            refine=last.get("refine", False) if self.refine is None else self.refine,
            pretraining={**last.get("pretraining", {}), **self.pretraining},
            training={**last.get("training", {}), **self.training},
            refining={**last.get("refining", {}), **self.refining},
        )

    def _starting_point(self, last: Mapping[str, Any]) -> Path | None:
        """The checkpoint that was given, else the last run's, where the strategy starts from one."""
        chosen = self.pretrained or Path(last.get("pretrained") or NO_CHECKPOINT)
        twin = self.pretrained is None and (self.strategy or last.get("strategy")) == "scratch"
        return None if twin or chosen == NO_CHECKPOINT else chosen

    def kept(self) -> dict[str, Any]:
        """What the next run may fall back on; the plan's options are kept with the plan."""
        return {
            "configurations": list(self.configurations or ()),
            "folds": list(self.folds or ()),
            "strategy": self.strategy,
            "pretrained": None if self.pretrained is None else str(self.pretrained),
            "pretrain_on": self.pretrain_on,
            "pretraining": dict(self.pretraining),
            "refine": self.refine,
            "training": dict(self.training),
            "refining": dict(self.refining),
        }


@dataclass(frozen=True)
class RunResult:
    """Scores of the validation cases by (configuration, fold), what was selected, by configuration what the refiner is
    used for, how the test images were, or would be, predicted, and test cases that were set aside."""

    evaluations: dict[tuple[str, Fold], Evaluation]
    selection: selection.Selection | None
    refiners: dict[str, RefinerSelection]
    predicted: prediction.PredictionRequest | None
    failed: list[FailedCase]


def run(project: Project, request: RunRequest) -> RunResult:
    """Verify, plan, preprocess, pretrain, train, evaluate, select, and predict the test images."""
    resolve_device(request.device)  # before hours of work that end there
    named, request = request.pretrained, request.on_top_of(project.manifest.last_run())
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
        return RunResult({}, None, {}, None, [])
    for fold in request.folds:
        check_fold(project, configurations[0], fold)
    if request.strategy != "scratch" and request.pretrained is None:
        for configuration in configurations:
            planning.planned_source(project, configuration)  # before hours of work that end there
    if _refines(request):
        for configuration in configurations:
            _refining_settings(project, request, configuration)
    evaluations = {}
    for configuration in configurations:
        for fold in request.folds:
            evaluation = _train_fold(project, request, configuration, fold, len(configurations))
            if evaluation is not None:
                evaluations[configuration, fold] = evaluation
    refiners = _refine(project, request, configurations)
    selected = _select(project, request, configurations)
    wanted = _prediction(project, request, configurations, selected, refiners)
    return RunResult(evaluations, selected, refiners, wanted, _predict_test(project, request, wanted))


def _check_early(project: Project, request: RunRequest) -> None:
    """Raises BadInputError for what can be known before anything is read."""
    known = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
    planned = project.plans()["configurations"] if planning.has_own_plans(project) else ()
    if wrong := [name for name in request.configurations or () if name not in (*known, *planned)]:
        raise BadInputError(f"nnU-Net has no configuration '{wrong[0]}'.", f"Choose of {', '.join(known)} with -c.")
    if labelled := [case.identifier for case in project.raw().labelled_cases()]:
        for fold in request.folds:
            refuse_unknown_fold(project, expected_folds(project, labelled), fold)
    if request.pretrained is not None and request.strategy == "scratch":
        raise BadInputError("--pretrained does not go with --strategy scratch.", "Leave one of them out.")
    if request.pretrained is not None and not request.pretrained.is_file():
        raise BadInputError(
            f"There is no checkpoint {request.pretrained}.",
            "Correct --pretrained; where the last run had it, `--pretrained none` pretrains.",
        )
    _check_refining(project, request)


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
    settings = _kept(project, stage, request.training)
    # ensembling configurations reads the softmax outputs of the validation cases
    probabilities = members > 1
    stages.train(project, configuration, fold, request.device, strategy, pretrained, probabilities, **settings)
    return evaluate_validation(project, strategy, configuration, fold)


def _pretrain(project: Project, request: RunRequest, configuration: str, fold: Fold) -> Path:
    fold = base_fold(project, configuration, fold)
    settings = _kept(project, f"pretrain/{configuration}/fold_{fold}", request.pretraining)
    return stages.pretrain(project, configuration, fold, request.device, **settings)


def _kept(project: Project, stage: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What the run wants, on top of the settings a single command gave the stage."""
    stored = project.manifest.stage(stage).get("settings", {})
    kept = {name: stored[name] for name in _KEPT_SETTINGS if name in stored}
    # a new plan is a newer decision than what a single command changed of an older one
    section = project.plans()["diffseg"]
    planned = stored.get("planned", {})
    kept |= {name: stored[name] for name in planned if planned[name] == section[name]}
    return {**kept, **wanted}


def _refines(request: RunRequest) -> bool:
    return bool(request.refine) and "all" not in request.folds


def _check_refining(project: Project, request: RunRequest) -> None:
    """Raises BadInputError where no refiner could be trained in the end; says where one is left out."""
    if not request.refine:
        return
    if "all" in request.folds:
        project.reporter.warn("no refiner: a model of all cases has no validation cases to tell whether it helps")
    refining.require_plain(request.strategy)


def _refining_settings(project: Project, request: RunRequest, configuration: str) -> dict[Fold, dict[str, Any]]:
    """Of each fold's refiner, the width included: as it was refined last, else as the first fold that was, with what
    was given on top.

    Raises:
        BadInputError: the folds' refiners could not predict together.
    """
    stored = {
        fold: project.manifest.stage(f"{refining.REFINE}/{configuration}/fold_{fold}").get("settings")
        for fold in request.folds
    }
    first = next((settings for settings in stored.values() if settings), {})
    settings = {}
    for fold, own in stored.items():
        kept = {name: value for name, value in (own or first).items() if name in _KEPT_REFINING}
        settings[fold] = {"width": (own or first).get("asked_width"), **kept, **request.refining}
    for name in _EQUAL_REFINING:
        values = {str(of_fold.get(name)): fold for fold, of_fold in settings.items()}
        if len(values) > 1:
            said = " and ".join(f"{value} (fold {fold})" for value, fold in values.items())
            raise BadInputError(
                f"The refiners of {configuration} cannot predict together: {name} is {said}.",
                f"Refine all folds with the same options, by `diffseg refine {project.id} -c {configuration} -f N`.",
            )
    return settings


def _refine(project: Project, request: RunRequest, configurations: tuple[str, ...]) -> dict[str, RefinerSelection]:
    """Refine every fold, and choose by its validation cases what of it is used; nothing for a model of all cases."""
    if not _refines(request):
        return {}
    for configuration in configurations:
        for fold, settings in _refining_settings(project, request, configuration).items():
            refining.refine(project, configuration, fold, request.device, request.strategy, **settings)
    return {name: select_refiner(project, name, request.folds, request.strategy) for name in configurations}


def _select(project: Project, request: RunRequest, configurations: tuple[str, ...]) -> selection.Selection | None:
    """None for a model of all cases: it has no validation cases of its own to choose by."""
    if "all" in request.folds:
        return None
    return selection.select(project, configurations, request.folds, request.strategy)


def _prediction(
    project: Project,
    request: RunRequest,
    configurations: tuple[str, ...],
    selected: selection.Selection | None,
    refiners: Mapping[str, RefinerSelection],
) -> prediction.PredictionRequest:
    """What the validation cases speak for."""
    configurations = selected.configurations if selected else configurations
    structures: tuple[str, ...] = ()
    complete = False
    if refiners and len(configurations) == 1:
        structures, complete = refiners[configurations[0]].structures, refiners[configurations[0]].complete
    elif refiners:
        project.reporter.warn("the refiners are not used: they were compared with single configurations, not ensembles")
    if structures:
        project.reporter.info("no postprocessing: it was chosen by segmentations that are not refined")
    return prediction.PredictionRequest(
        configurations=configurations,
        folds=request.folds,
        strategy=request.strategy,
        postprocessing=selected.postprocessing if selected and not structures else None,
        refine=RefineOptions() if structures else None,
        refined_structures=structures if structures and not complete else None,
    )


def _predict_test(project: Project, request: RunRequest, wanted: prediction.PredictionRequest) -> list[FailedCase]:
    source = project.raw().folder / "imagesTs"
    if not (request.predict_test and project.raw().test_cases()):
        return []
    # of its own for each strategy and choice of folds: jobs of single folds may be at work at once
    output = project.results / TEST_PREDICTIONS / f"{request.strategy}__{selection.folds_named(request.folds)}"
    return prediction.predict(project, wanted, source, output, request.device)
