"""One training of one fold, from its check to its record in the manifest: started, gone on with, or skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from diffseg_nnunet import registry
from diffseg_nnunet.atomic import remove_leftovers
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.inference.one_plan import trained_otherwise
from diffseg_nnunet.pipeline.device import gpu_memory_watched, gpu_of, release_memory
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.starting import FINAL, LATEST, is_planned_source, refuse_misfit, start
from diffseg_nnunet.planning.section import predicted_gib
from diffseg_nnunet.training import processes
from diffseg_nnunet.training.settings import ProbingSettings, TrainingSettings

HELD_BACK = "held_back"
"""Of a pretraining's inputs: unlabelled scans that it does not learn from."""


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

    def prepare(self, trainer: Any) -> None:
        """Tell a new trainer what its plan and its settings do not."""

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
        held_back = self.inputs.get(HELD_BACK, ())
        trainer.check_data(self.project.preprocessed, data, fold, self.inputs["cases"], self.settings, held_back)

    def prepare(self, trainer: Any) -> None:
        trainer.held_back = self.inputs.get(HELD_BACK, ())


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
        # the others of several processes would not wait for the first as long as that may have to
        alone = processes.world_size() == 1
        with project.manifest.turn(job.stage, project.reporter.info) if alone else nullcontext():
            finished = _run_as_first(job, resume, gib)
    if not finished:
        release_memory(job.device)  # the next fold of this process needs it
    return job.final


def _run_as_first(job: Job, resume: bool, gib: float) -> bool:
    """Run a job and keep the books; returns whether it had been finished before."""
    project = job.project
    if resume and job.is_finished():
        project.reporter.info(f"{job.stage}: finished before, unchanged")
        processes.from_first(False)
        return True
    job.check()  # before anything earlier is set aside
    if not resume:
        _set_aside(project, job.folder)
    if not isinstance(job, PretrainingJob):  # whose checkpoints hold their plans, and are used alone
        _set_other_plans_aside(job)
    watched = gpu_memory_watched(gpu_of(job.device), gib, project.id, project.reporter.warn)
    discard = partial(_set_aside, project, job.folder, _changed_settings(job))
    running = project.manifest.running(job.stage, job.inputs, job.noted, discard)
    with watched, running as run, project.log(job.stage.replace("/", "_")):
        remove_leftovers(job.folder)
        processes.from_first(True)
        run.outputs.update(_train(job))
    return False


def _train(job: Job) -> dict[str, Any]:
    """Train and validate; returns what the manifest notes of the result."""
    trainer = _build_trainer(job)
    try:
        trainer.apply(job.settings)
        job.prepare(trainer)
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


def _changed_settings(job: Job) -> str:
    """What the stage was done with before, and is not now, in words."""
    before = job.project.manifest.stage(job.stage).get("settings") or {}
    changed = [name for name in job.noted if name in before and before[name] != job.noted[name]]

    def told(value: Any) -> str:
        return "as by default" if value is None else "others" if isinstance(value, (Mapping, list)) else str(value)

    return "; ".join(f"{name} {told(before[name])}, now {told(job.noted[name])}" for name in changed)


def _set_aside(project: Project, folder: Path, changed: str = "") -> None:
    """Results of other inputs are renamed, not overwritten: they may be hours of work.

    Args:
        changed: settings, in words.
    """
    if folder.exists() and any(folder.iterdir()):
        kept = folder.with_name(f"superseded_{folder.name}_{datetime.now():%Y%m%d-%H%M%S}")
        folder.rename(kept)
        other = f"settings ({changed})" if changed else "data, plan or settings"
        project.reporter.warn(f"the earlier {folder.name}, of other {other}, is kept as {kept}")
    elif folder.exists():
        shutil.rmtree(folder)


def _set_other_plans_aside(job: Job) -> None:
    """nnU-Net keeps one plan for all folds of a model folder, from now on this one: what was trained by another
    would be predicted with by a plan that is not its own."""
    plans = job.project.plans()
    for path in sorted(job.folder.parent.glob(f"fold_*/{FINAL}")):
        if path.parent == job.folder:
            continue
        try:
            differing = trained_otherwise(path, plans, job.configuration)
        except BadInputError:  # a damaged one is none of this job's business, and refused where it is used
            continue
        if differing:
            with job.project.manifest.turn(f"{job.stage.rpartition('/')[0]}/{path.parent.name}"):
                _set_aside(job.project, path.parent)


def _outputs(job: Job, trainer: Any) -> dict[str, Any]:
    outputs: dict[str, Any] = {"checkpoint": str(job.final.relative_to(job.project.workspace.results))}
    if (pool := getattr(trainer, "pool_record", None)) is not None:
        outputs["cases_seen"] = pool
    if job.weights is not None:
        outputs[job.origin] = str(job.weights)
    if isinstance(job.settings, ProbingSettings):
        outputs["reads"] = job.settings.probe.words
    return outputs
