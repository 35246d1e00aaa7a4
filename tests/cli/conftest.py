"""A small source of images and labels as plain folders, and the same as a hand-made raw data set, to be broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import SimpleITK as sitk

if TYPE_CHECKING:
    from tests.conftest import CommandLine

CASES = ("a", "b", "c")
LABELS = {"background": 0, "organ": 1}


class Source:
    """Images and labels of three cases in `folder`; the case 'b' is the one that tests break."""

    def __init__(self, folder: Path):
        self.images, self.labels, self.names = folder / "images", folder / "labels", folder / "labels.json"
        self.broken_image, self.broken_label = self.images / "b.nii.gz", self.labels / "b.nii.gz"
        rng = np.random.default_rng(0)
        for path in (self.images, self.labels):
            path.mkdir(parents=True)
        for case in CASES:
            self.write(self.images / f"{case}.nii.gz", rng.normal(size=(10, 9, 8)).astype(np.float32))
            self.write(self.labels / f"{case}.nii.gz", rng.integers(0, 2, (10, 9, 8)).astype(np.uint8))
        self.names.write_text(json.dumps(LABELS))

    @staticmethod
    def write(path: Path, array: np.ndarray, **geometry: tuple[float, ...]) -> None:
        """A volume of 2 mm voxels, unless Spacing, Origin or Direction say otherwise."""
        image = sitk.GetImageFromArray(array, isVector=False)
        image.SetSpacing([2.0] * image.GetDimension())
        for name, value in geometry.items():
            getattr(image, f"Set{name}")(value)
        sitk.WriteImage(image, str(path))

    def as_raw_data_set(self, folder: Path) -> None:
        """The same files as nnU-Net's raw data set, without any of our converters' checks."""
        for name in ("imagesTr", "labelsTr"):
            (folder / name).mkdir(parents=True)
        for path in self.images.iterdir():
            shutil.copy(path, folder / "imagesTr" / path.name.replace(".nii.gz", "_0000.nii.gz"))
        for path in self.labels.iterdir():
            shutil.copy(path, folder / "labelsTr")
        content = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": 3, "file_ending": ".nii.gz"}
        (folder / "dataset.json").write_text(json.dumps(content))


@pytest.fixture
def source(diffseg: CommandLine) -> Source:
    return Source(diffseg.folder / "source")
