"""Planners of both stages: nnU-Net's rules for everything but patch and batch, which fill the memory budget.

One topology, on which each stage has a patch and a batch of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
)
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray

from diffseg_nnunet.atomic import write_json
from diffseg_nnunet.coordinates.head import CoordinateSettings
from diffseg_nnunet.diffusion.gaussian import DiffusionSettings
from diffseg_nnunet.planning.hardware import MemoryBudget
from diffseg_nnunet.planning.mirroring import MirrorDecision, decide_mirroring, to_2d
from diffseg_nnunet.planning.search import (
    SMALLEST_BATCH,
    Choice,
    NothingFitsError,
    Topology,
    pretraining_ladder,
    smaller_patches,
    training_ladder,
)
from diffseg_nnunet.planning.section import PLANS_NAME, SECTION
from diffseg_nnunet.raw_dataset import RawDataset
from diffseg_nnunet.training.settings import PATCHES_PER_SCAN, PretrainingSettings

from .fitting import Fitted, Fitting, poolable, reduced, share_of_dataset, too_small
from .steps import PRETRAINING_DTYPE

STANDARD_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
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
    """

    budget: MemoryBudget = field(default_factory=lambda: MemoryBudget(8.0, "nnU-Net's default"))
    base_features: int = 32
    unlabelled: tuple[str, ...] = ()
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    coordinates: CoordinateSettings = field(default_factory=CoordinateSettings)


