"""The cross-validation of what would be predicted with a refiner: its structures, and nnU-Net's postprocessing."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffseg_nnunet.inference.folders import VALIDATION
from diffseg_nnunet.inference.merging import merge_files_of_labels
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.refining import REFINE
from diffseg_nnunet.pipeline.selection import folds_named
from diffseg_nnunet.pipeline.starting import Fold
from diffseg_nnunet.planning.hardware import worker_count
from diffseg_nnunet.raw_dataset import DATASET_JSON, read_json_object

_PLANS, _SUMMARY = "plans.json", "summary.json"


@dataclass(frozen=True)
class RefinedCrossval:
    """The validation cases as they would be predicted, by nnU-Net's own scores.

    Attributes:
        postprocessing: nnU-Net's postprocessing.pkl, determined on them.
        dsc_before, dsc_after: their mean foreground DSC before and after postprocessing, as of a selection.
    """

    postprocessing: Path
    dsc_before: float
    dsc_after: float

    def to_json(self, results: Path) -> dict[str, Any]:
        """Args: results: nnU-Net's folder, which may be moved."""
        return asdict(self) | {"postprocessing": str(self.postprocessing.relative_to(results))}

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None, results: Path) -> RefinedCrossval | None:
        """What :meth:`to_json` gave; None of None."""
        return content and cls(**{**content, "postprocessing": results / content["postprocessing"]})


def refined_crossval(
    project: Project, configuration: str, folds: Sequence[Fold], strategy: str, structures: Sequence[str] | None
) -> RefinedCrossval:
    """Collect the validation cases of the folds with the chosen structures refined, beside the refiners, and determine
    nnU-Net's postprocessing on them, as ``find_best_configuration`` does on the segmentors'.

    Args:
        structures: taken from the refined segmentation; None: all of it.
    """
    from nnunetv2.postprocessing.remove_connected_components import determine_postprocessing

    segmentor, refiner = (project.model_folder(name, configuration) for name in (strategy, REFINE))
    target = refiner / f"crossval_results_{folds_named(folds)}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name in (DATASET_JSON, _PLANS):
        shutil.copy(refiner / name, target)
    dataset_json = read_json_object(refiner / DATASET_JSON)
    values = None if structures is None else [dataset_json["labels"][name] for name in structures]
    for fold in folds:
        for refined in sorted((refiner / f"fold_{fold}" / VALIDATION).glob(f"*{dataset_json['file_ending']}")):
            plain = segmentor / f"fold_{fold}" / VALIDATION / refined.name
            if values is None:
                shutil.copy(refined, target)
            else:
                merge_files_of_labels(plain, refined, values, target / refined.name)
    references = str(project.preprocessed / "gt_segmentations")
    determine_postprocessing(str(target), references, str(target / _PLANS), str(target / DATASET_JSON), worker_count())
    before, after = (
        float(read_json_object(folder / _SUMMARY)["foreground_mean"]["Dice"])
        for folder in (target, target / "postprocessed")
    )
    return RefinedCrossval(target / "postprocessing.pkl", before, after)
