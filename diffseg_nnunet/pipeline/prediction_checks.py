"""What a prediction needs, asked for before anything of an earlier one is discarded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.inference.one_plan import require_one_plan
from diffseg_nnunet.inference.predictor import require_trained
from diffseg_nnunet.inference.refining import read_refiners
from diffseg_nnunet.inference.uncertainty import READER
from diffseg_nnunet.pipeline.prediction_request import PredictionRequest
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.refining import REFINE
from diffseg_nnunet.raw_dataset import DATASET_JSON, read_json_object
from diffseg_nnunet.training.checkpoint import file_digest
from diffseg_nnunet.training.refining import RefinementSettings


def models_read(project: Project, request: PredictionRequest) -> Iterator[tuple[str, str]]:
    """Trainer and configuration of each model that a prediction depends on: of the configurations, of what is left
    unrefined of them, and of the stages of the cascades before them. What comes after a model is read from its plans.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    for configuration in request.configurations:
        yield request.trainer, configuration
        if request.refined_structures:
            yield request.strategy, configuration
        model = project.model_folder(request.trainer, configuration)
        stages = PlansManager(read_json_object(model / "plans.json"))
        before = stages.get_configuration(configuration).previous_stage_name
        while before is not None:
            yield request.strategy, before
            before = stages.get_configuration(before).previous_stage_name


def require_models(project: Project, request: PredictionRequest) -> None:
    """Raises BadInputError if a model that is read is not trained, or its folds not by one plan."""
    for trainer, configuration in models_read(project, request):
        model, kind = project.model_folder(trainer, configuration), "refine" if trainer == REFINE else "train"
        command = f"{kind} {project.id} -c {configuration} --strategy {request.strategy}"
        require_trained(model, request.folds, request.checkpoint, command)
        require_one_plan(model, request.folds, request.checkpoint)


def check_refiners(project: Project, request: PredictionRequest) -> None:
    """Raises BadInputError if refiners cannot predict together or as asked, or one belongs to the segmentor of another
    strategy; warns of one that has changed."""
    if request.refined_structures is not None:
        _require_structures(project, request)
    for configuration in request.configurations:
        refiners = read_refiners(
            project.model_folder(REFINE, configuration), request.folds, request.checkpoint, request.refine
        )
        options = request.refine.completed(RefinementSettings(**refiners[0]["settings"]))
        if request.uncertainty and options.samples == 1:
            raise BadInputError(
                "One sample of a refiner does not tell how sure it is: --uncertainty maps the entropy of several.",
                "Give --samples 4, or predict without --uncertainty.",
            )
        for fold, content in zip(request.folds, refiners, strict=True):
            place, record = Path(f"fold_{fold}") / request.checkpoint, content["segmentor"]
            if record["strategy"] != request.strategy:
                raise BadInputError(
                    f"The refiner of {configuration}, fold {fold}, is of --strategy {record['strategy']}.",
                    f"Give that, or run `diffseg refine {project.id} -c {configuration} -f {fold} --strategy "
                    f"{request.strategy}`.",
                )
            now = project.model_folder(request.strategy, configuration) / place
            if now.is_file() and file_digest(now) != record["sha256"]:
                project.reporter.warn(
                    f"the refiner of {configuration}, fold {fold}, has another segmentor than {now}, and predicts with "
                    "its own"
                )


def _require_structures(project: Project, request: PredictionRequest) -> None:
    """Raises BadInputError if structures that are to be refined are none of the model's, or cannot be taken alone."""
    if len(request.configurations) > 1:
        raise BadInputError(
            "--refine-structures takes structures of one configuration, not of an ensemble.", "Give one with -c."
        )
    dataset_json = read_json_object(project.model_folder(REFINE, request.configurations[0]) / DATASET_JSON)
    known = [name for name in dataset_json["labels"] if name not in ("background", "ignore")]
    if unknown := [name for name in request.refined_structures if name not in known]:
        raise BadInputError(f"{project.name} has no structure '{unknown[0]}'.", f"Choose of: {', '.join(known)}.")
    if "regions_class_order" in dataset_json:
        raise BadInputError(
            f"The labels of {project.name} are regions, which overlap: they are refined together.",
            "Leave out --refine-structures.",
        )


def require_maps(request: PredictionRequest, model: Path) -> None:
    """Raises BadInputError if what is asked for beside labels would be of two predictions, or not lie on its image."""
    if request.refined_structures and (request.uncertainty or request.probabilities):
        raise BadInputError(
            "Where structures are taken from two predictions, there are no probabilities of both.",
            "Predict without --uncertainty and --npz, or refine all structures.",
        )
    if not request.uncertainty:
        return
    reader = read_json_object(model / "plans.json")["image_reader_writer"]
    if reader != READER:
        raise BadInputError(
            f"Uncertainty maps are written for images that nnU-Net reads with {READER}; here it is {reader}.",
            "Predict without --uncertainty.",
        )
