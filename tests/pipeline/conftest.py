"""One tiny project of the phantom, taken through the stages by real commands once a run; tests work on copies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import SimpleITK as sitk

from diffseg_nnunet import phantom
from diffseg_nnunet.phantom import write_phantom

if TYPE_CHECKING:
    from tests.conftest import CommandLine, MadeOnce

LABELLED, UNLABELLED, TEST = 6, 4, 2
LABELS = {"background": 0, "lungs": 1, "left_kidney": 2, "right_kidney": 3}
"""Few, since selection scores every label in processes of its own; a pair, so that mirroring is restricted."""
LIGHT = ("--backbone", "plain", "--base-features", 8, "--gpu-memory", 1, "--spacing", 14, 14, 14)
PRETRAIN_ITERATIONS, ITERATIONS = 20, 20


@dataclass(frozen=True)
class TinyProject:
    """The data set 1, with labels, and the data set 2, its unlabelled pool, in the default workspace of a folder.

    Attributes:
        diffseg: the command line in that folder.
    """

    diffseg: CommandLine

    light_plan = LIGHT
    name = "Dataset001_Phantom"
    pool_name = "Dataset002_Pool"

    @property
    def folder(self) -> Path:
        return self.diffseg.folder

    @property
    def workspace(self) -> Path:
        return self.folder / "diffseg_workspace"

    @property
    def raw(self) -> Path:
        return self.workspace / "nnUNet_raw" / self.name

    @property
    def preprocessed(self) -> Path:
        return self.workspace / "nnUNet_preprocessed" / self.name

    @property
    def results(self) -> Path:
        return self.workspace / "nnUNet_results" / self.name

    @property
    def test_images(self) -> Path:
        return self.raw / "imagesTs"

    def model(self, trainer: str, configuration: str = "3d_fullres") -> Path:
        return self.results / f"{trainer}__DiffSegPlans__{configuration}"

    def pretrained(self, configuration: str = "3d_fullres", fold: int | str = 0) -> Path:
        """The folder of a pretraining."""
        return self.model("DiffSegPretrainer", configuration) / f"fold_{fold}"

    def trained(self, configuration: str = "3d_fullres", fold: int | str = 0) -> Path:
        """The folder of a fine-tuning."""
        return self.model("DiffSegTrainer", configuration) / f"fold_{fold}"

    def manifest(self) -> dict[str, Any]:
        return json.loads((self.results / "diffseg_run.json").read_text())

    def stage(self, name: str) -> dict[str, Any]:
        return self.manifest()["stages"][name]

    def splits(self) -> list[dict[str, list[str]]]:
        return json.loads((self.preprocessed / "splits_final.json").read_text())

    def nnunet_variables(self) -> dict[str, Path | int]:
        """What stock nnU-Net's commands need, with few processes."""
        paths = {name: self.workspace / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        return {**paths, "nnUNet_n_proc_DA": 1, "nnUNet_def_n_proc": 1, "OMP_NUM_THREADS": 1}

    def do(self, *lines: Sequence[object]) -> None:
        """Run command lines, none of which may fail, in one process."""
        for finished in self.diffseg.in_one_process(lines):
            finished.ok()

    def copy(self, folder: Path) -> TinyProject:
        """The same project elsewhere; times of modification are kept, so that nothing seems changed."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return TinyProject(type(self.diffseg)(folder))


class Recorder:
    """A reporter that keeps its warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def info(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, stage: str, done: int, total: int, news: str = "") -> None: ...


@pytest.fixture(scope="session")
def planned(made_once: MadeOnce, command_line: Callable[[Path], CommandLine]) -> TinyProject:
    """Converted and planned. Never changed: take a copy."""

    def make(folder: Path) -> None:
        project, source = TinyProject(command_line(folder)), folder / "phantom"
        write_phantom(source, LABELLED, UNLABELLED, TEST)
        _keep_few_labels(source)
        convert, common = ("convert", "folder", "--images"), ("--modality", "CT", "--copy")
        labels = ("--labels", source / "labels", "--label-names", source / "labels.json")
        project.do(
            (*convert, source / "images", *labels, "--id", 1, "--name", "Phantom", *common),
            (*convert, source / "unlabelled_images", "--id", 2, "--name", "Pool", *common),
            ("plan", 1, *LIGHT, "--unlabeled", 2),
        )
        project.test_images.mkdir()
        for path in (source / "test_images").iterdir():
            shutil.copy(path, project.test_images / path.name.replace(".nii.gz", "_0000.nii.gz"))

    return TinyProject(command_line(made_once("planned", make)))


def _keep_few_labels(source: Path) -> None:
    table = np.zeros(max(phantom.LABELS.values()) + 1, np.uint8)
    for name, value in LABELS.items():
        table[phantom.LABELS[name]] = value
    for path in (source / "labels").iterdir():
        label = sitk.ReadImage(str(path))
        few = sitk.GetImageFromArray(table[sitk.GetArrayFromImage(label)])
        few.CopyInformation(label)
        sitk.WriteImage(few, str(path))
    (source / "labels.json").write_text(json.dumps(LABELS))


@pytest.fixture(scope="session")
def trained(planned: TinyProject, made_once: MadeOnce, command_line: Callable[[Path], CommandLine]) -> TinyProject:
    """Preprocessed, pretrained and fine-tuned in 3d_fullres, fold 0. Never changed: take a copy."""

    def make(folder: Path) -> None:
        planned.copy(folder).do(
            ("preprocess", 1, "-c", "3d_fullres"),
            ("pretrain", 1, "--iterations", PRETRAIN_ITERATIONS, "--seed", 7),
            ("train", 1, "--iterations", ITERATIONS, "--optimizer", "adamw", "--seed", 7),
        )

    return TinyProject(command_line(made_once("trained", make)))


@pytest.fixture
def project(trained: TinyProject, tmp_path: Path) -> TinyProject:
    """A copy of the trained project."""
    return trained.copy(tmp_path)


@pytest.fixture
def planned_project(planned: TinyProject, tmp_path: Path) -> TinyProject:
    """A copy of the planned project."""
    return planned.copy(tmp_path)