class DiffSegPlanning:
    """Patch and batch that fill the budget, and the ``diffseg`` section; a mix-in placed before an nnU-Net planner.

    Spacing, normalisation, resampling and the rules of topology are nnU-Net's own, and so is the form of the plans:
    stock commands preprocess, train and predict by them.
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
        self._finish_lowres(plans)
        recursive_fix_for_json_export(plans)
        plans[SECTION] = self._section(plans)
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
                name: self._stages(plans, name) for name in plans["configurations"] if name in STANDARD_CONFIGURATIONS
            },
        }

    # -- patch and batch ----------------------------------------------------------------------------------------------

    @staticmethod
    def static_estimate_VRAM_usage(*_: Any) -> float:  # noqa: N802 nnU-Net's name
        """Next to nothing: nnU-Net then plans its largest patch, from which :meth:`_fit` searches down."""
        return 1.0

    def get_plans_for_configuration(
        self,
        spacing: Any,
        median_shape: Any,
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict,
    ) -> dict[str, Any]:
        """nnU-Net's plan of a configuration, with the patch, the batch and the topology that fill the budget."""
        plan = super().get_plans_for_configuration(
            spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
        )
        # nnU-Net tries dozens of spacings until a low-resolution patch covers enough: measured once, when it has one
        measured = None if data_identifier.endswith("3d_lowres") else self.fitting
        return plan | self._fitted(plan, approximate_n_voxels_dataset, measured)

    @cached_property
    def fitting(self) -> Fitting:
        """Of this data set's networks into the budget."""
        label_manager = LabelManager(self.dataset_json["labels"], self.dataset_json.get("regions_class_order"))
        return Fitting(
            self.options.budget.gib,
            len(self.dataset_json["channel_names"]),
            label_manager.num_segmentation_heads,
            label_manager.has_regions,
            PretrainingSettings(diffusion=self.options.diffusion, coordinates=self.options.coordinates),
            PRETRAINING_DTYPE if self.options.budget.bfloat16 else None,
        )

    def architecture_of(self, template: Mapping[str, Any], topology: Topology) -> dict[str, Any]:
        """nnU-Net's architecture entry for another patch: what depends on the number of stages and their strides."""
        arguments, stages = dict(template["arch_kwargs"]), topology.stages
        most = self.UNet_max_features_2d if len(topology.patch) == 2 else self.UNet_max_features_3d
        arguments |= {
            "n_stages": stages,
            "features_per_stage": tuple(min(most, self.UNet_base_num_features * 2**stage) for stage in range(stages)),
            "kernel_sizes": topology.kernels,
            "strides": topology.strides,
            "n_conv_per_stage_decoder": self.UNet_blocks_per_stage_decoder[: stages - 1],
        }
        blocks = "n_blocks_per_stage" if "n_blocks_per_stage" in arguments else "n_conv_per_stage"
        arguments[blocks] = self.UNet_blocks_per_stage_encoder[:stages]
        return {**template, "arch_kwargs": arguments}

    def _fitted(self, plan: Mapping[str, Any], voxels_of_dataset: float, fitting: Fitting | None) -> dict[str, Any]:
        """Patch, batch and architecture of a configuration; guessed from other configurations' memory without
        `fitting`."""
        spacing, median = [float(mm) for mm in plan["spacing"]], [float(n) for n in plan["median_image_size_in_voxels"]]
        largest = poolable(spacing, plan["patch_size"])
        patches = smaller_patches(largest, median, partial(reduced, spacing))
        by_key = {(each.strides, each.kernels): each for each in patches}

        def architecture(choice: Choice) -> dict[str, Any]:
            return self.architecture_of(plan["architecture"], by_key[choice.key])

        most = partial(share_of_dataset, voxels_of_dataset, self.max_dataset_covered, least=SMALLEST_BATCH)
        ladder = training_ladder(patches, median, most)
        if fitting is None:
            choice = next((each for each in reversed(ladder) if each.voxels <= self._voxels_that_fit), ladder[0])
        else:
            choice = self._fit(ladder, architecture, fitting, plan["data_identifier"])
        return {
            "patch_size": list(choice.patch),
            "batch_size": choice.batch,
            "architecture": architecture(choice),
        }

    def _fit(self, ladder: list[Choice], architecture: Any, fitting: Fitting, name: str) -> Choice:
        try:
            fitted = fitting.fit_training(ladder, architecture)
        except NothingFitsError as error:
            raise too_small(error, fitting.budget_gib, name) from error
        self._voxels_that_fit = fitted.choice.voxels
        return fitted.choice

    def _finish_lowres(self, plans: dict[str, Any]) -> None:
        plan = plans["configurations"].get("3d_lowres")
        if plan is not None:
            voxels_of_dataset = math.prod(plan["median_image_size_in_voxels"]) * self.dataset_json["numTraining"]
            plan |= self._fitted(plan, voxels_of_dataset, self.fitting)

    def _stages(self, plans: dict[str, Any], name: str) -> dict[str, Any]:
        """Both stages of a configuration: patch, batch and memory, that of prediction, and why."""
        configuration = PlansManager(plans).get_configuration(name)
        architecture = configuration.configuration["architecture"]
        planned = Choice(tuple(configuration.patch_size), int(configuration.batch_size))
        if configuration.previous_stage_name is not None:
            trained = self._fit_cascade(architecture, planned, configuration)
            plans["configurations"][name] |= {
                "patch_size": list(trained.choice.patch),
                "batch_size": trained.choice.batch,
            }
            return {"training": _stage(trained)}
        shape = self.fitting.shape(architecture, planned)
        stages = {"training": _stage(Fitted(planned, self.fitting.training_memory(shape)))}
        shapes = self._resampled_shapes(plans["transpose_forward"], configuration.spacing)
        stages["pretraining"] = _stage(self._fit_pretraining(architecture, planned, configuration, shapes))
        largest = shapes[shapes.prod(axis=1).argmax()]
        stages["inference"] = self.fitting.inference(architecture, planned.patch, np.median(shapes, axis=0), largest)
        return stages

    def _fit_pretraining(
        self, architecture: Mapping[str, Any], planned: Choice, configuration: Any, shapes: NDArray[np.int64]
    ) -> Fitted:
        median = np.median(shapes, axis=0)
        voxels = (self.dataset_json["numTraining"] + self._unlabelled_cases()) * math.prod(median)
        most = partial(share_of_dataset, voxels, self.max_dataset_covered, least=PATCHES_PER_SCAN)
        slices = median[-len(planned.patch) :].tolist()
        ladder = pretraining_ladder(planned, _divisor(architecture), slices, most, PATCHES_PER_SCAN)
        try:
            return self.fitting.fit_pretraining(ladder, architecture)
        except NothingFitsError as error:
            raise too_small(
                error, self.fitting.budget_gib, f"pretraining of {configuration.data_identifier}"
            ) from error

    def _fit_cascade(self, architecture: Mapping[str, Any], planned: Choice, configuration: Any) -> Fitted:
        """The last stage of a cascade, which reads a segmentation too: the planned patch or a smaller one that fits."""
        median = [float(length) for length in configuration.median_image_size_in_voxels]
        ladder = pretraining_ladder(planned, _divisor(architecture), median, lambda _: planned.batch, 1)
        ladder = [choice for choice in ladder if choice.voxels < planned.voxels and choice.batch == planned.batch]
        labels = LabelManager(self.dataset_json["labels"], self.dataset_json.get("regions_class_order"))
        try:
            return self.fitting.fit_training(
                [*ladder, planned], lambda _: architecture, extra_channels=len(labels.foreground_labels)
            )
        except NothingFitsError as error:
            raise too_small(error, self.fitting.budget_gib, "3d_cascade_fullres") from error

    def _resampled_shapes(self, transposition: Sequence[int], target: Sequence[float]) -> NDArray[np.int64]:
        """Shapes of all cases as a configuration reads them: (cases, 3); in 2D slices keep their distance."""
        order = list(transposition)
        spacings = np.array(self.dataset_fingerprint["spacings"])[:, order]
        shapes = np.array(self.dataset_fingerprint["shapes_after_crop"])[:, order]
        factors = np.ones_like(spacings)
        factors[:, -len(target) :] = spacings[:, -len(target) :] / np.array(target, dtype=float)
        return np.round(shapes * factors).astype(np.int64)

    def _unlabelled_cases(self) -> int:
        own = Path(self.raw_dataset_folder)
        datasets = [RawDataset.open(own), *(RawDataset.open(own.parent / name) for name in self.options.unlabelled)]
        pooled = (dataset.labelled_cases() for dataset in datasets[1:])
        return sum(len(dataset.unlabelled_cases()) for dataset in datasets) + sum(map(len, pooled))

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


class DiffSegPlanner(DiffSegPlanning, ResEncUNetPlanner):
    """Both stages on nnU-Net's residual-encoder U-Net."""

    backbone = "resenc"


class DiffSegPlainPlanner(DiffSegPlanning, ExperimentPlanner):
    """Both stages on nnU-Net's plain U-Net."""

    backbone = "plain"


def _stage(fitted: Fitted) -> dict[str, Any]:
    parts = {part: round(gib, 3) for part, gib in fitted.memory.parts().items()}
    return {
        "patch_size": list(fitted.choice.patch),
        "batch_size": fitted.choice.batch,
        "predicted_peak_gib": round(sum(parts.values()), 3),
        "memory_gib": parts,
    }


def _divisor(architecture: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(math.prod(strides) for strides in zip(*architecture["arch_kwargs"]["strides"], strict=True))


def header_direction(path: Path) -> tuple[float, ...] | None:
    """Direction cosines from an image's header; no voxel is read. None for what SimpleITK cannot read."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    return reader.GetDirection()
