"""The two training stages, *pretrain* and *train*: what they depend on, where they write, how they go on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from diffseg_nnunet import registry
from diffseg_nnunet.atomic import remove_leftovers
from diffseg_nnunet.diffusion.gaussian import DiffusionSettings
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline.device import gpu_memory_watched, gpu_of, prepare_device, release_memory
from diffseg_nnunet.pipeline.label_budgets import base_fold, budget_of
from diffseg_nnunet.pipeline.preprocessing import preprocessing_inputs, require_preprocessed
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.splits import check_fold, ensure_splits
from diffseg_nnunet.pipeline.starting import (
    FINAL,
    LATEST,
    Fold,
    find_pretrained,
    is_planned_source,
    probed_time_steps,
    refuse_misfit,
    start,
)
from diffseg_nnunet.planning.section import STAGES, diffseg_section, predicted_gib, stage_plan
from diffseg_nnunet.training import processes
from diffseg_nnunet.training.checkpoint import file_digest
from diffseg_nnunet.training.settings import (
    PretrainingSettings,
    ProbingSettings,
    TrainingSettings,
)

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
    asked = training_settings(strategy, **settings)
    weights = None
    if strategy != "scratch":
        weights = pretrained or find_pretrained(project, configuration, base_fold(project, configuration, fold))
    elif pretrained is not None:
        raise BadInputError("--pretrained does not go with --strategy scratch.", "Leave one of them out.")
    chosen = resolved(asked, strategy)
    if isinstance(asked, ProbingSettings):
        chosen = replace(chosen, time_steps=probed_time_steps(project, configuration, asked, weights))
    inputs = training_inputs(project, configuration, fold, strategy, chosen)
    if weights is not None:
        inputs["pretrained"] = file_digest(weights)
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
    """The settings with the initial rate that a strategy takes, and the time steps that a probe reads of a pretraining
    of this plan with 1000 of them: a result of another version's are others.

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
    inputs = stage_inputs(project, configuration, fold_cases(project, configuration, fold), settings)
    budget = budget_of(project, configuration, fold)
    return inputs | {"strategy": strategy} | ({} if budget is None else {"labels": budget.to_json()})


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


@dataclass(frozen=True)
class Job:
    """One training of one fold.

    Attributes:
        trainer: its registered name.
        stage: its name in the manifest.
        folder: nnU-Net's of the fold.
        inputs: what the result depends on.
        planned: the plan's patch, batch and memory.
        settings: of the trainer.
        noted: the settings as the manifest keeps them.
        weights: of a checkpoint, to start from.
        save_probabilities: of the validation cases.
        origin: what the manifest calls the weights.
    """

    origin: ClassVar[str] = "pretrained"

    project: Project
    trainer: str
    stage: str
    folder: Path
    inputs: Mapping[str, Any]
    planned: Mapping[str, Any]
    settings: TrainingSettings
    noted: Mapping[str, Any]
    device: Any
    weights: Path | None = None
    save_probabilities: bool = False

    @property
    def final(self) -> Path:
        return self.folder / FINAL

    @property
    def adapts(self) -> bool:
        """Whether the weights are those the plan was made to start from; others must fit as they are."""
        return is_planned_source(self.project, self.inputs.get("pretrained"))

    @property
    def configuration(self) -> str:
        """By nnU-Net's name of a model folder."""
        return self.folder.parent.name.split("__")[2]

    def check(self) -> None:
        """Raises BadInputError if the job cannot be done; touches nothing."""
        registry.load("trainers", self.trainer).own_batch_size(self.planned["batch_size"], processes.world_size())
        if self.weights is not None:
            self.check_weights()

    def check_weights(self) -> None:
        """Raises BadInputError if the weights cannot be started from."""
        refuse_misfit(self.project, self.trainer, self.configuration, self.settings, self.weights, self.adapts)

    def start(self, trainer: Any) -> None:
        """Give an initialised trainer the weights."""
        start(self.project, self.configuration, trainer, self.weights, self.adapts)

    def is_finished(self) -> bool:
        complete = not self.save_probabilities or any((self.folder / "validation").glob("*.npz"))
        return self.final.is_file() and complete and self.project.manifest.is_finished(self.stage, self.inputs)


