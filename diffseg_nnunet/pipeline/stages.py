"""The two training stages, *pretrain* and *train*: their settings, what they depend on, where they write."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from diffseg_nnunet import registry
from diffseg_nnunet.diffusion.gaussian import DiffusionSettings
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline.cascades import previous_stage_inputs, refuse_cascade
from diffseg_nnunet.pipeline.device import prepare_device
from diffseg_nnunet.pipeline.held_back import held_back, shown, warn_of_divided_patients
from diffseg_nnunet.pipeline.jobs import HELD_BACK, Job, PretrainingJob, run_job
from diffseg_nnunet.pipeline.label_budgets import base_fold, budget_of
from diffseg_nnunet.pipeline.preprocessing import preprocessing_inputs, require_preprocessed
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.splits import check_fold, ensure_splits
from diffseg_nnunet.pipeline.starting import Fold, find_pretrained, probed
from diffseg_nnunet.planning.section import STAGES, diffseg_section, stage_plan
from diffseg_nnunet.training.checkpoint import file_digest
from diffseg_nnunet.training.settings import PretrainingSettings, ProbingSettings, TrainingSettings

PLANNED_SETTINGS = ("diffusion", "coordinates")
"""What the plan says of a pretraining, and the command may change."""
_OPTIONS = {
    "keep_coordinates": "--keep-coordinates",
    "transfer": "--transfer",
    "fold_timestep": "--fold-timestep",
    "time_steps": "--probe-time-steps",
    "noisy": "--probe-clean or --probe-noisy",
    "augment": "--augment or --no-augment",
}
"""Of the settings that some strategies' trainers have and others have not."""


def pretrain(
    project: Project, configuration: str, fold: Fold, device_name: str, *, resume: bool = True, **settings: Any
) -> Path:
    """Pretrain the planned network; resumes an interrupted run with the same inputs, skips a finished one.

    Args:
        fold: its training cases and the unlabelled pool are pretrained on; "all": every case. A label budget is
            pretrained for as the fold it was drawn from is.
        resume: False sets earlier results aside and starts afresh.
        settings: fields of :class:`PretrainingSettings` other than the plan's; of ``diffusion`` and ``coordinates``
            those fields that differ.

    Returns:
        The final checkpoint.
    """
    device = prepare_device(device_name)
    plans = project.plans()
    planned = stage_plan(plans, configuration, "pretraining")
    require_preprocessed(project, configuration)
    chosen = PretrainingSettings.from_plan(diffseg_section(plans), **settings)
    fold = base_fold(project, configuration, fold)
    cases = fold_cases(project, configuration, fold)
    inputs = stage_inputs(project, configuration, cases, chosen)
    if chosen.pool != "all" and (hidden := held_back(project, fold, cases["val"])):
        inputs[HELD_BACK] = hidden
        project.reporter.info(f"fold {fold}: {shown(hidden)}")
    folder = project.model_folder("pretrain", configuration) / f"fold_{fold}"
    stage = f"pretrain/{configuration}/fold_{fold}"
    section = {name: diffseg_section(plans)[name] for name in PLANNED_SETTINGS}
    noted = {**chosen.to_json(), "planned": section}
    return run_job(PretrainingJob(project, "pretrain", stage, folder, inputs, planned, chosen, noted, device), resume)


