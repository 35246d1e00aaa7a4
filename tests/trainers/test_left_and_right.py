"""Neither training nor prediction swaps left and right."""

from __future__ import annotations

import numpy as np
import torch

from diffseg_nnunet.phantom import LABELS
from diffseg_nnunet.trainers import DiffSegTrainer

from .learning import NewTrainer, trained


def middle(target: np.ndarray, label: str) -> np.ndarray:
    """Centre of a label in voxels."""
    return np.argwhere(target == LABELS[label]).mean(axis=0)


def test_augmentation_never_swaps_left_and_right(new_trainer: NewTrainer) -> None:
    """The phantoms' last array axis runs to the patient's left; whatever is augmented, the left kidney lies further."""
    trainer = new_trainer(DiffSegTrainer)
    trainer.initialize()
    loader, _ = trainer.build_loaders()
    assert trainer.inference_allowed_mirroring_axes == (0, 1)
    loader.start_at(0, 0, 0, 1)
    to_left, heart_side_up, spine_behind = [], [], []
    for _ in range(25):
        for target in next(loader)["target"][0][:, 0].numpy():
            found = {name for name, value in LABELS.items() if (target == value).sum() > 8}
            if {"left_kidney", "right_kidney"} <= found:
                to_left.append(middle(target, "left_kidney")[2] - middle(target, "right_kidney")[2])
            if {"lungs", "left_kidney"} <= found:
                heart_side_up.append(middle(target, "lungs")[0] > middle(target, "left_kidney")[0])
            if {"liver", "spine"} <= found:
                spine_behind.append(middle(target, "spine")[1] > middle(target, "liver")[1])
    assert len(to_left) > 15
    assert min(to_left) > 0
    # the other axes are mirrored, so the test sees mirroring where there is some
    assert {*heart_side_up} == {*spine_behind} == {True, False}


def test_2d_patches_are_not_swapped_either(new_trainer: NewTrainer) -> None:
    trainer = new_trainer(DiffSegTrainer, "2d")
    *_, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert axes == trainer.inference_allowed_mirroring_axes == (0,)


def test_prediction_is_told_which_axes_may_be_mirrored(new_trainer: NewTrainer) -> None:
    trainer = new_trainer(DiffSegTrainer, iterations=1)
    trained(trainer)
    # nnU-Net's own format, which stock prediction reads
    checkpoint = torch.load(trainer.final_checkpoint, weights_only=False)
    assert checkpoint["inference_allowed_mirroring_axes"] == (0, 1)
    assert checkpoint["trainer_name"] == "DiffSegTrainer"
