"""The stage *evaluate*: scores of predictions against references, as a report folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffseg_nnunet.evaluation.folders import Evaluation, evaluate_folders
from diffseg_nnunet.evaluation.labels import read_label_names
from diffseg_nnunet.evaluation.report import SCORES_JSON, read_report, write_report
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.planning.hardware import worker_count

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
        workers=worker_count(),
        cases=cases,
        progress=progress,
    )
    write_report(evaluation, output)
    return evaluation


def evaluate_validation(project: Project, strategy: str, configuration: str, fold: int | str) -> Evaluation:
    """Report on the validation cases of a trained fold, in its folder ``validation_report``; done once."""
    from diffseg_nnunet.pipeline.stages import FINAL, file_digest  # with torch, which `diffseg evaluate` can do without

    folder = project.model_folder(strategy, configuration) / f"fold_{fold}"
    report = folder / "validation_report"
    stage = f"evaluate/{strategy}/{configuration}/fold_{fold}"
    inputs = {"checkpoint": file_digest(folder / FINAL), "content": project.raw().content_signature()}
    if (report / SCORES_JSON).is_file() and project.manifest.is_finished(stage, inputs):
        return read_report(report)
    validation, ending = folder / "validation", project.dataset_json()["file_ending"]
    cases = sorted(path.name.removesuffix(ending) for path in validation.glob(f"*{ending}"))
    with project.manifest.running(stage, inputs, {"tolerance_mm": DEFAULT_TOLERANCE_MM}) as run:
        evaluation = evaluate(
            validation,
            project.preprocessed / "gt_segmentations",
            project.preprocessed / "dataset.json",
            report,
            cases=cases,
            progress=lambda done, total: project.reporter.progress(stage, done, total),
        )
        run.outputs["mean_dsc"] = evaluation.overall.dsc.mean
    return evaluation
