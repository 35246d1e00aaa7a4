"""The stage *evaluate*: scores of predictions against references, as a report folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffseg_nnunet.evaluation.folders import Evaluation, evaluate_folders
from diffseg_nnunet.evaluation.labels import read_label_names
from diffseg_nnunet.evaluation.report import write_report
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.planning.hardware import usable_cores

DEFAULT_TOLERANCE_MM = 1.0


def evaluate(
    prediction: Path,
    reference: Path,
    labels: Path,
    output: Path,
    *,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    cases: Sequence[str] | None = None,
    progress=None,
) -> Evaluation:
    """Score a folder of segmentations and write scores.json, scores.csv and summary.csv into `output`.

    Args:
        labels: labels.json or nnU-Net's dataset.json; structures are scored by name.
        cases: only these; None: all, and both folders must hold the same.
    """
    evaluation = evaluate_folders(
        prediction,
        reference,
        read_label_names(labels),
        tolerance_mm=tolerance_mm,
        workers=usable_cores(),
        cases=cases,
        progress=progress,
    )
    write_report(evaluation, output)
    return evaluation


def evaluate_validation(project: Project, strategy: str, configuration: str, fold: int | str) -> Evaluation:
    """Report on the validation cases of a trained fold, in its folder ``validation_report``."""
    folder = project.model_folder(strategy, configuration) / f"fold_{fold}"
    validation, ending = folder / "validation", project.dataset_json()["file_ending"]
    cases = sorted(path.name[: -len(ending)] for path in validation.glob(f"*{ending}"))
    return evaluate(
        validation,
        project.preprocessed / "gt_segmentations",
        project.preprocessed / "dataset.json",
        folder / "validation_report",
        cases=cases,
    )
