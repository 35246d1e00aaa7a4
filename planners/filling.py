"""Patch and batch of both stages, as large as the memory budget allows; everything else is nnU-Net's plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.planning.nnunet_rules import LEAST_BATCH, batch_limit
from diffseg_nnunet.planning.search import (
    Choice,
    NothingFitsError,
    Patch,
    Topology,
    pretraining_ladder,
    smaller_patches,
    training_ladder,
)
from diffseg_nnunet.raw_dataset import RawDataset
from diffseg_nnunet.training.settings import PATCHES_PER_SCAN, PretrainingSettings

from .fitting import FEWEST_STAGES, Fitted, Fitting, poolable, reduced, too_small
from .steps import PRETRAINING_DTYPE


class FittingPlanning:
    """Fills the budget of ``options`` where nnU-Net follows its rule of thumb; a mix-in placed before its planner.

    nnU-Net plans its largest patch, the search goes down from there; then the pretraining's patch and batch follow, on
    the topology that was found.
    """

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
        """nnU-Net's plan of a configuration, with the patch, the batch and the topology that fill the budget.

        Raises:
            BadInputError: the spacing is so coarse that less than a voxel is left of the median case.
        """
        if min(median_shape) < 1:
            mm, left = (" × ".join(f"{float(each):g}" for each in lengths) for lengths in (spacing, median_shape))
            raise BadInputError(
                f"Resampled to {mm} mm, the median case of {self.dataset_name} has {left} voxels: nothing is left.",
                "Give a finer --spacing, or none.",
            )
        plan = super().get_plans_for_configuration(
            spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
        )
        # nnU-Net tries dozens of spacings until a low-resolution patch covers enough: measured once, when it has one
        if data_identifier == self.generate_data_identifier("3d_lowres"):
            self._largest_lowres = plan["patch_size"]
            return plan | self._guessed(plan)
        return plan | self._fitted(plan, approximate_n_voxels_dataset)

    @cached_property
    def _reasons(self) -> dict[str, dict[str, str]]:
        """Why, by configuration, of what the search decides."""
        return {}

    @cached_property
    def _misfits(self) -> dict[str, NothingFitsError]:
        """What does not fit at all, by what it is of."""
        return {}

    def _smallest(self, error: NothingFitsError, what: str) -> Choice:
        """The choice that needs least, to go on with: the message shall name a budget that all the rest fits, too."""
        self._misfits[what] = error
        return error.smallest

    def refuse_misfits(self) -> None:
        """Raises BadInputError, with the budget the greediest of them needs, where something does not fit."""
        if self._misfits:
            what, error = max(self._misfits.items(), key=lambda misfit: misfit[1].smallest_gib)
            raise too_small(error, self.fitting.budget_gib, what)

    @cached_property
    def _label_manager(self) -> LabelManager:
        return LabelManager(self.dataset_json["labels"], self.dataset_json.get("regions_class_order"))

    @cached_property
    def fitting(self) -> Fitting:
        """Of this data set's networks into the budget."""
        label_manager = self._label_manager
        return Fitting(
            self.options.budget.gib,
            len(self.dataset_json["channel_names"]),
            label_manager.num_segmentation_heads,
            label_manager.has_regions,
            label_manager.has_ignore_label,
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

    def adapted(
        self, architecture: Mapping[str, Any], spacing: Sequence[float], patch: Sequence[int]
    ) -> tuple[dict[str, Any], Patch]:
        """The architecture to plan with, and the patch padded for it: nnU-Net's own, unless another mix-in says so."""
        return dict(architecture), tuple(int(side) for side in patch)

    def _candidates(
        self, plan: Mapping[str, Any], spacing: Sequence[float], median: Sequence[float]
    ) -> dict[Topology, dict[str, Any]]:
        """Patches with their architectures, the largest first."""
        largest = poolable(spacing, plan["patch_size"])
        candidates: dict[Patch, tuple[Topology, dict[str, Any]]] = {}
        for each in smaller_patches(largest, median, partial(reduced, spacing)):
            own = self.architecture_of(plan["architecture"], each)
            architecture, patch = self.adapted(own, spacing, each.patch)
            arguments = architecture["arch_kwargs"]
            if arguments["n_stages"] < FEWEST_STAGES:
                continue
            candidates.setdefault(patch, (_topology(architecture, patch), architecture))
        if not candidates:
            raise BadInputError(
                f"No network of {FEWEST_STAGES} or more stages can start from this checkpoint: the data are too small.",
                "Plan without --from-checkpoint.",
            )
        return dict(candidates.values())

    def _fitted(self, plan: Mapping[str, Any], voxels_of_dataset: float) -> dict[str, Any]:
        """Patch, batch and architecture of a configuration."""
        spacing, median = _lengths(plan)
        candidates = self._candidates(plan, spacing, median)
        by_key = {(topology.strides, topology.kernels): each for topology, each in candidates.items()}
        most = self._most_patches(voxels_of_dataset, LEAST_BATCH)
        ladder = training_ladder(list(candidates), median, most)
        name = plan["data_identifier"].removeprefix(f"{self.plans_identifier}_")
        choice = self._fit(ladder, lambda choice: by_key[choice.key], name)
        largest = next(iter(candidates)).patch
        self._reasons[name] = _reasons(choice, largest, most(choice.patch), self.fitting.budget_gib)
        return {"patch_size": list(choice.patch), "batch_size": choice.batch, "architecture": by_key[choice.key]}

    def _guessed(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Likewise, of about as many voxels as were found to fit another configuration: nothing is measured."""
        spacing, median = _lengths(plan)
        topology = poolable(spacing, plan["patch_size"])
        # a plan that will be refused needs no search for the spacing whose patch covers enough
        while not self._misfits and LEAST_BATCH * math.prod(topology.patch) > self._voxels_that_fit:
            # nnU-Net's way: the axis of which the patch has the largest share
            axes = sorted(range(len(median)), key=lambda axis: -topology.patch[axis] / median[axis])
            smaller = (reduced(spacing, topology.patch, axis) for axis in axes)
            following = next((each for each in smaller if each is not None), None)
            if following is None:
                break
            topology = following
        architecture, patch = self.adapted(
            self.architecture_of(plan["architecture"], topology), spacing, topology.patch
        )
        return {"patch_size": list(patch), "batch_size": LEAST_BATCH, "architecture": architecture}

    def _fit(self, ladder: list[Choice], architecture: Any, name: str) -> Choice:
        try:
            choice = self.fitting.fit_training(ladder, architecture).choice
        except NothingFitsError as error:
            choice = self._smallest(error, name)
        self._voxels_that_fit = choice.voxels
        return choice

    def finish_lowres(self, plans: dict[str, Any]) -> None:
        plan = plans["configurations"].get("3d_lowres")
        if plan is not None:
            voxels_of_dataset = math.prod(plan["median_image_size_in_voxels"]) * self.dataset_json["numTraining"]
            plan |= self._fitted({**plan, "patch_size": self._largest_lowres}, voxels_of_dataset)

    def stages(self, plans: dict[str, Any], name: str) -> dict[str, Any]:
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
        stages["pretraining"] = _stage(self._fit_pretraining(name, architecture, planned, shapes))
        largest = shapes[shapes.prod(axis=1).argmax()]
        stages["inference"] = self.fitting.inference(architecture, planned.patch, np.median(shapes, axis=0), largest)
        stages["reasons"] = self._reasons[name] | _pretraining_reasons(stages, self.fitting.budget_gib)
        return stages

    def _fit_pretraining(
        self, name: str, architecture: Mapping[str, Any], planned: Choice, shapes: NDArray[np.int64]
    ) -> Fitted:
        median = np.median(shapes, axis=0)
        voxels = (self.dataset_json["numTraining"] + self._unlabelled_cases()) * math.prod(median)
        most = self._most_patches(voxels, PATCHES_PER_SCAN)
        slices = median[-len(planned.patch) :].tolist()
        ladder = pretraining_ladder(
            planned, _topology(architecture, planned.patch).divisor, slices, most, PATCHES_PER_SCAN
        )
        try:
            return self.fitting.fit_pretraining(ladder, architecture)
        except NothingFitsError as error:
            smallest = self._smallest(error, f"Pretraining of {name}")
            return Fitted(smallest, self.fitting.pretraining_memory(self.fitting.shape(architecture, smallest)))

    def _most_patches(self, voxels_of_dataset: float, least: int) -> Callable[[Patch], int]:
        """The largest batch of a patch: no more than nnU-Net's share of all voxels, but `least` patches at any rate."""
        return lambda patch: max(least, batch_limit(patch, voxels_of_dataset, self.max_dataset_covered))

    def _fit_cascade(self, architecture: Mapping[str, Any], planned: Choice, configuration: Any) -> Fitted:
        """The last stage of a cascade, which reads a segmentation too: the planned patch or a smaller one that fits."""
        median = [float(length) for length in configuration.median_image_size_in_voxels]
        fewer = [Choice(planned.patch, batch) for batch in range(LEAST_BATCH, planned.batch)]
        # smaller patches for when not even the least batch of the planned one fits
        ladder = pretraining_ladder(
            planned, _topology(architecture, planned.patch).divisor, median, lambda _: LEAST_BATCH, 1
        )
        least = LEAST_BATCH * math.prod(planned.patch)
        ladder = [*(choice for choice in ladder if choice.voxels < least), *fewer]
        labels = self._label_manager
        try:
            return self.fitting.fit_training(
                [*ladder, planned], lambda _: architecture, extra_channels=len(labels.foreground_labels)
            )
        except NothingFitsError as error:
            smallest = self._smallest(error, "3d_cascade_fullres")
            shape = self.fitting.shape(architecture, smallest, len(labels.foreground_labels))
            return Fitted(smallest, self.fitting.training_memory(shape))

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


def _lengths(plan: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Spacing and median shape of a configuration."""
    return [float(mm) for mm in plan["spacing"]], [float(n) for n in plan["median_image_size_in_voxels"]]


def _stage(fitted: Fitted) -> dict[str, Any]:
    parts = {part: round(gib, 3) for part, gib in fitted.memory.parts().items()}
    return {
        "patch_size": list(fitted.choice.patch),
        "batch_size": fitted.choice.batch,
        "predicted_peak_gib": round(sum(parts.values()), 3),
        "memory_gib": parts,
    }


def _reasons(choice: Choice, largest: Patch, most: int, budget_gib: float) -> dict[str, str]:
    """What limits a patch and its batch, one sentence each."""
    covers = choice.patch == largest
    if covers:
        patch = "the largest nnU-Net would take: it covers the median case, or 256³ voxels (2048² in 2D)"
    elif choice.batch == LEAST_BATCH:
        patch = f"the largest whose training step fits {budget_gib:g} GiB, shaped like the median case"
    else:
        patch = (
            f"{choice.batch} of it fill {budget_gib:g} GiB, and it is shaped like the median case; fewer of a larger "
            "one that fit would fill less"
        )
    if choice.batch == most and covers:
        batch = "no more than 5 % of the data set's voxels in a batch, and 2 patches at least"
    elif covers:
        batch = f"as many as fit {budget_gib:g} GiB"
    else:
        batch = "nnU-Net's least" if choice.batch == LEAST_BATCH else "more patches fill the budget, larger ones do not"
    return {"patch": patch, "batch": batch}


def _pretraining_reasons(stages: Mapping[str, Any], budget_gib: float) -> dict[str, str]:
    """Why the pretraining's patch and batch are what they are, one sentence each."""
    training, pretraining = (stages[stage] for stage in ("training", "pretraining"))
    if pretraining["patch_size"] == training["patch_size"]:
        patch = "that of the training: both stages have one topology"
    else:
        patch = f"its own, on the training's topology: so pairs of patches fill {budget_gib:g} GiB best"
    return {
        "pretraining_patch": patch,
        "pretraining_batch": "whole pairs of patches of one scan, so that coordinates can be compared: as many as fit "
        f"{budget_gib:g} GiB, and no more than 5 % of all voxels, unlabelled cases included",
    }


def _topology(architecture: Mapping[str, Any], patch: Patch) -> Topology:
    strides, kernels = (tuple(map(tuple, architecture["arch_kwargs"][name])) for name in ("strides", "kernel_sizes"))
    return Topology(patch, strides, kernels)
