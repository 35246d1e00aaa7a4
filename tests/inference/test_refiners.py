"""Refiners that are to predict together are looked at before any of them is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.inference.refining import RefineOptions, read_refiners
from diffseg_nnunet.refinement.network import REFINER_FORMAT
from diffseg_nnunet.training.refining import RefinementSettings

NAME = "checkpoint_final.pth"


def written(model: Path, fold: int, width: int = 8, **settings: Any) -> None:
    """A refiner's checkpoint without weights."""
    folder = model / f"fold_{fold}"
    folder.mkdir(parents=True)
    content = {
        "network_weights": {},
        "refiner_weights": {},
        "refiner_architecture": {"channels": [width, 2 * width]},
        "refiner_format": REFINER_FORMAT,
        "segmentor": {"strategy": "finetune"},
        "settings": RefinementSettings(**settings).to_json(),
    }
    torch.save(content, folder / NAME)


def test_steps_beyond_those_of_the_training_are_refused(tmp_path: Path) -> None:
    written(tmp_path, 0)
    assert len(read_refiners(tmp_path, [0], NAME, RefineOptions(steps=10))) == 1
    with pytest.raises(BadInputError, match=r"--steps 20 cannot be: .* was trained with 10. Give --steps 1 to 10."):
        read_refiners(tmp_path, [0], NAME, RefineOptions(steps=20))


def test_refiners_of_several_kinds_are_refused(tmp_path: Path) -> None:
    written(tmp_path, 0)
    written(tmp_path, 1)
    written(tmp_path, 2, width=16)
    written(tmp_path, 3, diffusion={"timesteps": 4})
    assert len(read_refiners(tmp_path, [0, 1], NAME, RefineOptions())) == 2
    for folds in ([0, 2], [1, 3]):
        with pytest.raises(BadInputError, match="differ in size or time steps"):
            read_refiners(tmp_path, folds, NAME, RefineOptions())


def test_refiners_that_were_validated_otherwise_need_to_be_told(tmp_path: Path) -> None:
    written(tmp_path, 0)
    written(tmp_path, 1, samples=2)
    with pytest.raises(BadInputError, match="were validated with different samples, steps or samplers"):
        read_refiners(tmp_path, [0, 1], NAME, RefineOptions())
    assert len(read_refiners(tmp_path, [0, 1], NAME, RefineOptions(samples=4))) == 2


def test_a_segmentor_is_no_refiner(tmp_path: Path) -> None:
    (tmp_path / "fold_0").mkdir()
    torch.save({"network_weights": {}}, tmp_path / "fold_0" / NAME)
    with pytest.raises(BadInputError, match="is no refiner: it has no refiner_weights"):
        read_refiners(tmp_path, [0], NAME, RefineOptions())
