"""A full disk ends a command with a message, leaves nothing half-written, and the same command goes on once there is
room. SimpleITK reports success on a full disk and torch a RuntimeError, so this needs a real one: a small tmpfs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.pipeline.conftest import TinyProject

pytestmark = pytest.mark.pipeline

Resize = Callable[[str], None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Resize]]:
    """A file system of its own, and how to size it; skipped where it may not be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root and its permission")

    def resize(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)

    try:
        yield folder, resize
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_convert(planned_project: TinyProject, disk: tuple[Path, Resize]) -> None:
    folder, resize = disk
    resize("300k")
    source = planned_project.folder / "phantom"
    command = ("convert", "folder", "--images", source / "unlabelled_images", "--modality", "CT", "--id", 9)
    command = (*command, "--name", "Full", "--workspace", folder)
    planned_project.diffseg(*command).refused(f"The disk of {folder}", "is full", "Nothing was written", "Free some")
    assert [path for path in folder.rglob("*") if path.name != "nnUNet_raw"] == []
    resize("64m")
    planned_project.diffseg(*command).ok()


def test_predict(project: TinyProject, disk: tuple[Path, Resize]) -> None:
    folder, resize = disk
    resize("8k")
    output = folder / "out"
    command = ("predict", "-d", 1, "-i", project.test_images, "-o", output, "--no-mirroring")
    first = min(project.test_images.iterdir()).name.replace("_0000", "")
    project.diffseg(*command).refused(f"The disk is full: {output / first} could not be written", "Free some space")
    assert [path.name for path in output.glob("[!.]*")] == ["diffseg_prediction.json"]
    resize("64m")
    project.diffseg(*command).ok()
    assert len(list(output.glob("*.nii.gz"))) == 2


def test_pretrain(project: TinyProject, disk: tuple[Path, Resize]) -> None:
    folder, resize = disk
    results = folder / project.name
    results.mkdir()
    shutil.copy(project.results / "diffseg_run.json", results)
    checkpoint = results / project.pretrained().relative_to(project.results) / "checkpoint_latest.pth"
    resize("2m")

    def pretrain():
        return project.diffseg("pretrain", 1, "--iterations", 3, nnUNet_results=folder)

    pretrain().refused(f"The disk is full: {checkpoint} could not be written", "run the same command again")
    assert not list(results.rglob("*.pth"))
    assert not list(results.rglob(".partial-*"))
    resize("64m")
    pretrain().ok()
    assert checkpoint.with_name("checkpoint_final.pth").is_file()


def test_preprocess(planned_project: TinyProject, disk: tuple[Path, Resize]) -> None:
    project, (folder, resize) = planned_project, disk
    shutil.copytree(project.preprocessed, folder / project.name)
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    references = sum(path.stat().st_size for path in (project.raw / "labelsTr").iterdir())
    resize(f"{(used + references) // 1024 + 200}k")

    def preprocess():
        return project.diffseg("preprocess", 1, "-c", "3d_fullres", nnUNet_preprocessed=folder)

    preprocess().refused("The disk is full", "could not be written", "run the same command again")
    assert not list(folder.rglob(".partial-*"))
    resize("64m")
    preprocess().ok()
    assert len(list(folder.rglob("phantom_*.pkl"))) == 10
