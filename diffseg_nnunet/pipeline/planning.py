"""The stage *plan*."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from diffseg_nnunet import registry
from diffseg_nnunet.atomic import write_text
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.planning.decisions import Decision
from diffseg_nnunet.planning.explanation import explain
from diffseg_nnunet.planning.gpus import memory_budget
from diffseg_nnunet.planning.hardware import worker_count
from diffseg_nnunet.planning.section import diffseg_section
from diffseg_nnunet.raw_dataset import RawDataset, read_json_object
from diffseg_nnunet.verification import listed


@dataclass(frozen=True)
class PlanRequest:
    """What `diffseg plan` was asked for; the defaults are nnU-Net's where it has one.

    Attributes:
        gpu_memory: "auto" or GiB.
        backbone: registered planner, "resenc" or "plain".
        base_features: channels of the first stage.
        spacing: target spacing of 3d_fullres in mm, array order (z, y, x); None: nnU-Net's choice.
        unlabelled: ids of data sets whose images join the pretraining pool.
        coordinates: "auxiliary", "guidance" or "none".
        from_checkpoint: path of a checkpoint the networks shall be able to start from; its backbone and features are
            the plan's.
        checkpoint_sha256: of its content when the plan was made; the file is not needed again.
    """

    gpu_memory: str = "auto"
    backbone: str = "resenc"
    base_features: int = 32
    spacing: tuple[float, float, float] | None = None
    unlabelled: tuple[int, ...] = ()
    coordinates: str = "auxiliary"
    from_checkpoint: str | None = None
    checkpoint_sha256: str | None = None

    def __post_init__(self) -> None:
        if self.base_features < 1:
            raise BadInputError(f"--base-features {self.base_features} is not a number of channels.", "Use 8 to 64.")
        if self.spacing is not None and not all(math.isfinite(mm) and mm > 0 for mm in self.spacing):
            given = " ".join(f"{mm:g}" for mm in self.spacing)
            raise BadInputError(f"--spacing {given} has an axis that is not a positive length.", "Give mm, as Z Y X.")

    def to_json(self) -> dict[str, Any]:
        """As stored in the manifest."""
        return {
            "gpu_memory": self.gpu_memory,
            "backbone": self.backbone,
            "base_features": self.base_features,
            "spacing": None if self.spacing is None else list(self.spacing),
            "unlabelled": list(self.unlabelled),
            "coordinates": self.coordinates,
        } | {key: value for key in ("from_checkpoint", "checkpoint_sha256") if (value := getattr(self, key))}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> PlanRequest:
        """The inverse of :meth:`to_json`."""
        spacing = stored["spacing"]
        return cls(
            **{
                **stored,
                "spacing": None if spacing is None else tuple(spacing),
                "unlabelled": tuple(stored["unlabelled"]),
            }
        )


def plan(project: Project, request: PlanRequest) -> dict[str, Any]:
    """Fingerprint and plans; skipped where data and request are unchanged.

    Returns:
        The plans.

    Raises:
        BadInputError: unknown planner, bad budget, an unlabelled data set that is missing or has other channels, a
            checkpoint to start from that is none or fits too small a share of the network.
    """
    with project.manifest.turn("plan", project.reporter.info):
        return _plan(project, _with_digest(request))


def _plan(project: Project, request: PlanRequest) -> dict[str, Any]:
    inputs = _plan_inputs(project, request)
    pool = list(inputs["pool"])
    if has_own_plans(project) and project.manifest.is_finished("plan", inputs):
        return project.plans()
    source = None
    if request.from_checkpoint is not None:
        source = _read_source(project, Path(request.from_checkpoint))
    planner_class = registry.load("planners", request.backbone if source is None else source.backbone)
    budget = memory_budget(request.gpu_memory)
    project.reporter.info(f"planning for {budget.gib:g} GiB ({budget.source})")
    with project.manifest.running("plan", inputs, request.to_json()), project.log("plan"):
        _fingerprint(project)
        if project.plans_path.is_file() and not has_own_plans(project):
            kept = _superseded(project.plans_path)
            project.plans_path.rename(kept)
            project.reporter.warn(f"{project.plans_path.name} is no plan of diffseg: it is kept as {kept}")
        with _replaced_plan_kept(project):
            _write_plans(project, planner_class, request, budget, pool, source)
    return project.plans()


@contextmanager
def _replaced_plan_kept(project: Project) -> Iterator[None]:
    """Keep a plan that networks were trained by, where the block makes another of it, and say so."""
    stages = project.manifest.read()["stages"]
    trained = [name for name in stages if name.startswith(("pretrain/", "train/", "refine/"))]
    if not trained or not project.plans_path.is_file():
        yield
        return
    before, kept = project.plans_path.read_text(encoding="utf-8"), _superseded(project.plans_path)
    write_text(kept, before)
    yield
    if _but_memory(json.loads(before)) == _but_memory(project.plans()):
        kept.unlink()
        return
    project.reporter.warn(
        f"{listed(trained)} are of the plan before this one, which is kept as {kept}: they are not gone on with, and "
        "set aside where others are trained in their place"
    )


def _but_memory(plans: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan says but for the budget that it was made for, and how that was known."""
    return {**plans, "diffseg": {key: value for key, value in plans["diffseg"].items() if key != "memory"}}


