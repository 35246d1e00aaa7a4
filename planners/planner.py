"""Planners of both stages: nnU-Net's rules for everything but patch and batch, which fill the memory budget.

One topology, on which each stage has a patch and a batch of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import SimpleITK as sitk
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
)
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from diffseg_nnunet.atomic import write_json
from diffseg_nnunet.coordinates.head import CoordinateSettings
from diffseg_nnunet.diffusion.gaussian import DiffusionSettings
from diffseg_nnunet.planning.adoption import Source
from diffseg_nnunet.planning.fingerprint import check_fingerprint
from diffseg_nnunet.planning.gpus import MemoryBudget
from diffseg_nnunet.planning.mirroring import MirrorDecision, decide_mirroring, to_2d
from diffseg_nnunet.planning.section import PLANS_NAME, SECTION, STANDARD_CONFIGURATIONS
from diffseg_nnunet.raw_dataset import RawDataset

from .adoption import AdoptingPlanning
from .filling import FittingPlanning
from .refining import fit_refiner

_MEMORY_RULE = "the tensors of a real step, counted, with allowances for workspaces, fragmentation and the CUDA context"
_READERS_WITHOUT_DIRECTION = ("NaturalImage2DIO", "Tiff3DIO")  # SimpleITK would report the identity for a TIFF


@dataclass(frozen=True)
class PlanOptions:
    """What a user decides about a plan.

    Attributes:
        budget: GPU memory to plan for.
        base_features: channels of the first stage; 32 is nnU-Net's, 16 a light model's (FLARE22's winner).
        unlabelled: names of further data sets whose images join the pretraining pool.
        diffusion, coordinates: settings of the pretraining.
        source: a checkpoint the networks shall be able to start from.
    """

    budget: MemoryBudget = field(default_factory=lambda: MemoryBudget(8.0, "nnU-Net's default"))
    base_features: int = 32
    unlabelled: tuple[str, ...] = ()
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    coordinates: CoordinateSettings = field(default_factory=CoordinateSettings)
    source: Source | None = None


class DiffSegPlanning:
    """The ``diffseg`` section of the plans, and where they are written; a mix-in placed before an nnU-Net planner.

    Spacing, normalisation, resampling and the rules of topology are nnU-Net's own, and so is the form of the plans:
    stock commands preprocess, train and predict by them. Patch and batch: :class:`FittingPlanning`.
    """

    backbone: str
    options: PlanOptions
    fit_refiner = staticmethod(fit_refiner)

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = PLANS_NAME,
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ):
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )
        budget = MemoryBudget(float(gpu_memory_target_in_gb), "nnU-Net's GPU memory target")
        self.options = PlanOptions(budget=budget)

    def plan_experiment(self) -> dict[str, Any]:
        """Plan, and write the plans.

        Raises:
            BadInputError: the fingerprint is no good, or nothing fits the budget.
        """
        check_fingerprint(self.dataset_fingerprint, self.dataset_name)
        self._misfits.clear()  # of another budget
        return super().plan_experiment()

    def configure(self, **options: Any) -> None:
        """Take over the fields of :class:`PlanOptions` that are given; before ``plan_experiment``."""
        self.options = replace(self.options, **options)
        self.UNet_base_num_features = self.options.base_features
        self.__dict__.pop("fitting", None)  # what was measured for another budget or other settings

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Own preprocessed folders: another target spacing must not overwrite stock nnU-Net's data."""
        return f"{self.plans_identifier}_{configuration_name}"

    def determine_reader_writer(self) -> type:
        raw = RawDataset.open(self.raw_dataset_folder)
        example = next(iter([*raw.labelled_cases(), *raw.unlabelled_cases()]))
        return determine_reader_writer_from_dataset_json(self.dataset_json, str(example.images[0]), verbose=False)

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Write the plans atomically with our section; custom configurations of an older file are kept, stale ones of
        nnU-Net's standard names are not.

        Raises:
            BadInputError: something does not fit the budget.
        """
        path = Path(str(nnUNet_preprocessed)) / self.dataset_name / f"{self.plans_identifier}.json"
        if path.is_file():
            previous = load_json(str(path))["configurations"]
            custom = {name: c for name, c in previous.items() if name not in STANDARD_CONFIGURATIONS}
            plans["configurations"] = {**custom, **plans["configurations"]}
        self.finish_lowres(plans)
        recursive_fix_for_json_export(plans)
        plans[SECTION] = self._section(plans)
        self.refuse_misfits()
        write_json(path, plans)

    def _section(self, plans: dict[str, Any]) -> dict[str, Any]:
        decision = self._mirroring(plans)
        return {
            "version": 1,
            "backbone": self.backbone,
            "base_features": self.options.base_features,
            "memory": {
                "budget_gib": self.options.budget.gib,
                "budget_source": self.options.budget.source,
                "bfloat16": self.options.budget.bfloat16,
                "gpus": self.options.budget.gpus,
                "rule": _MEMORY_RULE,
            },
            "mirroring": {
                "allowed_axes": list(decision.allowed_axes),
                "allowed_axes_2d": list(to_2d(decision.allowed_axes)),
                "left_right_axis": decision.left_right_axis,
                "pairs": [list(pair) for pair in decision.pairs],
                "reason": decision.reason,
                "warning": decision.warning,
            },
            "pool": {"unlabelled_datasets": list(self.options.unlabelled)},
            "diffusion": self.options.diffusion.to_json(),
            "coordinates": self.options.coordinates.to_json(),
            "configurations": {
                name: self.stages(plans, name) for name in plans["configurations"] if name in STANDARD_CONFIGURATIONS
            },
        }

    def _mirroring(self, plans: Mapping[str, Any]) -> MirrorDecision:
        raw = RawDataset.open(self.raw_dataset_folder)
        if plans["image_reader_writer"].endswith("WithReorient"):
            canonical = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
            directions: dict[str, Any] = {case.identifier: canonical for case in raw.labelled_cases()}
        elif plans["image_reader_writer"] in _READERS_WITHOUT_DIRECTION:
            directions = {case.identifier: None for case in raw.labelled_cases()}
        else:
            directions = {case.identifier: header_direction(case.images[0]) for case in raw.labelled_cases()}
        return decide_mirroring(list(self.dataset_json["labels"]), directions, plans["transpose_forward"])


class DiffSegPlanner(AdoptingPlanning, DiffSegPlanning, FittingPlanning, ResEncUNetPlanner):
    """Both stages on nnU-Net's residual-encoder U-Net."""

    backbone = "resenc"


class DiffSegPlainPlanner(AdoptingPlanning, DiffSegPlanning, FittingPlanning, ExperimentPlanner):
    """Both stages on nnU-Net's plain U-Net."""

    backbone = "plain"


def header_direction(path: Path) -> tuple[float, ...] | None:
    """Direction cosines from an image's header; no voxel is read. None for what SimpleITK cannot read."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    return reader.GetDirection()
