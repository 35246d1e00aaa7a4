"""The stage *refine*: a refiner on a finished fold, sized for the plan's budget."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from diffseg_nnunet import registry
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.inference.export import is_exported
from diffseg_nnunet.inference.folders import VALIDATION
from diffseg_nnunet.inference.predictor import require_trained
from diffseg_nnunet.pipeline.cascades import previous_stage_folder, previous_stage_inputs
from diffseg_nnunet.pipeline.device import prepare_device
from diffseg_nnunet.pipeline.evaluating import not_scorable
from diffseg_nnunet.pipeline.jobs import Job, run_job
from diffseg_nnunet.pipeline.preprocessing import require_preprocessed
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.stages import fold_cases, stage_inputs
from diffseg_nnunet.pipeline.starting import FINAL, Fold, preprocessed_otherwise
from diffseg_nnunet.planning.section import diffseg_section, stage_plan
from diffseg_nnunet.refinement.network import HEADS, REFINER_FORMAT
from diffseg_nnunet.refinement.sizing import WIDTHS
from diffseg_nnunet.training import checkpoint as checkpoints
from diffseg_nnunet.training import processes
from diffseg_nnunet.training.checkpoint import file_digest
from diffseg_nnunet.training.refining import RefinementSettings

SAMPLING = ("samples", "sampling_steps", "sampler")
"""The settings that say how cases are refined, and nothing of the training."""
REFINE = "refine"
"""The trainer's registered name, and the stage's."""
_TOO_SURE = (
    "the refiner learns from the segmentor's own training cases, of which it is surer than of new ones; of a share of "
    "the samples it is shown worse views, and whether refining helps is told by the validation cases alone"
)


def refine(
    project: Project,
    configuration: str,
    fold: Fold,
    device_name: str,
    strategy: str = "finetune",
    checkpoint: Path | None = None,
    width: int | None = None,
    save_probabilities: bool = False,
    *,
    resume: bool = True,
    **settings: Any,
) -> Path:
    """Train a refiner on a finished fold and predict its validation cases; resumes an interrupted run, skips a finished
    one.

    Args:
        strategy: by which the fold was trained.
        checkpoint: another segmentor of the same plan and fold, e.g. stock nnU-Net's; None: the fold's own.
        width: channels of the refiner's first stage; None: the widest that fits the plan's budget.
        save_probabilities: of the validation cases.
        resume: False sets earlier results aside and starts afresh.
        settings: fields of :class:`RefinementSettings` but the width and the batch.

    Returns:
        The final checkpoint.

    Raises:
        BadInputError: the fold is not finished, its network is no plain nnU-Net or of another plan, or no refiner fits
            the budget.
    """
    if width is not None and (width < 1 or width % HEADS):
        raise BadInputError(f"--width {width} is no multiple of {HEADS}.", f"Give {', '.join(map(str, WIDTHS))}.")
    require_scorable(project)
    device = prepare_device(device_name)
    plans = project.plans()
    planned = stage_plan(plans, configuration, "training")
    require_preprocessed(project, configuration)
    segmentor = checkpoint or _finished_fold(project, strategy, configuration, fold)
    record = {"strategy": strategy, "sha256": file_digest(segmentor), "checkpoint": segmentor.name}
    asked = RefinementSettings(**settings)
    cases = fold_cases(project, configuration, fold)
    # as it was asked for: width and batch follow from it and from the budget
    inputs = stage_inputs(project, configuration, cases, asked) | {
        "segmentor": record,
        "format": REFINER_FORMAT,
        "width": width,
        "budget_gib": diffseg_section(plans)["memory"]["budget_gib"],
        **previous_stage_inputs(project, configuration, fold, cases, strategy),
    }
    inputs["settings"] = {name: value for name, value in inputs["settings"].items() if name not in SAMPLING}
    folder = project.model_folder(REFINE, configuration) / f"fold_{fold}"
    stage = f"{REFINE}/{configuration}/fold_{fold}"
    job = RefiningJob(
        project, REFINE, stage, folder, inputs, planned, asked, {}, device, segmentor, save_probabilities, record=record
    )
    if not (resume and job.is_finished()):
        job = _fitted(job, width)
        project.reporter.info(_TOO_SURE)
    return run_job(job, resume)


def require_scorable(project: Project) -> None:
    """Raises BadInputError if segmentations of the data set cannot be scored."""
    if (why := not_scorable(project)) is not None:
        raise BadInputError(f"Whether a refiner helps could not be told: {why}", "Convert the images, and train again.")


def is_refined(project: Project, configuration: str, fold: Fold) -> bool:
    """Whether the fold has a refiner, of whatever settings."""
    return project.manifest.stage(f"{REFINE}/{configuration}/fold_{fold}").get("status") == "finished"


def require_fit(project: Project, configuration: str, width: int | None = None, **settings: Any) -> None:
    """Raises BadInputError if no refiner of the configuration fits the plan's budget."""
    _fit(project, configuration, RefinementSettings(**settings), width)


def _fit(project: Project, configuration: str, settings: RefinementSettings, width: int | None) -> Any:
    plans = project.plans()
    planner = registry.load("planners", diffseg_section(plans)["backbone"])
    return planner.fit_refiner(plans, configuration, project.dataset_json(), settings, width)