def _superseded(path: Path) -> Path:
    return path.with_name(f"superseded_{datetime.now():%Y%m%d-%H%M%S-%f}_{path.name}")


def starts_from_source(project: Project, configuration: str) -> bool:
    """Whether the configuration was planned to start from a checkpoint."""
    return configuration in diffseg_section(project.plans()).get("source", {}).get("shares", {})


def planned_source(project: Project, configuration: str) -> Path | None:
    """The checkpoint that a configuration was planned to start from; None where it was planned without.

    Raises:
        BadInputError: it has gone, or is another by now.
    """
    from diffseg_nnunet.training.checkpoint import file_digest  # with torch

    source, request = diffseg_section(project.plans()).get("source"), last_request(project)
    if not starts_from_source(project, configuration):
        return None
    path = Path(request.from_checkpoint or source["checkpoint"])
    if not path.is_file() or file_digest(path) != source["sha256"]:
        raise BadInputError(
            f"{project.name} is planned to start from {source['checkpoint']}, and that is not at {path} any more.",
            "Give it with --pretrained, or plan anew without --from-checkpoint.",
        )
    return path


def last_request(project: Project) -> PlanRequest:
    """What the data set was last planned with; the defaults if it never was."""
    stored = project.manifest.stage("plan").get("settings")
    return PlanRequest.from_json(stored) if stored else PlanRequest()


def explained(project: Project) -> list[Decision]:
    """Every decision of the data set's plan, and why.

    Raises:
        BadInputError: there is no plan.
    """
    plans, path = project.plans(), project.preprocessed / "dataset_fingerprint.json"
    fingerprint = read_json_object(path) if path.is_file() else None
    return explain(plans, fingerprint, project.dataset_json().get("numTraining"))


def several_gpus_note(plans: Mapping[str, Any]) -> str | None:
    """What several visible GPUs mean for the planned batches, one line; None for fewer than two."""
    from diffseg_nnunet.training.processes import fitting_numbers
    from diffseg_nnunet.training.settings import PATCHES_PER_SCAN

    section = diffseg_section(plans)
    gpus = section["memory"].get("gpus", 0)
    if gpus < 2:
        return None
    shared = []
    for name, stages in section["configurations"].items():
        for stage, group in (("pretraining", PATCHES_PER_SCAN), ("training", 1)):
            if stage in stages:
                numbers = [n for n in fitting_numbers(stages[stage]["batch_size"], group) if 1 < n <= gpus]
                on = " or ".join(map(str, numbers)) or "1 only"
                shared.append(f"{name} {stage} {on}")
    return (
        f"{gpus} GPUs are visible, and each batch is what one of them holds: train one fold on each, or one training "
        f"on several by torchrun, which share the batch; numbers of GPUs that can: {', '.join(shared)}"
    )


