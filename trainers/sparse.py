"""Cases that are annotated in part: everything else is nnU-Net's ignore label, as cases are loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from diffseg_nnunet.budgets.annotation import Annotation, ScanGrid
from diffseg_nnunet.budgets.folds import read_budget_folds
from diffseg_nnunet.raw_dataset import SPLITS_FILE, values_of_labels


def sparse_annotations(folder: str | None, fold: int | str, slice_axis: int) -> dict[str, Annotation] | None:
    """What is annotated in each training case of a fold; None where whole cases are.

    Args:
        folder: the data set's in nnUNet_preprocessed.
        slice_axis: of the images as nnU-Net reads them, that is the first of the preprocessed ones.

    Raises:
        BadInputError: the record of label budgets cannot be read, disagrees with the splits, or is of slices along
            another axis.
    """
    splits = Path(folder) / SPLITS_FILE if folder is not None else None
    if fold == "all" or splits is None or not splits.is_file():
        return None
    budget = read_budget_folds(splits.parent, json.loads(splits.read_text(encoding="utf-8"))).get(int(fold))
    if budget is None:
        return None
    budget.require_axis(slice_axis)
    return budget.annotations()


def with_ignore_label(plans_manager: Any, dataset_json: Mapping[str, Any]) -> LabelManager:
    """The label manager of the data set as if it had an ignore label, which adds no output to the network."""
    labels = dataset_json["labels"]
    if "ignore" not in labels:
        labels = {**labels, "ignore": max(values_of_labels(labels)) + 1}
    return plans_manager.get_label_manager({**dataset_json, "labels": labels})


def keep_single_voxels(transforms: Any) -> None:
    """Have rotations and zooms take each label from the nearest voxel.

    nnU-Net interpolates the labels' indicators, and a lone annotated voxel loses against the ignored ones around it.
    """
    if isinstance(transforms, SpatialTransform):
        transforms.mode_seg = "nearest"
    for inner in getattr(transforms, "transforms", ()):
        keep_single_voxels(inner)


class SparseSegmentation:
    """A preprocessed segmentation, (1, z, y, x), whose voxels read as the ignore label where nothing is annotated.

    Reads, and masks, only what is asked for by slices, as nnU-Net's loader crops.
    """

    def __init__(self, segmentation: Any, annotation: Annotation, grid: ScanGrid, ignore_label: int):
        self._segmentation = segmentation
        self._annotation = annotation
        self._grid = grid
        self._ignore_label = ignore_label
        self.shape: tuple[int, ...] = tuple(segmentation.shape)
        # nnU-Net keeps labels as small integers, which may not hold one more
        kept = segmentation.dtype
        self.dtype = kept if ignore_label <= np.iinfo(kept).max else np.promote_types(kept, np.int16)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        given = index if isinstance(index, tuple) else (index,)
        box = (*given, *(slice(None) for _ in self.shape[len(given) :]))
        values = np.asarray(self._segmentation[box])
        indices = [np.arange(size)[part] for size, part in zip(self.shape, box, strict=True)]
        annotated = self._annotation.mask(self._grid, indices[1:])
        return np.where(annotated, values, np.asarray(self._ignore_label, dtype=self.dtype))


class SparselyAnnotatedDataset:
    """The cases of one of nnU-Net's data sets, of whose labels only the annotated ones can be seen.

    The voxels on which patches are centred are sampled anew, as preprocessing does it, among the annotated ones.

    Args:
        dataset: nnU-Net's.
        annotations: case -> what is annotated.
        label_manager: with an ignore label.
    """

    def __init__(self, dataset: Any, annotations: Mapping[str, Annotation], label_manager: LabelManager):
        self.identifiers = dataset.identifiers
        self._dataset = dataset
        self._annotations = annotations
        self._ignore_label = label_manager.ignore_label
        foreground = label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels
        self._centred_on = [*foreground, [-1, *label_manager.all_labels]]  # nnU-Net's, of data with an ignore label
        self._class_locations = {case: self._sample(case) for case in self.identifiers}

    def _segmentation(self, case: str, segmentation: Any, properties: Mapping[str, Any]) -> SparseSegmentation:
        grid = ScanGrid.of(properties, segmentation.shape[1:])
        return SparseSegmentation(segmentation, self._annotations[case], grid, self._ignore_label)

    def _sample(self, case: str) -> dict[Any, np.ndarray]:
        _, segmentation, _, properties = self._dataset.load_case(case)
        annotated = self._segmentation(case, segmentation, properties)[:]
        return DefaultPreprocessor._sample_foreground_locations(annotated, self._centred_on)

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict]:
        data, segmentation, previous, properties = self._dataset.load_case(identifier)
        visible = self._segmentation(identifier, segmentation, properties)
        return data, visible, previous, {**properties, "class_locations": self._class_locations[identifier]}