class PretrainingJob(Job):
    """One pretraining of one fold."""

    def check(self) -> None:
        super().check()
        data, fold = self.project.preprocessed_folder(self.configuration).name, self.folder.name.removeprefix("fold_")
        trainer = registry.load("trainers", self.trainer)
        trainer.check_data(self.project.preprocessed, data, fold, self.inputs["cases"], self.settings)


def run_job(job: Job, resume: bool) -> Path:
    """Run a job in this process, or in this one of several that train together: the first keeps the books."""
    project = job.project
    gib = predicted_gib(job.planned, processes.world_size())
    with processes.process_group(job.device):
        if processes.rank() > 0:
            # nnU-Net prints in every process; the first one's log says it all
            watched = gpu_memory_watched(gpu_of(job.device), gib, project.id, lambda _: None)
            with watched, open(os.devnull, "w") as unread, redirect_stdout(unread):
                if processes.from_first(None):
                    _train(job)
            return job.final
        if resume and job.is_finished():
            project.reporter.info(f"{job.stage}: finished before, unchanged")
            processes.from_first(False)
            return job.final
        job.check()  # before anything earlier is set aside
        if not resume:
            _set_aside(project, job.folder)
        watched = gpu_memory_watched(gpu_of(job.device), gib, project.id, project.reporter.warn)
        discard = partial(_set_aside, project, job.folder)
        running = project.manifest.running(job.stage, job.inputs, job.noted, discard)
        with watched, running as run, project.log(job.stage.replace("/", "_")):
            remove_leftovers(job.folder)
            processes.from_first(True)
            run.outputs.update(_train(job))
    release_memory(job.device)  # the next fold of this process needs it
    return job.final


def _train(job: Job) -> dict[str, Any]:
    """Train and validate; returns what the manifest notes of the result."""
    trainer = _build_trainer(job)
    try:
        trainer.apply(job.settings)
        trainer.progress = lambda done, total, news: job.project.reporter.progress(job.stage, done, total, news)
        if _start_or_resume(job, trainer) != FINAL:
            trainer.run_training()
        trainer.perform_actual_validation(job.save_probabilities)
    except BaseException:
        trainer.close_loggers(failed=True)
        raise
    trainer.close_loggers()
    return _outputs(job, trainer)


def _build_trainer(job: Job) -> Any:
    """An nnU-Net trainer of the project's plans; its folder is the one nnU-Net derives, checked so that both agree."""
    trainer_class = registry.load("trainers", job.trainer)
    fold = job.folder.name.removeprefix("fold_")
    plans = {**job.project.plans(), "continue_training": (job.folder / LATEST).is_file()}
    trainer = trainer_class(
        plans, job.configuration, fold if fold == "all" else int(fold), job.project.dataset_json(), device=job.device
    )
    assert Path(trainer.output_folder) == job.folder, (trainer.output_folder, job.folder)
    return trainer


def _start_or_resume(job: Job, trainer: Any) -> str | None:
    """Prepare the trainer; returns the name of the checkpoint that is gone on from, if any."""
    there = next((name for name in (FINAL, LATEST) if (job.folder / name).is_file()), None)
    resume, reporter = processes.from_first(there), job.project.reporter
    trainer.initialize()
    if resume is not None:
        # our own file of this workspace, in nnU-Net's checkpoint format
        trainer.load_checkpoint(str(job.folder / resume))
        reporter.info(f"going on from {resume} at epoch {trainer.current_epoch}/{trainer.num_epochs}")
    elif job.weights is not None:
        job.start(trainer)
    return resume


def _set_aside(project: Project, folder: Path) -> None:
    """Results of other inputs are renamed, not overwritten: they may be hours of work."""
    if folder.exists() and any(folder.iterdir()):
        kept = folder.with_name(f"superseded_{folder.name}_{datetime.now():%Y%m%d-%H%M%S}")
        folder.rename(kept)
        project.reporter.warn(f"the earlier {folder.name}, of other data, plan or settings, is kept as {kept}")
    elif folder.exists():
        shutil.rmtree(folder)


def _outputs(job: Job, trainer: Any) -> dict[str, Any]:
    outputs: dict[str, Any] = {"checkpoint": str(job.final.relative_to(job.project.workspace.results))}
    if (pool := getattr(trainer, "pool_record", None)) is not None:
        outputs["cases_seen"] = pool
    if job.weights is not None:
        outputs[job.origin] = str(job.weights)
    return outputs
