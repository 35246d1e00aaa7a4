"""The stage *evaluate*: scores of predictions against references, as a report folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.evaluation.comparison import Comparison, compare
from diffseg_nnunet.evaluation.folders import FILE_ENDINGS, Evaluation, evaluate_folders
from diffseg_nnunet.evaluation.labels import read_label_names
from diffseg_nnunet.evaluation.protocols import PLAIN, Protocol
from diffseg_nnunet.evaluation.report import SCORES_JSON, read_report, write_comparison, write_report
from diffseg_nnunet.evaluation.statistics import WORST_CASES
from diffseg_nnunet.evaluation.structures import DEFAULT_TOLERANCE_MM
from diffseg_nnunet.inference.folders import VALIDATION
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.planning.hardware import worker_count
from diffseg_nnunet.report.scores import write_evaluation_page


def evaluate(
    prediction: Path,
    reference: Path,
    labels: Path,
    output: Path,
    *,
    prediction_labels: Path | None = None,
    protocol: Protocol = PLAIN,
    tolerance_mm: float | None = None,
    tolerances_mm: Mapping[str, float] | None = None,
    cases: Sequence[str] | None = None,
    workers: int | None = None,
    worst: int = WORST_CASES,
    progress=None,
) -> Evaluation:
    """Score a folder of segmentations and write scores.json, scores.csv, summary.csv and report.html into `output`.

    Args:
        labels: of the references: labels.json or nnU-Net's dataset.json; structures are scored by name.
        prediction_labels: of the segmentations, where their numbering is another one; None: `labels`.
        protocol: the rules.
        tolerance_mm, tolerances_mm: of NSD, for all structures and by name; None: the protocol's, or 1 mm.
        cases: only these; None: all, and both folders must hold the same.
        workers: cases compared at once; None: as many as there are cores.
        worst: how many of the worst cases are named.

    Raises:
        BadInputError: as :func:`evaluate_folders`, or `output` cannot be written to.
    """
    _require_writable(output)  # before all the scoring
    evaluation = evaluate_folders(
        prediction,
        reference,
        read_label_names(labels),
        prediction_labels=None if prediction_labels is None else read_label_names(prediction_labels),
        protocol=protocol,
        tolerance_mm=tolerance_mm,
        tolerances_mm=tolerances_mm,
        workers=worker_count() if workers is None else workers,
        cases=cases,
        worst=worst,
        progress=progress,
    )
    write_report(evaluation, output)
    write_evaluation_page(output, evaluation)
    return evaluation


def _require_writable(folder: Path) -> None:
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise BadInputError(f"Nothing can be written to {folder}: {there} is no folder, or read-only.", "Correct -o.")


def compare_evaluations(prediction: Evaluation, against: Evaluation, output: Path) -> Comparison:
    """Compare two evaluations of the same references, and write comparison.json, comparison.csv and the page of both
    into `output`."""
    comparison = compare(prediction, against)
    write_comparison(comparison, output)
    write_evaluation_page(output, prediction, comparison)
    return comparison


def not_scorable(project: Project) -> str | None:
    """Why the data set's segmentations cannot be scored, as a sentence; None where they can."""
    ending = project.dataset_json()["file_ending"]
    if ending in FILE_ENDINGS:
        return None
    return (
        f"{project.name} has {ending} files, which say no spacing, so distances cannot be scored; nnU-Net's DSC is in "
        "each fold's validation/summary.json. Scores want images as NIfTI, NRRD or MHA."
    )


def evaluate_validation(
    project: Project, strategy: str, configuration: str, fold: int | str, of: str = VALIDATION
) -> Evaluation | None:
    """Report on the validation cases of a trained fold, in its folder ``validation_report``; done once.

    Args:
        of: the folder of predictions within the fold's; that of the report is named after it.

    Returns:
        None, and a warning, where the data set's files cannot be scored.
    """
    # with torch, which `diffseg evaluate` can do without
    from diffseg_nnunet.pipeline.starting import FINAL
    from diffseg_nnunet.training.checkpoint import file_digest

    if (why := not_scorable(project)) is not None:
        project.reporter.warn(why)
        return None
    folder = project.model_folder(strategy, configuration) / f"fold_{fold}"
    report, predictions, ending = folder / f"{of}_report", folder / of, project.dataset_json()["file_ending"]
    stage = f"evaluate/{strategy}/{configuration}/fold_{fold}" + ("" if of == VALIDATION else f"/{of}")
    cases = sorted(path.name.removesuffix(ending) for path in predictions.glob(f"*{ending}"))
    # a killed validation goes on: what it had predicted until then is not all of it
    inputs = {
        "checkpoint": file_digest(folder / FINAL),
        "content": project.raw().content_signature(),
        "cases": cases,
    }
    if (report / SCORES_JSON).is_file() and project.manifest.is_finished(stage, inputs):
        return read_report(report)
    with project.manifest.running(stage, inputs, {"tolerance_mm": DEFAULT_TOLERANCE_MM}) as run:
        evaluation = evaluate(
            predictions,
            project.preprocessed / "gt_segmentations",
            project.preprocessed / "dataset.json",
            report,
            cases=cases,
            progress=lambda done, total: project.reporter.progress(stage, done, total),
        )
        run.outputs["mean_dsc"] = evaluation.overall.dsc.mean
    return evaluation