def train(
    project: Project,
    configuration: str,
    fold: Fold,
    device_name: str,
    strategy: str = "finetune",
    pretrained: Path | None = None,
    save_probabilities: bool = False,
    *,
    resume: bool = True,
    **settings: Any,
) -> Path:
    """Train one fold and predict its validation cases; resumes an interrupted run, skips a finished one.

    Args:
        strategy: a registered trainer's name: "scratch", or one of those that start from a pretrained network.
        pretrained: checkpoint to start from; None: this data set's own of the same fold (of the fold it was drawn
            from, if it is a label budget), else of all cases.
        save_probabilities: of the validation cases, for ensembling configurations.
        resume: False sets earlier results aside and starts afresh.
        settings: fields of the trainer's settings, :class:`SegmentationSettings` or :class:`ProbingSettings`.

    Returns:
        The final checkpoint.

    Raises:
        BadInputError: the strategy starts from a pretrained network and there is none, or it does not fit; or what was
            given does not go with the strategy.
    """
    device = prepare_device(device_name)
    planned = stage_plan(project.plans(), configuration, "training")
    require_preprocessed(project, configuration)
    if not project.labelled_preprocessed(configuration):
        raise BadInputError(
            f"{project.name} has no labels: there is nothing to train.",
            f"Pretrain on it with `diffseg pretrain {project.id}`, or add labels.",
        )
    check_fold(project, configuration, fold)
    if project.configuration(configuration).previous_stage_name is not None:
        budget = budget_of(project, configuration, fold)
        refuse_cascade(configuration, strategy, pretrained, budget and budget.budget)
    asked = chosen = training_settings(strategy, **settings)
    weights = None
    if strategy != "scratch":
        weights = pretrained or find_pretrained(project, configuration, base_fold(project, configuration, fold))
    elif pretrained is not None:
        raise BadInputError("--pretrained does not go with --strategy scratch.", "Leave one of them out.")
    if isinstance(asked, ProbingSettings):
        chosen = probed(project, configuration, asked, weights)
    chosen = resolved(chosen, strategy)
    inputs = training_inputs(project, configuration, fold, strategy, chosen)
    if weights is not None:
        inputs["pretrained"] = file_digest(weights)
    warn_of_divided_patients(project, fold, inputs["cases"])
    folder = project.model_folder(strategy, configuration) / f"fold_{fold}"
    stage = training_stage(strategy, configuration, fold)
    noted = asked.to_json() | ({"labels": inputs["labels"]} if "labels" in inputs else {})
    job = Job(project, strategy, stage, folder, inputs, planned, chosen, noted, device, weights, save_probabilities)
    return run_job(job, resume)


def training_settings(strategy: str, **settings: Any) -> TrainingSettings:
    """The settings of a strategy's trainer, as they are asked for.

    Args:
        settings: fields of them.

    Raises:
        BadInputError: what was given does not go with the strategy.
    """
    settings_type = registry.load("trainers", strategy).settings_type
    known = {field.name for field in fields(settings_type)}
    for name, option in _OPTIONS.items():
        if name in settings and name not in known:
            raise BadInputError(f"{option} does not go with --strategy {strategy}.", "Leave one of them out.")
    return settings_type(**settings)


def resolved(settings: TrainingSettings, strategy: str) -> TrainingSettings:
    """The settings with the initial rate that a strategy takes and, unless it is known, what a probe reads of a
    pretraining with the usual number of time steps: a result of another version's is another one.

    What is asked for is kept as it is, since with another optimizer, or from another network, it means other ones.
    """
    if isinstance(settings, ProbingSettings):
        settings = settings.reading(DiffusionSettings().timesteps)
    return replace(settings, initial_lr=settings.rate(registry.load("trainers", strategy).strategy))


def training_stage(strategy: str, configuration: str, fold: Fold) -> str:
    """Its name in the manifest."""
    return f"train/{strategy}/{configuration}/fold_{fold}"


def training_inputs(
    project: Project, configuration: str, fold: Fold, strategy: str, settings: TrainingSettings
) -> dict[str, Any]:
    """What the training of a fold depends on, but for the network that it starts from.

    Args:
        settings: resolved.
    """
    cases = fold_cases(project, configuration, fold)
    inputs = stage_inputs(project, configuration, cases, settings) | {"strategy": strategy}
    if (budget := budget_of(project, configuration, fold)) is not None:
        inputs["labels"] = budget.to_json()
    return inputs | previous_stage_inputs(project, configuration, fold, cases, strategy)


def fold_cases(project: Project, configuration: str, fold: Fold) -> dict[str, list[str]]:
    """Training and validation cases of a fold."""
    labelled = list(project.labelled_preprocessed(configuration))
    if fold == "all" or not labelled:
        if fold != "all":
            raise BadInputError(f"{project.name} has no labels, so it has no folds.", "Use `-f all`.")
        return {"train": labelled, "val": labelled}
    check_fold(project, configuration, fold)
    return ensure_splits(project, configuration)[int(fold)]


def stage_inputs(project: Project, configuration: str, cases: dict, settings: TrainingSettings) -> dict[str, Any]:
    """What a training depends on: data, plan, cases, settings; not the device, nor the number of workers."""
    plans = project.plans()
    section = {k: v for k, v in diffseg_section(plans).items() if k in ("mirroring", "diffusion", "coordinates")}
    own = {k: v for k, v in project.configuration(configuration).configuration.items() if k != "data_identifier"}
    return {
        "data": preprocessing_inputs(project, configuration),
        "configuration": own,
        "stages": {
            stage: {key: planned[key] for key in ("patch_size", "batch_size")}  # not its memory, predicted or measured
            for stage, planned in diffseg_section(plans)["configurations"][configuration].items()
            if stage in STAGES
        },
        "section": section,
        "cases": cases,
        "settings": replace(settings, workers=None).to_json(),
    }