def require_plain(strategy: str) -> None:
    """Raises BadInputError if a strategy's networks are none that a refiner reads."""
    if not registry.load("trainers", strategy).is_stock:
        raise BadInputError(
            f"A model of --strategy {strategy} has a head of its own, whose features a refiner does not read.",
            "Refine a fold of --strategy finetune, decoder or scratch.",
        )


def _finished_fold(project: Project, strategy: str, configuration: str, fold: Fold) -> Path:
    require_plain(strategy)
    model = project.model_folder(strategy, configuration)
    require_trained(model, [fold], FINAL, f"train {project.id} -c {configuration} --strategy {strategy}")
    folder, ending = model / f"fold_{fold}", project.dataset_json()["file_ending"]
    missing = [
        case
        for case in fold_cases(project, configuration, fold)["val"]
        if not is_exported(folder / "validation", case, ending, False)
    ]
    if missing and fold != "all":
        raise BadInputError(
            f"{folder} is not finished: {len(missing)} of its validation cases are not predicted.",
            f"Run `diffseg train {project.id} -c {configuration} -f {fold} --strategy {strategy}` again: it goes on.",
        )
    return folder / FINAL


def _fitted(job: RefiningJob, width: int | None) -> RefiningJob:
    """The job with a refiner and a batch that fit the plan's budget."""
    project = job.project
    fitted = _fit(project, job.configuration, job.settings, width)
    gib, asked = fitted.memory.total_gib, job.settings
    project.reporter.info(
        f"refiner with {fitted.width} channels, batches of {fitted.batch_size}: {gib:.1f} GiB by prediction"
    )
    if fitted.batch_size < fitted.planned_batch_size:
        project.reporter.warn(
            f"batches of {fitted.batch_size} instead of the planned {fitted.planned_batch_size}: more do not fit "
            f"{job.inputs['budget_gib']:g} GiB"
        )
    settings = replace(asked, width=fitted.width, batch_size=fitted.batch_size)
    stage = fitted.as_stage(job.planned["patch_size"])
    noted = {**settings.to_json(), "asked_width": width, "memory_gib": stage["memory_gib"]}
    return replace(job, planned=stage, settings=settings, noted=noted)


@dataclass(frozen=True, kw_only=True)
class RefiningJob(Job):
    """One refinement of one fold; its weights are the segmentor's.

    Attributes:
        record: where the segmentor came from.
    """

    origin: ClassVar[str] = "segmentor"
    record: dict[str, str]

    def check_weights(self) -> None:
        content, project = checkpoints.load_safely(self.weights), self.project
        network = registry.load("trainers", REFINE).planned_segmentor(
            project.plans(), self.configuration, project.dataset_json()
        )
        checkpoints.require_same_network(
            network.state_dict(), content["network_weights"], str(self.weights), with_outputs=True
        )
        differing = preprocessed_otherwise(project, self.configuration, content)
        theirs = checkpoints.made_with(content)
        if (
            theirs.get("dataset_json", {}).get("labels", project.dataset_json()["labels"])
            != (project.dataset_json()["labels"])
        ):
            differing.append("labels")
        if differing:
            raise BadInputError(
                f"{self.weights} is a segmentor of another plan: {', '.join(differing)} differ.",
                f"Train the fold with this plan (`diffseg train {project.id}`), or restore the plan it was made with.",
            )
        fold = theirs.get("fold")
        if fold is not None and str(fold) != self.folder.name.removeprefix("fold_"):
            project.reporter.warn(
                f"{self.weights} was trained on fold {fold}: it may know the validation cases of {self.folder.name}"
            )

    def is_finished(self) -> bool:
        return super().is_finished() and not self._is_sampled_otherwise()

    def _is_sampled_otherwise(self) -> bool:
        """Whether its validation was refined by other samples or steps than are asked for."""
        noted = self.project.manifest.stage(self.stage).get("settings", {})
        return any(noted.get(name) != getattr(self.settings, name) for name in SAMPLING)

    def prepare(self, trainer: Any) -> None:
        self._sample_anew()
        # nnU-Net would look for it among refiners: the segmentor reads what its own first stage says
        folder = previous_stage_folder(self.project, self.configuration, self.record["strategy"])
        trainer.folder_with_segs_from_previous_stage = folder and str(folder)

    def _sample_anew(self) -> None:
        """Where a finished refiner is to sample otherwise: its validation goes, and is made again without training."""
        if processes.rank() > 0 or not self.final.is_file():
            return
        content = checkpoints.load_safely(self.final)
        if all(content["settings"][name] == getattr(self.settings, name) for name in SAMPLING):
            return
        for name in (VALIDATION, f"{VALIDATION}_report"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        checkpoints.save(self.final, {**content, "settings": self.settings.to_json()})  # what predictions go by

    def start(self, trainer: Any) -> None:
        content = checkpoints.load_safely(self.weights)
        trainer.take_segmentor(content["network_weights"], str(self.weights), self.record)
        self.project.reporter.info(f"refining {self.weights}")
