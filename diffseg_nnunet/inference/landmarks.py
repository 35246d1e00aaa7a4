"""Landmarks of preprocessed, labelled scans, as a pretrained network sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from diffseg_nnunet.coordinates.landmarks import Landmark, mean_landmarks, structure_centres
from diffseg_nnunet.inference.coordinates import preprocessed_coordinates
from diffseg_nnunet.inference.pretrained import PretrainedModel


def find_landmarks(
    model: PretrainedModel,
    folder: Path,
    cases: Sequence[str],
    labels: Mapping[str, Sequence[int]],
    progress: Callable[[int, int], None],
) -> dict[str, Landmark]:
    """Where the labelled structures lie, in the coordinates of `model`.

    Args:
        folder: preprocessed as the model was pretrained.
        cases: labelled cases of `folder`.
        labels: structure -> the label values it consists of.
        progress: called with (cases done, cases in all).
    """
    dataset = infer_dataset_class(str(folder))(str(folder), list(cases))
    scans = []
    for number, case in enumerate(cases, start=1):
        data, segmentation, _, _ = dataset.load_case(case)
        coordinates = preprocessed_coordinates(model, np.asarray(data[:])).numpy()
        scans.append(structure_centres(coordinates, np.asarray(segmentation[:])[0], labels))
        progress(number, len(cases))
    return mean_landmarks(scans)
