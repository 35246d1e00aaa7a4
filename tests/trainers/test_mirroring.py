"""The plan's decision on mirroring reaches the augmentation, the checkpoint and the prediction."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform

from diffseg_nnunet.inference.predictor import load_predictor
from diffseg_nnunet.planning.mirroring import to_2d
from diffseg_nnunet.trainers import DiffSegTrainer

NewTrainer = Callable[..., Any]


def allow(trainer: Any, axes: tuple[int, ...]) -> Any:
    """The trainer, had its plan allowed other axes."""
    trainer.plans_manager.plans["diffseg"]["mirroring"] |= {
        "allowed_axes": list(axes),
        "allowed_axes_2d": list(to_2d(axes)),
    }
    return trainer


@pytest.mark.parametrize(
    ("configuration", "allowed", "expected"),
    [("3d_fullres", (), ()), ("2d", (), ()), ("2d", (0,), ()), ("2d", (0, 2), (1,)), ("3d_fullres", (0, 2), (0, 2))],
)
def test_augmentation_mirrors_the_planned_axes(
    new_trainer: NewTrainer, configuration: str, allowed: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    trainer = allow(new_trainer(DiffSegTrainer, configuration), allowed)
    trainer.initialize()
    loader, _ = trainer.build_loaders()
    mirrored = [t.allowed_axes for t in loader.transforms.transforms if isinstance(t, MirrorTransform)]
    assert mirrored == ([expected] if expected else [])
    assert trainer.inference_allowed_mirroring_axes == (expected or None)


@pytest.mark.parametrize("allowed", [(), (0, 1)])
def test_prediction_mirrors_the_planned_axes(new_trainer: NewTrainer, allowed: tuple[int, ...]) -> None:
    """A prediction is the mean over the flips of these axes alone, worked out here by the network itself."""
    trainer = allow(new_trainer(DiffSegTrainer, iterations=1), allowed)
    trainer.initialize()
    trainer.run_training()
    checkpoint = Path(trainer.final_checkpoint)
    predictor = load_predictor(checkpoint.parents[1], (0,), torch.device("cpu"), True, checkpoint.name)
    image = torch.rand((1, *trainer.configuration_manager.patch_size), generator=torch.Generator().manual_seed(0))
    inner = (slice(None), *[slice(4, -4)] * 3)  # nnU-Net's Gaussian weights vanish in half precision at the border
    predicted = predictor.predict_logits_from_preprocessed_data(image)[inner].float()

    network = predictor.network.eval()
    network.load_state_dict(predictor.list_of_parameters[0])

    def over(axes: tuple[int, ...]) -> torch.Tensor:
        flips = [
            dims for count in range(len(axes) + 1) for dims in itertools.combinations([a + 2 for a in axes], count)
        ]
        with torch.no_grad():
            return torch.stack([network(image[None].flip(dims)).flip(dims)[0] for dims in flips]).mean(0)[inner]

    torch.testing.assert_close(predicted, over(allowed), atol=5e-3, rtol=1e-2)
    assert (over((0, 1, 2)) - predicted).abs().max() > 0.05
