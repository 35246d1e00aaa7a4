"""Cases that are read and written while others are predicted come out as one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from diffseg_nnunet.inference.predictor import load_predictor, predict_cases
from diffseg_nnunet.raw_dataset import Case
from diffseg_nnunet.workspace import Workspace
from tests.process_state import environment_restored

if TYPE_CHECKING:
    from tests.pipeline.conftest import TinyProject

pytestmark = pytest.mark.pipeline


@pytest.fixture
def project(trained: TinyProject) -> Iterator[TinyProject]:
    with environment_restored():
        Workspace.locate(trained.workspace).activate()
        yield trained


def test_overlapping_predictions_are_the_same(project: TinyProject, tmp_path: Path) -> None:
    images = sorted(project.test_images.glob("*.nii.gz"))
    damaged = tmp_path / "damaged_0000.nii.gz"
    damaged.write_bytes(images[0].read_bytes()[:2000])
    cases = [Case(path.name.removesuffix("_0000.nii.gz"), (path,), None) for path in (images[0], damaged, images[1])]
    model = load_predictor(project.model("DiffSegTrainer"), [0], torch.device("cpu"), False, "checkpoint_final.pth")
    found = {}
    for overlap in (False, True):
        folder, told = tmp_path / str(overlap), []
        failed = predict_cases(
            model,
            cases,
            folder,
            save_probabilities=True,
            progress=lambda done, total, case, told=told: told.append((done, total, case)),
            overlap=overlap,
        )
        assert [case.case for case in failed] == ["damaged"]
        assert [(done, total) for done, total, _ in told] == [(1, 3), (2, 3), (3, 3)]
        found[overlap] = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix == ".gz"}
        assert len(list(folder.glob("*.npz"))) == 2
    assert len(found[True]) == 2
    assert found[True] == found[False]
    again = []
    options = {"save_probabilities": True, "skip_existing": True, "progress": lambda *one: again.append(one)}
    predict_cases(model, cases, tmp_path / "True", **options)
    assert again == [(3, 3, "damaged")]
