"""A conversion to a disk that is full, or fills up."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from diffseg_nnunet.dataset_conversion.core import convert
from diffseg_nnunet.dataset_conversion.folder import FolderConverter
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.workspace import Workspace

from .sources import Run, write


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system can be mounted by root only, and not in every container")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def big_source(folder: Path, ending: str, count: int) -> Path:
    """Incompressible images of about 0.5 MB each."""
    for number in range(count):
        voxels = np.random.default_rng(number).normal(size=(50, 50, 50)).astype(np.float32)
        write(folder / f"noise_{number}{ending}", voxels)
    return folder


def test_a_disk_that_is_too_small_is_seen_before_writing(tmp_path: Path, small_disk: Path) -> None:
    images = big_source(tmp_path / "big", ".nii.gz", 20)
    plan = FolderConverter().plan(images, None, None, "CT", "Noise")
    progress: list[int] = []
    with pytest.raises(
        BadInputError, match=r"disk of .* is full: Dataset001_Noise needs about .* MiB, 8\.0 MiB are free"
    ):
        convert(
            plan,
            dataset_id=1,
            workspace=Workspace.locate(small_disk),
            workers=1,
            progress=lambda done, total: progress.append(done),
        )
    assert progress == []
    assert [path for path in small_disk.rglob("*") if path.name != "nnUNet_raw"] == []


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
def test_a_disk_that_fills_up_while_writing(tmp_path: Path, small_disk: Path, ending: str) -> None:
    images = big_source(tmp_path / "big", ending, 12)
    plan = FolderConverter().plan(images, None, None, "CT", "Noise")

    def somebody_else_writes(done: int, total: int) -> None:
        if done == 1:
            with (small_disk / "somebody_elses").open("wb", buffering=0) as file:
                while file.write(bytes(4096)) == 4096:
                    pass

    def fill(done: int, total: int) -> None:
        try:
            somebody_else_writes(done, total)
        except OSError:
            return

    with pytest.raises(BadInputError, match=r"disk of .* is full.* Nothing was written\."):
        convert(plan, dataset_id=1, workspace=Workspace.locate(small_disk), workers=1, progress=fill)
    assert sorted(path.name for path in small_disk.rglob("*")) == ["nnUNet_raw", "somebody_elses"]


def test_a_data_set_on_another_file_system_is_copied(run: Run, source: Path, small_disk: Path) -> None:
    plan = FolderConverter().plan(source / "images", source / "labels", source / "labels.json", "CT", "Liver")
    report = convert(plan, dataset_id=1, workspace=Workspace.locate(small_disk), workers=2)
    assert report.files == {"copied": 4}
