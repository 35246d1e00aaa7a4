"""The stages *verify* and *plan*."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffseg_nnunet import registry
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.planning.hardware import memory_budget, usable_cores
from diffseg_nnunet.raw_dataset import RawDataset
from diffseg_nnunet.verification import Finding, verify_dataset


@dataclass(frozen=True)
class PlanRequest:
    """What `diffseg plan` was asked for; the defaults are nnU-Net's where it has one.

    Attributes:
        gpu_memory: "auto" or GiB.
        backbone: registered planner, "resenc" or "plain".
        base_features: channels of the first stage.
        spacing: target spacing of 3d_fullres in mm, array order (z, y, x); None: nnU-Net's choice.
        unlabelled: ids of data sets whose images join the pretraining pool.
        coordinates: mode of the coordinate head, "auxiliary" or "none".
    """

    gpu_memory: str = "auto"
    backbone: str = "resenc"
    base_features: int = 32
    spacing: tuple[float, float, float] | None = None
    unlabelled: tuple[int, ...] = ()
    coordinates: str = "auxiliary"

    def __post_init__(self) -> None:
        if self.base_features < 1:
            raise BadInputError(f"--base-features {self.base_features} is not a number of channels.", "Use 8 to 64.")
        if self.spacing is not None and min(self.spacing) <= 0:
            raise BadInputError(f"--spacing {self.spacing} has an axis that is not positive.", "Give mm, as Z Y X.")

    def to_json(self) -> dict[str, Any]:
        """As stored in the manifest."""
        return {
            "gpu_memory": self.gpu_memory,
            "backbone": self.backbone,
            "base_features": self.base_features,
            "spacing": None if self.spacing is None else list(self.spacing),
            "unlabelled": list(self.unlabelled),
            "coordinates": self.coordinates,
        }

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


def verify(project: Project) -> list[Finding]:
    """Check every image and label; skipped where they passed before and are unchanged.

    Returns:
        The findings; nnU-Net's own integrity check runs as well when none is an error.
    """
    raw = project.raw()
    inputs = {"content": raw.content_signature()}
    if project.manifest.is_finished("verify", inputs):
        return []
    with project.manifest.running("verify", inputs, {}) as run:
        findings = verify_dataset(
            raw,
            workers=usable_cores(),
            progress=lambda done, total: project.reporter.progress("verify", done, total),
        )
        if any(finding.severity == "error" for finding in findings):
            raise VerificationError(project, findings)
        if raw.labelled_cases():
            _nnunet_check(project, raw)
        run.outputs["warnings"] = [str(finding) for finding in findings]
    return findings


class VerificationError(BadInputError):
    """The data set has errors; `findings` lists all of them."""

    _LISTED = 10

    def __init__(self, project: Project, findings: Sequence[Finding]):
        self.findings = list(findings)
        errors = [finding for finding in findings if finding.severity == "error"]
        lines = [f"  {finding}" for finding in errors[: self._LISTED]]
        if len(errors) > self._LISTED:
            lines.append(f"  … and {len(errors) - self._LISTED} more")
        listed = "\n".join(lines)
        super().__init__(f"{project.name} has {len(errors)} error(s):\n{listed}")


def _nnunet_check(project: Project, raw: RawDataset) -> None:
    """nnU-Net's integrity check, which is what its own commands would stop at."""
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    with project.log("verify"):
        try:
            verify_dataset_integrity(str(raw.folder), usable_cores())
        except (AssertionError, RuntimeError) as error:
            raise BadInputError(
                f"nnU-Net's integrity check of {project.name} failed: {error}",
                f"Its details are in {project.results / 'logs' / 'verify.log'}.",
            ) from error


def plan(project: Project, request: PlanRequest) -> dict[str, Any]:
    """Fingerprint and plans; skipped where data and request are unchanged.

    Returns:
        The plans.

    Raises:
        BadInputError: unknown planner, bad budget, an unlabelled data set that is missing or has other channels.
    """
    raw = project.raw()
    pool = _unlabelled_datasets(project, raw, request.unlabelled)
    inputs = {
        "content": raw.content_signature(),
        "pool": {dataset.name: dataset.content_signature() for dataset in pool},
        "request": request.to_json(),
    }
    if project.plans_path.is_file() and project.manifest.is_finished("plan", inputs):
        return project.plans()
    planner_class = registry.load("planners", request.backbone)
    budget = memory_budget(request.gpu_memory)
    project.reporter.info(f"planning for {budget.gib:g} GiB ({budget.source})")
    with project.manifest.running("plan", inputs, request.to_json()), project.log("plan"):
        _fingerprint(project)
        _write_plans(project, planner_class, request, budget, [dataset.name for dataset in pool])
    return project.plans()


def _unlabelled_datasets(project: Project, raw: RawDataset, ids: Sequence[int]) -> list[RawDataset]:
    datasets = []
    for dataset_id in ids:
        name = project.workspace.dataset_name(dataset_id)
        dataset = RawDataset.open(project.workspace.raw / name)
        if len(dataset.channel_names) != len(raw.channel_names):
            raise BadInputError(
                f"{name} has {len(dataset.channel_names)} channel(s), {raw.name} has {len(raw.channel_names)}: "
                "one network cannot read both.",
                "Leave it out of --unlabeled.",
            )
        datasets.append(dataset)
    return datasets


def _fingerprint(project: Project) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset

    extractor = registry.load("fingerprints", "default")
    project.reporter.info("extracting the fingerprint")
    extract_fingerprint_dataset(
        project.id, extractor, usable_cores(), clean=True, verbose=False, show_progress_bar=False
    )


def _write_plans(
    project: Project, planner_class: Any, request: PlanRequest, budget: Any, unlabelled: Sequence[str]
) -> None:
    from diffseg_nnunet.coordinates.head import CoordinateSettings

    planner = planner_class(
        project.id, overwrite_target_spacing=None if request.spacing is None else list(request.spacing)
    )
    planner.configure(
        budget=budget,
        base_features=request.base_features,
        unlabelled=tuple(unlabelled),
        coordinates=CoordinateSettings(mode=request.coordinates),
    )
    planner.plan_experiment()


def ensure_splits(project: Project, configuration: str) -> list[dict[str, list[str]]]:
    """nnU-Net's five-fold splits of the preprocessed labelled cases, written once, atomically.

    A splits_final.json that is already there (a published split) is kept.

    Raises:
        BadInputError: fewer than two labelled cases, which no split can divide.
    """
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    from diffseg_nnunet.atomic import write_json

    path = project.preprocessed / "splits_final.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    cases = sorted(project.labelled_preprocessed(configuration))
    if len(cases) < 2:
        raise BadInputError(
            f"{project.name} has {len(cases)} labelled case(s) preprocessed for {configuration}: too few for a split.",
            "Label more, or train on everything with `-f all`.",
        )
    splits = generate_crossval_split(cases, n_splits=min(5, len(cases)))
    splits = [{part: [str(case) for case in cases] for part, cases in split.items()} for split in splits]
    write_json(path, splits)
    return splits


def check_fold(project: Project, configuration: str, fold: int | str) -> None:
    """Raises BadInputError if the splits have no such fold; nnU-Net would make up another split."""
    if fold == "all":
        return
    count = len(ensure_splits(project, configuration))
    if not 0 <= int(fold) < count:
        raise BadInputError(
            f"{project.name} has folds 0 to {count - 1}, not {fold}.",
            f"Choose one of them or 'all', or add it to {Path(project.preprocessed) / 'splits_final.json'}.",
        )
