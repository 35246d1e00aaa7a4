"""What the tests of all converters share."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffseg_nnunet.workspace import Workspace


@pytest.fixture(autouse=True)
def no_exported_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's variables, which would win over a test's workspace, are those of nobody."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """An empty one."""
    return Workspace.locate(tmp_path / "workspace")
