"""A data set without a single label is pretrained on, and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.pipeline.conftest import TinyProject

pytestmark = pytest.mark.pipeline


def test_a_data_set_without_labels(planned_project: TinyProject) -> None:
    project = planned_project
    lines = ("run", 2, *project.light_plan, "--pretrain-iterations", 1), ("train", 2, "-f", "all")
    run, training = project.diffseg.in_one_process(lines)
    run.ok()
    assert f"{project.pool_name} has no labels: it is pretrained, and there is nothing to train" in run.out
    results = project.results.with_name(project.pool_name)
    assert [path.parent.name for path in results.rglob("checkpoint_final.pth")] == ["fold_all"]
    training.refused("has no labels", "diffseg pretrain 2")
