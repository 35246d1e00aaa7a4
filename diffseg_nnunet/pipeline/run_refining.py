"""The refiners of a run: checked before anything is trained, trained on what was selected, and used where they help."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline import refining, selection, stages
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.refiner_selection import RefinerSelection, cases_needed, select_refiner
from diffseg_nnunet.pipeline.run_request import RunRequest
from diffseg_nnunet.pipeline.starting import Fold

_KEPT_REFINING = (
    *("iterations", "seed", "initial_lr", "precision"),
    *("segmentor", "segmentor_weight", "binary", "diffusion", "dice_weight", "start_share", "degrade"),
    *("samples", "sampling_steps", "sampler"),
)
"""What a run keeps of the last one."""
_EQUAL_REFINING = (
    *("width", "segmentor", "binary", "diffusion", "dice_weight", "start_share"),
    *("samples", "sampling_steps", "sampler"),
)
"""What folds that predict together, and are compared together, have in common."""


def refines(request: RunRequest) -> bool:
    return bool(request.refine) and "all" not in request.folds


def check_request(project: Project, request: RunRequest) -> None:
    """Raises BadInputError where no refiner could be trained in the end; says where one is left out."""
    if not request.refine:
        return
    if "all" in request.folds:
        project.reporter.warn("no refiner: a model of all cases has no validation cases to tell whether it helps")
    refining.require_plain(request.strategy)


def check_refiners(project: Project, request: RunRequest, configurations: tuple[str, ...]) -> None:
    """Raises BadInputError where no configuration could be refined, or the folds' refiners not be used together; says
    which could not, and where the validation cases could not speak for a refiner."""
    refining.require_scorable(project)
    misfits = [error for each in configurations if (error := _misfit(project, request, each)) is not None]
    if len(misfits) == len(configurations):
        raise misfits[0]
    for error in misfits:
        project.reporter.warn(f"if it is selected, it is not refined: {error}")
    dataset_json = project.dataset_json()
    structures = dataset_json["labels"].keys() - {"background", "ignore"}
    tests = 1 if "regions_class_order" in dataset_json else len(structures)
    cases = sum(len(stages.fold_cases(project, configurations[0], fold)["val"]) for fold in request.folds)
    if cases < (needed := cases_needed(tests)):
        project.reporter.warn(
            f"{cases} validation case(s) cannot tell a gain of {tests} structure(s) from chance, {needed} could: the "
            "refiner will be trained and not be used; refine more folds, or predict with `diffseg predict --refine`"
        )


def _misfit(project: Project, request: RunRequest, configuration: str) -> BadInputError | None:
    """Why a configuration could not be refined; None where it could, or is."""
    settings = _refining_settings(project, request, configuration)
    unfinished = [fold for fold in settings if not refining.is_refined(project, configuration, fold)]
    if not unfinished:
        return None
    try:
        refining.require_fit(project, configuration, **settings[unfinished[0]])
    except BadInputError as error:
        return error
    return None


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


def refine_selected(
    project: Project, request: RunRequest, selected: selection.Selection | None
) -> RefinerSelection | None:
    """Refine every fold of the selected configuration, and choose by the validation cases what of it is used.

    Nothing of an ensemble, whose members' refiners cannot be compared with it, nor of a model of all cases.
    """
    if selected is None or not refines(request):
        return None
    if len(selected.configurations) > 1:
        project.reporter.warn(
            f"no refiner: the validation cases speak for the ensemble of {' and '.join(selected.configurations)}, and "
            "refiners are of single configurations"
        )
        return None
    (configuration,) = selected.configurations
    if (misfit := _misfit(project, request, configuration)) is not None:
        project.reporter.warn(f"no refiner: {misfit}")
        return None
    for fold, settings in _refining_settings(project, request, configuration).items():
        settings["workers"] = request.workers
        refining.refine(project, configuration, fold, request.device, request.strategy, **settings)
    found = select_refiner(project, configuration, request.folds, request.strategy)
    if found.crossval is None or found.crossval.dsc_after >= selected.dsc_after:
        return found
    project.reporter.info(
        f"{configuration}: the refiner is not used: with nnU-Net's postprocessing, the validation cases have a mean "
        f"DSC of {found.crossval.dsc_after:.4f} with it and of {selected.dsc_after:.4f} without"
    )
    return replace(found, structures=(), crossval=None)
