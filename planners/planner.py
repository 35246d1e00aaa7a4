"""Planners of both stages: nnU-Net's own plan, and beside it what pretraining and training use of the same topology."""

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
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from diffseg_nnunet.atomic import write_json
from diffseg_nnunet.coordinates.head import CoordinateSettings
from diffseg_nnunet.diffusion.gaussian import DiffusionSettings
from diffseg_nnunet.planning.adoption import Source
from diffseg_nnunet.planning.hardware import MemoryBudget
from diffseg_nnunet.planning.mirroring import MirrorDecision, decide_mirroring, to_2d
from diffseg_nnunet.planning.section import PLANS_NAME, SECTION
from diffseg_nnunet.raw_dataset import RawDataset
from diffseg_nnunet.training.settings import PATCHES_PER_SCAN

from .adoption import AdoptingPlanning

STANDARD_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
_MEMORY_RULE = "nnU-Net's feature-map rule, scaled from its 8 GiB reference"
_REORIENTED_LEFT_RIGHT_AXIS = 2  # nnU-Net's reorienting readers turn every array to z, y, x of RAS


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
    """Adds the ``diffseg`` section to the plans of an nnU-Net planner; a mix-in placed before it.

    Everything but the section is nnU-Net's own, so stock commands preprocess, train and predict by the plans file.
    """

    backbone: str
    options: PlanOptions = PlanOptions()

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

    def configure(self, **options: Any) -> None:
        """Take over the fields of :class:`PlanOptions` that are given; before ``plan_experiment``."""
        self.options = replace(self.options, **options)
        self.UNet_base_num_features = self.options.base_features
        self.UNet_vram_target_GB = self.options.budget.gib

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Own preprocessed folders: another target spacing must not overwrite stock nnU-Net's data."""
        return f"{self.plans_identifier}_{configuration_name}"

    def determine_reader_writer(self) -> type:
        raw = RawDataset.open(self.raw_dataset_folder)
        example = next(iter([*raw.labelled_cases(), *raw.unlabelled_cases()]))
        return determine_reader_writer_from_dataset_json(self.dataset_json, str(example.images[0]), verbose=False)

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Write the plans atomically with our section; custom configurations of an older file are kept, stale ones of
        nnU-Net's standard names are not."""
        path = Path(str(nnUNet_preprocessed)) / self.dataset_name / f"{self.plans_identifier}.json"
        if path.is_file():
            previous = load_json(str(path))["configurations"]
            custom = {name: c for name, c in previous.items() if name not in STANDARD_CONFIGURATIONS}
            plans["configurations"] = {**custom, **plans["configurations"]}
        recursive_fix_for_json_export(plans)
        plans[SECTION] = self._section(plans)
        write_json(path, plans)

    def _section(self, plans: dict[str, Any]) -> dict[str, Any]:
        decision = self._mirroring(plans)
        manager = PlansManager(plans)
        return {
            "version": 1,
            "backbone": self.backbone,
            "base_features": self.options.base_features,
            "memory": {
                "budget_gib": self.options.budget.gib,
                "budget_source": self.options.budget.source,
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
                name: self._stages(manager, name)
                for name in manager.available_configurations
                if name in STANDARD_CONFIGURATIONS
            },
        }

    def _stages(self, manager: PlansManager, name: str) -> dict[str, Any]:
        """One topology, two stages: the patch is shared; pretraining reads patches in pairs."""
        configuration = manager.get_configuration(name)
        patch, batch = list(configuration.patch_size), int(configuration.batch_size)
        gib_per_patch = self._gib_per_patch(configuration)
        stages = {"training": _stage(patch, batch, gib_per_patch)}
        if configuration.previous_stage_name is None:
            pairs = max(PATCHES_PER_SCAN, batch // PATCHES_PER_SCAN * PATCHES_PER_SCAN)
            stages["pretraining"] = _stage(patch, pairs, gib_per_patch)
        return stages

    def _gib_per_patch(self, configuration: Any) -> float:
        features = self.static_estimate_VRAM_usage(
            tuple(configuration.patch_size),
            len(self.dataset_json["channel_names"]),
            len(self.dataset_json["labels"]),
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
        )
        flat = len(configuration.patch_size) == 2
        reference = self.UNet_reference_val_2d if flat else self.UNet_reference_val_3d
        batch = self.UNet_reference_val_corresp_bs_2d if flat else self.UNet_reference_val_corresp_bs_3d
        return features / reference / batch * self.UNet_reference_val_corresp_GB

    def _mirroring(self, plans: Mapping[str, Any]) -> MirrorDecision:
        raw = RawDataset.open(self.raw_dataset_folder)
        if plans["image_reader_writer"].endswith("WithReorient"):
            canonical = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
            directions: dict[str, Any] = {case.identifier: canonical for case in raw.labelled_cases()}
        else:
            directions = {case.identifier: header_direction(case.images[0]) for case in raw.labelled_cases()}
        return decide_mirroring(list(self.dataset_json["labels"]), directions, plans["transpose_forward"])


class DiffSegPlanner(AdoptingPlanning, DiffSegPlanning, ResEncUNetPlanner):
    """Both stages on nnU-Net's residual-encoder U-Net."""

    backbone = "resenc"


class DiffSegPlainPlanner(AdoptingPlanning, DiffSegPlanning, ExperimentPlanner):
    """Both stages on nnU-Net's plain U-Net."""

    backbone = "plain"


def _stage(patch: list[int], batch: int, gib_per_patch: float) -> dict[str, Any]:
    return {"patch_size": patch, "batch_size": batch, "predicted_peak_gib": round(gib_per_patch * batch, 3)}


def header_direction(path: Path) -> tuple[float, ...] | None:
    """Direction cosines from an image's header; no voxel is read. None for what SimpleITK cannot read."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    return reader.GetDirection()
