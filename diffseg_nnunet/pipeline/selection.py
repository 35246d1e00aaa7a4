"""The stage *select*: the best configuration or ensemble on the validation cases, and nnU-Net's postprocessing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffseg_nnunet import registry
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.starting import FINAL, Fold
from diffseg_nnunet.planning.hardware import worker_count
from diffseg_nnunet.planning.section import PLANS_NAME
from diffseg_nnunet.training.checkpoint import file_digest


def folds_named(folds: Sequence[Fold]) -> str:
    """As nnU-Net names what is of several folds: ``folds_0_1``. Jobs of single folds, at work at once, stay apart."""
    return f"folds_{'_'.join(map(str, folds))}"


@dataclass(frozen=True)
class Selection:
    """What to predict with, by the validation cases.

    Attributes:
        configurations: one, or the two of an ensemble.
        postprocessing: nnU-Net's postprocessing.pkl.
        dsc_before, dsc_after: mean foreground DSC of the validation cases before and after postprocessing.
    """

    configurations: tuple[str, ...]
    postprocessing: Path
    dsc_before: float
    dsc_after: float


def select(project: Project, configurations: Sequence[str], folds: Sequence[Fold], strategy: str) -> Selection:
    """Compare the trained configurations on their validation cases with nnU-Net's ``find_best_configuration``."""
    trainer = registry.load("trainers", strategy).__name__
    checkpoints = {
        f"{c}/fold_{f}": file_digest(project.model_folder(strategy, c) / f"fold_{f}" / FINAL)
        for c in configurations
        for f in folds
    }
    inputs = {"checkpoints": checkpoints, "content": project.raw().content_signature()}
    name = f"select/{strategy}/{folds_named(folds)}"
    with project.manifest.turn(name, project.reporter.info):
        if not project.manifest.is_finished(name, inputs):
            with project.manifest.running(name, inputs, {"folds": list(folds)}) as run, project.log("select"):
                run.outputs.update(_find_best(project, configurations, folds, trainer))
    outputs = project.manifest.stage(name)["outputs"]
    return Selection(
        tuple(outputs["configurations"]),
        project.workspace.results / outputs["postprocessing"],
        outputs["dsc_before"],
        outputs["dsc_after"],
    )


def _find_best(project: Project, configurations: Sequence[str], folds: Sequence[Fold], trainer: str) -> dict:
    from nnunetv2.evaluation.find_best_configuration import find_best_configuration

    models = [{"plans": PLANS_NAME, "configuration": c, "trainer": trainer} for c in configurations]
    found = find_best_configuration(
        project.name, models, allow_ensembling=len(models) > 1, num_processes=worker_count(), folds=tuple(folds)
    )["best_model_or_ensemble"]
    return {
        "configurations": [model["configuration"] for model in found["selected_model_or_models"]],
        "postprocessing": str(Path(found["postprocessing_file"]).relative_to(project.workspace.results)),
        "dsc_before": float(found["result_on_crossval_pre_pp"]),
        "dsc_after": float(found["result_on_crossval_post_pp"]),
    }
