"""``diffseg demo``: the built-in phantom through every stage, as an installation test and a tour."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk

from diffseg_nnunet import registry
from diffseg_nnunet.evaluation.folders import Evaluation
from diffseg_nnunet.evaluation.labels import read_label_names
from diffseg_nnunet.phantom import write_phantom
from diffseg_nnunet.pipeline import prediction
from diffseg_nnunet.pipeline.evaluating import evaluate
from diffseg_nnunet.pipeline.prediction_request import PredictionRequest
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.reporter import Reporter
from diffseg_nnunet.pipeline.run import run
from diffseg_nnunet.pipeline.run_request import RunRequest
from diffseg_nnunet.planning.hardware import worker_count
from diffseg_nnunet.report.pictures import overlay_png
from diffseg_nnunet.workspace import Workspace

LABELLED_ID, UNLABELLED_ID = 901, 902
PLAN = {
    "gpu_memory": "1",
    "backbone": "plain",
    "base_features": 16,
    "spacing": (10.0, 10.0, 10.0),
    "unlabelled": (UNLABELLED_ID,),
}
"""A light plan, so that two CPU cores train it in minutes."""
PRETRAIN_ITERATIONS, ITERATIONS = 200, 400
RATE = {"optimizer": "adamw", "initial_lr": 4e-3}
"""nnU-Net's own optimizer needs thousands of iterations."""
CONFIGURATION = "3d_fullres"


@dataclass(frozen=True)
class DemoResult:
    """What the demo ends with.

    Attributes:
        evaluation: of the held-out cases, which no stage has seen.
        report: its folder.
        picture: image, reference and prediction of the first held-out case.
    """

    evaluation: Evaluation
    report: Path
    picture: Path


def demo(
    workspace: Workspace,
    folder: Path,
    reporter: Reporter,
    device: str = "auto",
    seed: int = 0,
    pretrain_iterations: int = PRETRAIN_ITERATIONS,
    iterations: int = ITERATIONS,
) -> DemoResult:
    """Convert, verify, plan, preprocess, pretrain, fine-tune, predict and evaluate the phantom.

    Args:
        workspace: activated.
        folder: for the phantom's files and the report.
        pretrain_iterations, iterations: lengths of the two trainings.
    """
    source = folder / "phantom"
    if not source.exists():
        write_phantom(source, seed=seed)
    _convert(workspace, source, reporter)
    project = Project.open(workspace, LABELLED_ID, reporter)
    run(
        project,
        RunRequest(
            configurations=(CONFIGURATION,),
            plan=PLAN,
            pretraining={"iterations": pretrain_iterations, "seed": seed, **RATE},
            training={"iterations": iterations, "seed": seed, **RATE},
            device=device,
        ),
    )
    predicted = folder / "test_predictions"
    request = PredictionRequest((CONFIGURATION,), (0,))
    prediction.predict(project, request, source / "test_images", predicted, device)
    report = folder / "report"
    evaluation = evaluate(predicted, source / "test_labels", source / "labels.json", report)
    return DemoResult(evaluation, report, _picture(source, predicted, report))


def _convert(workspace: Workspace, source: Path, reporter: Reporter) -> None:
    """The labelled cases as one data set, the unlabelled as another, as from two departments."""
    converter = registry.load("converters", "folder")()
    labelled = converter.plan(source / "images", source / "labels", source / "labels.json", "CT", "Phantom")
    unlabelled = converter.plan(source / "unlabelled_images", None, None, "CT", "PhantomUnlabelled")
    for dataset_id, plan in ((LABELLED_ID, labelled), (UNLABELLED_ID, unlabelled)):
        if not any(name.startswith(f"Dataset{dataset_id}_") for name in workspace.dataset_names()):
            report = plan.execute(dataset_id=dataset_id, workspace=workspace, workers=worker_count())
            reporter.info(f"converted: {report.folder}")


def _picture(source: Path, predicted: Path, report: Path) -> Path:
    name = sorted(path.name for path in (source / "test_images").iterdir())[0]
    image, reference, prediction_map = (
        sitk.ReadImage(str(path / name)) for path in (source / "test_images", source / "test_labels", predicted)
    )
    path = report / f"{name.removesuffix('.nii.gz')}.png"
    overlay_png(
        path,
        *(sitk.GetArrayFromImage(volume) for volume in (image, reference, prediction_map)),
        read_label_names(source / "labels.json"),
        image.GetSpacing()[::-1],
        f"{name}: a held-out phantom",
    )
    return path