def _with_digest(request: PlanRequest) -> PlanRequest:
    """With the digest of the checkpoint as it is now; one that has gone is asked for only if plans must be made."""
    from diffseg_nnunet.training.checkpoint import file_digest  # with torch

    if request.from_checkpoint is None:
        return request
    path = Path(request.from_checkpoint)
    if request.checkpoint_sha256 is not None and not path.exists():
        return request
    return replace(request, checkpoint_sha256=file_digest(path))


def _read_source(project: Project, path: Path) -> Any:
    from diffseg_nnunet.pipeline.adoption import read_source

    source = read_source(path)
    project.reporter.info(
        f"{path} was read as tensors, numbers and text, none of its code was run; the plan takes over its network: "
        f"{source.backbone}, {source.base_features} features, {source.configuration}, {source.channels} channel(s)"
    )
    return source


def _plan_inputs(project: Project, request: PlanRequest) -> dict[str, Any]:
    """What a plan depends on."""
    raw = project.raw()
    pool = _unlabelled_datasets(project, raw, request.unlabelled)
    return {
        "content": raw.content_signature(),
        "pool": {dataset.name: dataset.content_signature() for dataset in pool},
        "request": request.to_json(),
    }


def require_planned(project: Project) -> None:
    """Raises BadInputError if the plan was made from other data than there are now."""
    project.plans()
    stored = project.manifest.stage("plan").get("settings")
    if stored and not project.manifest.is_finished("plan", _plan_inputs(project, PlanRequest.from_json(stored))):
        raise BadInputError(
            f"The data of {project.name} have changed since it was planned, or planning was interrupted.",
            f"Run `diffseg plan {project.id}`, which plans as last time, or `diffseg run {project.id}`.",
        )


def has_own_plans(project: Project) -> bool:
    """False where plans are missing, damaged, or another planner's."""
    try:
        project.plans()
    except BadInputError:
        return False
    return True


def _unlabelled_datasets(project: Project, raw: RawDataset, ids: Sequence[int]) -> list[RawDataset]:
    datasets = []
    for dataset_id in dict.fromkeys(ids):
        if dataset_id == project.id:
            raise BadInputError(
                f"{project.name} cannot be its own unlabelled pool: validation images would be pretrained on.",
                "Leave it out of --unlabeled; its training cases are pretrained on anyway.",
            )
        name = project.workspace.dataset_name(dataset_id)
        dataset = RawDataset.open(project.workspace.raw / name)
        channels, own = (list(each.channel_names.values()) for each in (dataset, raw))
        if [channel.lower() for channel in channels] != [channel.lower() for channel in own]:
            raise BadInputError(
                f"{name} has the channel(s) {', '.join(channels)}, {raw.name} has {', '.join(own)}: "
                "one network cannot read both.",
                "Leave it out of --unlabeled, or name the channels alike in dataset.json.",
            )
        datasets.append(dataset)
    return datasets


def _fingerprint(project: Project) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset

    extractor = registry.load("fingerprints", "default")
    project.reporter.info("extracting the fingerprint")
    extract_fingerprint_dataset(
        project.id, extractor, worker_count(), clean=True, verbose=False, show_progress_bar=False
    )


def _write_plans(
    project: Project,
    planner_class: Any,
    request: PlanRequest,
    budget: Any,
    unlabelled: Sequence[str],
    source: Any = None,
) -> None:
    from diffseg_nnunet.coordinates.head import CoordinateSettings

    planner = planner_class(
        project.id, overwrite_target_spacing=None if request.spacing is None else list(request.spacing)
    )
    planner.configure(
        budget=budget,
        base_features=request.base_features if source is None else source.base_features,
        source=source,
        unlabelled=tuple(unlabelled),
        coordinates=CoordinateSettings(mode=request.coordinates),
    )
    planner.plan_experiment()
