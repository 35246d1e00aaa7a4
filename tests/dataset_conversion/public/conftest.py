"""Conversion into a workspace of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffseg_nnunet.dataset_conversion.description import ConversionPlan
from diffseg_nnunet.workspace import Workspace

from .trees import Convert, Written


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    workspace = Workspace.locate(tmp_path / "workspace")

    def convert(plan: ConversionPlan) -> Written:
        return Written(plan.execute(dataset_id=1, workspace=workspace, workers=2).folder)

    return convert
