"""The stage *preprocess*: labelled cases and, beside them, the unlabelled pool, by one plan; resumable per case."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
from typing import Any

from diffseg_nnunet.atomic import DISK_FULL, full_disk_named, remove_leftovers, temporary_sibling, write_file
from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.lifetime import end_with_parent
from diffseg_nnunet.pipeline.planning import require_planned
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.verifying import is_verified
from diffseg_nnunet.planning.hardware import worker_count
from diffseg_nnunet.planning.section import PLANS_NAME
from diffseg_nnunet.raw_dataset import Case, RawDataset
from diffseg_nnunet.verification import check_case

_WORTH_A_WORKER_S = 15.0  # a spawned worker imports nnU-Net and torch first, 3-5 s of every core
_ENDINGS = ("_seg.b2nd", ".b2nd", ".pkl")
"""What one case becomes; the properties are published last, so their presence means that the case is whole."""


@dataclass(frozen=True)
class Job:
    """One case to preprocess.

    Attributes:
        folder: where the result goes.
        source: id of the data set it comes from.
        verified: *verify* has passed its images; else they are checked first.
    """

    case: Case
    folder: Path
    source: int
    verified: bool


@dataclass(frozen=True)
class _Plan:
    """What a worker needs besides the job; small enough to send along."""

    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]


def preprocess(project: Project, configurations: Sequence[str]) -> None:
    """Preprocess all cases for each configuration; finished cases are kept as long as data and plan are unchanged.

    Raises:
        BadInputError: cases that could not be read; all others are done, and the message names the rest.
        StageFailedError: a worker process was killed.
    """
    require_planned(project)
    raw, plans = project.raw(), project.plans()
    _copy_references(project, raw)
    done: set[str] = set()
    for name in configurations:
        stage = _stage(project, name)
        if stage not in done:  # a cascade's last stage shares the data of 3d_fullres
            _preprocess_configuration(project, raw, plans, _owner(project, name))
            done.add(stage)


def preprocessing_inputs(project: Project, configuration: str) -> dict[str, Any]:
    """What the preprocessed data of a configuration depend on; the same for all that share them."""
    plans = project.plans()
    settings = project.configuration(_owner(project, configuration))
    keys = ("spacing", "normalization_schemes", "use_mask_for_norm", "preprocessor_name", "patch_size")
    resampling = {k: v for k, v in settings.configuration.items() if k.startswith("resampling_fn")}
    return {
        "content": project.raw().content_signature(),
        "pool": {d.name: d.content_signature() for d in pool_datasets(project)},
        "configuration": {key: settings.configuration[key] for key in keys},
        "resampling": resampling,
        "intensities": plans["foreground_intensity_properties_per_channel"],
        "transpose": plans["transpose_forward"],
        "reader": plans["image_reader_writer"],
    }


def pool_datasets(project: Project) -> list[RawDataset]:
    """The further data sets of the plan's pool."""
    names = project.plans()["diffseg"]["pool"]["unlabelled_datasets"]
    return [RawDataset.open(project.workspace.raw / name) for name in names]


def require_preprocessed(project: Project, configuration: str) -> None:
    """Raises BadInputError unless the configuration is preprocessed by the present plan from the present data."""
    require_planned(project)
    if not project.manifest.is_finished(_stage(project, configuration), preprocessing_inputs(project, configuration)):
        raise BadInputError(
            f"{project.name} is not preprocessed for {configuration}, or data or plan have changed since.",
            f"Run `diffseg preprocess {project.id} -c {configuration}`.",
        )


def _stage(project: Project, configuration: str) -> str:
    """The stage's name in the manifest, one for each folder of preprocessed data."""
    return f"preprocess/{_data_name(project, configuration)}"


def _data_name(project: Project, configuration: str) -> str:
    return project.configuration(configuration).data_identifier.removeprefix(f"{PLANS_NAME}_")


def _owner(project: Project, configuration: str) -> str:
    """The configuration that preprocessed data are named after: a cascade's last stage reads those of 3d_fullres, and
    may have another patch."""
    name = _data_name(project, configuration)
    return name if name in project.plans()["configurations"] else configuration


def _preprocess_configuration(project: Project, raw: RawDataset, plans: dict[str, Any], name: str) -> None:
    stage = _stage(project, name)
    with project.manifest.turn(stage, project.reporter.info):
        _preprocess_stage(project, raw, plans, name, stage)


def _preprocess_stage(project: Project, raw: RawDataset, plans: dict[str, Any], name: str, stage: str) -> None:
    inputs = preprocessing_inputs(project, name)
    jobs = list(_jobs(project, raw, name))
    if project.manifest.is_finished(stage, inputs) and all(_is_done(job) for job in jobs):
        return
    folders = {project.preprocessed_folder(name), project.unlabelled_folder(name)}

    def discard() -> None:
        for folder in folders:
            if folder.exists():  # out of the way first: what cannot be removed must not be taken for done
                folder.rename(temporary_sibling(folder))
            shutil.rmtree(temporary_sibling(folder), ignore_errors=True)

    running = project.manifest.running(stage, inputs, {"configuration": name}, discard)
    with running as run, project.log("preprocess"):
        for folder in folders | {job.folder for job in jobs}:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder.parent, folder.name)
        open_jobs = [job for job in jobs if not _is_done(job)]
        plan = _Plan(plans, name, project.dataset_json())
        failures = _run(open_jobs, plan, lambda done: project.reporter.progress(stage, done, len(open_jobs)))
        run.outputs.update(cases=len(jobs), preprocessed_now=len(open_jobs) - len(failures))
        if failures:
            listed = "\n  ".join(f"{job.case.identifier}: {reason}" for job, reason in failures)
            commands = " and ".join(
                f"`diffseg verify {source}`" for source in sorted({job.source for job, _ in failures})
            )
            raise BadInputError(
                f"{len(failures)} case(s) of {project.name} failed in preprocessing, others are done:\n  {listed}\n",
                f"Look at them with {commands}, mend or remove them, and run the command again.",
            )


