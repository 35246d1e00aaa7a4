"""A plain folder to convert."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffseg_nnunet.dataset_conversion.core import ConversionReport, convert
from diffseg_nnunet.dataset_conversion.folder import FolderConverter
from diffseg_nnunet.workspace import Workspace

from .sources import Run, organs, scan, write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two labelled cases."""
    for number in (1, 2):
        write(tmp_path / f"source/images/liver_{number}.nii.gz", scan(number), number)
        write(tmp_path / f"source/labels/liver_{number}.nii.gz", organs(), number)
    (tmp_path / "source/labels.json").write_text('{"background": 0, "liver": 1, "tumour": 2}')
    return tmp_path / "source"


@pytest.fixture
def run(source: Path, workspace: Workspace) -> Run:
    """Plan and convert the source with defaults that a test changes one by one."""

    def run(**changes: object) -> ConversionReport:
        engine = {"dataset_id": 5, "workspace": workspace, "workers": 2}
        engine |= {key: changes.pop(key) for key in ("dataset_id", "copy", "workers", "progress") if key in changes}
        arguments = {
            "images": source / "images",
            "labels": source / "labels",
            "label_names": source / "labels.json",
            "modality": "CT",
            "name": "Liver",
            **changes,
        }
        return convert(FolderConverter().plan(**arguments), **engine)

    return run
