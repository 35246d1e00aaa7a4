"""The stage *coordinates*: body-coordinate maps of a folder of scans, and which part of the body each shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pandas as pd
import SimpleITK as sitk
import torch

from diffseg_nnunet.atomic import full_disk_named, write_file, write_json
from diffseg_nnunet.coordinates.body import DIRECTIONS, PERCENTILES, AxisRange, body_mask, body_ranges, covered
from diffseg_nnunet.coordinates.grids import ScanGrid
from diffseg_nnunet.coordinates.landmarks import Landmark
from diffseg_nnunet.errors import BadInputError, DiffSegError, StageFailedError
from diffseg_nnunet.inference.coordinates import predict_coordinates, require_coordinates
from diffseg_nnunet.inference.export import partial_folder, publish
from diffseg_nnunet.inference.input_cases import input_cases
from diffseg_nnunet.inference.landmarks import find_landmarks
from diffseg_nnunet.inference.predictor import FailedCase
from diffseg_nnunet.inference.pretrained import PretrainedModel, load_pretrained
from diffseg_nnunet.pipeline.device import prepare_device
from diffseg_nnunet.pipeline.label_budgets import budget_of
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.records import image_stamps, read_record
from diffseg_nnunet.pipeline.splits import check_fold, ensure_splits
from diffseg_nnunet.pipeline.starting import FINAL, Fold
from diffseg_nnunet.raw_dataset import Case, values_of_labels
from diffseg_nnunet.torch_errors import GpuFailedError, errors_of_torch_told_apart
from diffseg_nnunet.training.checkpoint import file_digest
from diffseg_nnunet.verification import read_volume

RANGES_JSON, RANGES_CSV, LANDMARKS_JSON = "body_ranges.json", "body_ranges.csv", "landmarks.json"
MAP_ENDING = ".nii.gz"


def pretrained_checkpoint(project: Project, configuration: str, fold: Fold) -> Path:
    """The finished pretraining of a fold, or "all".

    Raises:
        BadInputError: there is none; the message says which there are.
    """
    root = project.model_folder("pretrain", configuration)
    path = root / f"fold_{fold}" / FINAL
    if not path.is_file():
        others = ", ".join(folder.parent.name for folder in sorted(root.glob(f"fold_*/{FINAL}"))) or "none"
        raise BadInputError(
            f"There is no pretrained network for fold {fold} of {project.name} {configuration} (there: {others}).",
            f"Run `diffseg pretrain {project.id} -c {configuration} -f {fold}`, choose another with -c or -f, or give "
            "one with --checkpoint.",
        )
    return path


def predict_body_coordinates(
    project: Project,
    checkpoint: Path,
    source: Path,
    output: Path,
    device_name: str,
    landmarks_of: tuple[str, Fold] | None = None,
) -> list[FailedCase]:
    """Write for each scan of `source` its coordinate map ``CASE.nii.gz``, and for all the ranges of their bodies,
    ``body_ranges.json`` and ``.csv``; an interrupted run goes on.

    Cases are predicted again where the checkpoint or the images have changed.

    Args:
        checkpoint: of a pretraining with coordinates.
        source: images in nnU-Net's naming.
        landmarks_of: configuration and fold whose labelled training cases say where structures lie
            (``landmarks.json``), by which each scan's structures are named; None: no landmarks.

    Returns:
        The cases that were set aside; all others are done.

    Raises:
        BadInputError: the checkpoint is missing or knows no coordinates, `source` has no images, or it is `output`;
            there are no labelled training cases, or they are preprocessed for another plan than the checkpoint's.
    """
    device = prepare_device(device_name)
    digest = file_digest(checkpoint)
    model = load_pretrained(checkpoint, device)
    require_coordinates(model)
    channels = len(model.dataset_json["channel_names"])
    cases, failed = input_cases(source, model.dataset_json["file_ending"], channels)
    if output.resolve() == source.resolve():
        raise BadInputError(f"{output} holds the images.", "Choose another folder with -o.")
    labelled = None if landmarks_of is None else _labelled_cases(project, model, *landmarks_of)
    _warn_of_axes(project, model)
    previous = read_record(output / RANGES_JSON)
    known = previous.get("cases", {}) if previous.get("checkpoint", {}).get("sha256") == digest else {}
    record = {
        "checkpoint": {"path": str(checkpoint), "sha256": digest},
        "unit": "mm along the patient's left, posterior and superior, from an origin common to all scans of the "
        "checkpoint",
        "percentiles": list(PERCENTILES),
        "cases": known,
    }
    output.mkdir(parents=True, exist_ok=True)
    with project.log("coordinates"):
        failed += _predict_missing(project, model, cases, output, record)
    if labelled is not None:
        for identifier, structures in _cover(project, model, digest, labelled, output, known).items():
            project.reporter.info(f"{identifier} covers: {', '.join(structures) or 'none of the landmarks'}")
    write_json(output / RANGES_JSON, record)
    write_file(output / RANGES_CSV, lambda temporary: _table(known).to_csv(temporary, index=False))
    return failed


def summary(case: str, ranges: Mapping[str, AxisRange]) -> str:
    """One line about a case for the terminal."""
    along = ranges["superior"]
    slope = "" if along.slope is None else f", scale {along.slope:.2f}, residual {along.residual_mm:.0f} mm"
    return f"{case}: superior {along.low_mm:.0f} to {along.high_mm:.0f} mm{slope}"


def _predict_missing(
    project: Project, model: PretrainedModel, cases: Sequence[Case], output: Path, record: dict[str, Any]
) -> list[FailedCase]:
    """Predict the cases that the record does not know, or not with these images; each is entered when it is done."""
    known, stamps, failed = record["cases"], image_stamps(cases), []
    for number, case in enumerate(cases, start=1):
        identifier, news = case.identifier, ""
        path = output / f"{identifier}{MAP_ENDING}"
        if not (path.is_file() and known.get(identifier, {}).get("images") == stamps[identifier]):
            # a map of another checkpoint, or of another image, must not stay where this one fails
            path.unlink(missing_ok=True)
            known.pop(identifier, None)
            try:
                with errors_of_torch_told_apart():
                    ranges = _predict(model, case, path)
                known[identifier] = {"images": stamps[identifier]} | _as_json(ranges)
                news = summary(identifier, ranges)
            except torch.OutOfMemoryError as error:
                raise StageFailedError(
                    f"The GPU's memory does not suffice for {identifier}.",
                    "Free the GPU of other work, or use --device cpu; finished cases are kept.",
                ) from error
            except MemoryError:
                failed.append(FailedCase(identifier, "there is not enough memory for a scan of its size"))
            except GpuFailedError:
                raise
            except (DiffSegError, RuntimeError, ValueError, AssertionError) as error:
                failed.append(FailedCase(identifier, str(error) or type(error).__name__))
            write_json(output / RANGES_JSON, record)
        project.reporter.progress("coordinates", number, len(cases), news)
    return failed


def _predict(model: PretrainedModel, case: Case, path: Path) -> dict[str, AxisRange]:
    """Write the map of one case and return the ranges of its body."""
    coordinates = predict_coordinates(model, case.images)
    names = model.dataset_json["channel_names"]
    # the channel that shows the body best: a CT, if there is one
    ct = [channel for channel in range(len(names)) if str(names[str(channel)]).lower() == "ct"]
    image = sitk.GetArrayFromImage(read_volume(case.images[ct[0] if ct else 0]))
    matrix = ScanGrid.of(coordinates).index_to_patient()
    body = body_mask(image, bool(ct), matrix)
    ranges = body_ranges(sitk.GetArrayViewFromImage(coordinates), matrix, body)
    with partial_folder(path.parent) as partial, full_disk_named(path):
        sitk.WriteImage(coordinates, str(partial / path.name), useCompression=True)
        publish(partial / path.name, path.parent)
    return ranges


def _labelled_cases(project: Project, model: PretrainedModel, configuration: str, fold: Fold) -> tuple[Path, list[str]]:
    """The folder of the preprocessed cases, and those that train the fold."""
    planned = project.configuration(configuration)
    keys = ("data_identifier", "spacing", "normalization_schemes")
    same = all(planned.configuration[key] == model.configuration.configuration[key] for key in keys)
    if model.plans.dataset_name != project.name or not same:
        raise BadInputError(
            f"The checkpoint was pretrained for {model.plans.dataset_name} with another plan than {configuration} of "
            f"{project.name}, so it cannot read the labelled cases preprocessed there.",
            "Leave --landmarks out, or give the checkpoint's own -d and -c.",
        )
    cases = list(project.labelled_preprocessed(configuration))
    if not cases:
        raise BadInputError(
            f"{project.name} has no labelled cases preprocessed for {configuration}: there is nothing to take "
            "landmarks from.",
            f"Run `diffseg preprocess {project.id} -c {configuration}`, or leave --landmarks out.",
        )
    if fold != "all":
        check_fold(project, configuration, fold)
        if (budget := budget_of(project, configuration, fold)) is not None and budget.annotations() is not None:
            raise BadInputError(
                f"Fold {fold} is a label budget, {budget.labels} of fold {budget.base}: landmarks need whole labels.",
                f"Give -f {budget.base}, or leave --landmarks out.",
            )
        cases = ensure_splits(project, configuration)[int(fold)]["train"]
    return project.preprocessed_folder(configuration), cases


def _cover(
    project: Project,
    model: PretrainedModel,
    digest: str,
    labelled: tuple[Path, list[str]],
    output: Path,
    entries: dict[str, dict[str, Any]],
) -> dict[str, list[str]]:
    """Write the landmarks and enter, for each scan, the structures within its superior range; these are returned."""
    folder, cases = labelled
    names = project.dataset_json()["labels"]
    labels = {name: sorted(values_of_labels({name: value})) for name, value in names.items() if name != "ignore"}
    labels = {name: values for name, values in labels.items() if 0 not in values}
    made_from = {"checkpoint": {"sha256": digest}, "cases": cases, "labels": labels}
    record = read_record(output / LANDMARKS_JSON)
    if {key: record.get(key) for key in made_from} != made_from:
        landmarks = find_landmarks(
            model, folder, cases, labels, lambda done, total: project.reporter.progress("landmarks", done, total)
        )
        record = made_from | {"structures": {name: asdict(landmark) for name, landmark in landmarks.items()}}
        write_json(output / LANDMARKS_JSON, record)
    superior = {name: Landmark(**entry).superior_mm for name, entry in record["structures"].items()}
    for entry in entries.values():
        entry["covers"] = covered(AxisRange(**entry["superior"]), superior)
    return {case: entry["covers"] for case, entry in sorted(entries.items())}


def _as_json(ranges: Mapping[str, AxisRange]) -> dict[str, Any]:
    return {name: asdict(one) for name, one in ranges.items()}


def _table(cases: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """A row a case: the values of each direction side by side, then what it covers."""
    columns = [f"{name}_{field.name}" for name in DIRECTIONS for field in fields(AxisRange)]
    rows = [
        {"case": case, "covers": "; ".join(entry.get("covers", ()))}
        | {f"{name}_{field}": value for name in DIRECTIONS for field, value in entry[name].items()}
        for case, entry in sorted(cases.items())
    ]
    return pd.DataFrame(rows, columns=["case", *columns, "covers"])


def _warn_of_axes(project: Project, model: PretrainedModel) -> None:
    if model.settings.coordinates.objective == "distance":
        project.reporter.warn(
            "this network was pretrained with the objective 'distance', which leaves the axes free: the three "
            "components need not run along the patient's left, posterior and superior"
        )