def _jobs(project: Project, raw: RawDataset, configuration: str) -> Iterator[Job]:
    labelled, unlabelled = project.preprocessed_folder(configuration), project.unlabelled_folder(configuration)
    verified = is_verified(project)
    for case in raw.labelled_cases():
        yield Job(case, labelled, project.id, verified)
    for case in raw.unlabelled_cases():
        yield Job(case, unlabelled / raw.name, project.id, verified)
    for dataset in pool_datasets(project):
        source = Project(project.workspace, dataset.name)
        verified = is_verified(source)
        # the labels of another data set are not read
        for case in [*dataset.labelled_cases(), *dataset.unlabelled_cases()]:
            yield Job(Case(case.identifier, case.images, None), unlabelled / dataset.name, source.id, verified)


def _is_done(job: Job) -> bool:
    return all((job.folder / f"{job.case.identifier}{ending}").is_file() for ending in _ENDINGS)


def _run(jobs: Sequence[Job], plan: _Plan, progress: Callable[[int], None]) -> list[tuple[Job, str]]:
    """Preprocess here while it is quick, in workers where that pays; returns the failures and their reasons."""
    failures: list[tuple[Job, str]] = []
    started = monotonic()
    for done, job in enumerate(jobs, start=1):
        _note(failures, job, _attempt(job, plan))
        progress(done)
        remaining_s = (monotonic() - started) / done * (len(jobs) - done)
        if worker_count() > 1 and remaining_s > _WORTH_A_WORKER_S * worker_count():
            return failures + _run_in_workers(jobs[done:], plan, lambda more, done=done: progress(done + more))
    return failures


def _run_in_workers(jobs: Sequence[Job], plan: _Plan, progress: Callable[[int], None]) -> list[tuple[Job, str]]:
    failures: list[tuple[Job, str]] = []
    workers = worker_count()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        futures = {pool.submit(_attempt, job, plan): job for job in jobs}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                _note(failures, futures[future], future.result())
                progress(done)
        except BrokenProcessPool as error:
            unfinished = [job.case.identifier for future, job in futures.items() if not _is_done(job)]
            raise StageFailedError(
                f"A preprocessing worker was killed, most likely for want of memory, at one of: "
                f"{', '.join(unfinished[: 2 * workers])}.",
                "Run the command again with fewer workers (nnUNet_def_n_proc=1), or with more memory; "
                "finished cases are kept.",
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failures


def _note(failures: list[tuple[Job, str]], job: Job, reason: str | None) -> None:
    if reason is not None:
        failures.append((job, reason))


def _attempt(job: Job, plan: _Plan) -> str | None:
    """None, or why the case could not be preprocessed; running out of disk is no property of the case."""
    try:
        preprocess_case(job, plan)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        return str(error).strip() or type(error).__name__
    return None


def preprocess_case(job: Job, plan: _Plan) -> None:
    """Preprocess one case with nnU-Net's preprocessor and publish its three files, the properties last.

    Raises:
        BadInputError: its images have not been verified, and are wrong.
    """
    from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    if not job.verified:
        _refuse_bad_images(job.case, len(plan.dataset_json["channel_names"]))
    manager = PlansManager(plan.plans)
    configuration = manager.get_configuration(plan.configuration)
    staging = temporary_sibling(job.folder)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with full_disk_named(job.folder / job.case.identifier):
            target = staging / job.case.identifier
            configuration.preprocessor_class(verbose=False).run_case_save(
                str(target),
                [str(path) for path in job.case.images],
                None if job.case.label is None else str(job.case.label),
                manager,
                configuration,
                plan.dataset_json,
            )
            if job.case.label is None:
                # nnU-Net's loader looks for the key; without locations it takes random patches
                properties = load_pickle(f"{target}.pkl")
                labels = manager.get_label_manager(plan.dataset_json)
                properties["class_locations"] = {(-1, *labels.all_labels): []}
                write_pickle(properties, f"{target}.pkl")
            for ending in _ENDINGS:
                os.replace(f"{target}{ending}", job.folder / f"{job.case.identifier}{ending}")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_bad_images(case: Case, channel_count: int) -> None:
    """nnU-Net's readers take truncated, constant and not finite images without a word."""
    images = Case(case.identifier, case.images, None)
    examination = check_case(images, channel_count=channel_count, label_values=None)
    errors = [str(finding) for finding in examination.findings if finding.severity == "error"]
    if errors:
        raise BadInputError(" ".join(errors))


def _copy_references(project: Project, raw: RawDataset) -> None:
    """Reference segmentations beside the preprocessed data, where nnU-Net's validation reads them."""
    folder = project.preprocessed / "gt_segmentations"
    for case in raw.labelled_cases():
        target = folder / f"{case.identifier}{raw.file_ending}"
        if not _is_copy(target, case.label):
            write_file(target, lambda path, source=case.label: shutil.copy2(source, path))


def _is_copy(target: Path, source: Path) -> bool:
    """By size and time of modification, which copies keep."""
    if not target.is_file():
        return False
    copy, original = target.stat(), source.stat()
    return (copy.st_size, copy.st_mtime_ns) == (original.st_size, original.st_mtime_ns)
