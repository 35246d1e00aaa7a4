"""Data sets of which only the fingerprint exists: what planning needs, and nothing to train on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import SimpleITK as sitk

from diffseg_nnunet.atomic import write_json
from diffseg_nnunet.workspace import Workspace


@dataclass(frozen=True)
class Fingerprint:
    """What planning reads of a data set.

    Attributes:
        name: for tables.
        spacing, shape: of every case, mm and voxels, array order.
        cases: with labels.
        classes: foreground ones.
        channels: of the image.
        modality: of all channels.
    """

    name: str
    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]
    cases: int
    classes: int
    channels: int = 1
    modality: str = "CT"


HIPPOCAMPUS = Fingerprint("hippocampus", (1.0, 1.0, 1.0), (36, 50, 35), 260, 2, modality="MRI")
BTCV_3MM = Fingerprint("BTCV_3mm", (3.0, 3.0, 3.0), (146, 108, 108), 14, 13)
FLARE22 = Fingerprint("like FLARE22", (2.5, 0.74, 0.74), (97, 512, 512), 50, 13)


@contextmanager
def workspace_of(fingerprint: Fingerprint) -> Iterator[tuple[Workspace, str]]:
    """A temporary workspace with the data set's description and fingerprint; gives it and the data set's name.

    nnU-Net's variables are those of the workspace meanwhile.
    """
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(("nnUNet_", "DIFFSEG_"))}
    try:
        with TemporaryDirectory(prefix="diffseg_plans_") as folder:
            workspace = Workspace.locate(Path(folder)).activate()
            dataset = "Dataset001_Planned"
            write(workspace, dataset, fingerprint)
            yield workspace, dataset
    finally:
        for name in [name for name in os.environ if name.startswith("nnUNet_")]:
            del os.environ[name]
        os.environ.update(kept)


def write(workspace: Workspace, dataset: str, fingerprint: Fingerprint) -> None:
    """The files: dataset.json, one tiny case, which tells the reader and the direction, and the fingerprint."""
    raw = workspace.raw / dataset
    _write_image(raw / "labelsTr" / "case.nii.gz", np.zeros((8, 8, 8), np.uint8), fingerprint.spacing)
    for channel in range(fingerprint.channels):
        image = np.zeros((8, 8, 8), np.float32)
        _write_image(raw / "imagesTr" / f"case_{channel:04d}.nii.gz", image, fingerprint.spacing)
    labels = {"background": 0} | {f"structure_{value}": value for value in range(1, fingerprint.classes + 1)}
    channels = {str(channel): fingerprint.modality for channel in range(fingerprint.channels)}
    write_json(
        raw / "dataset.json",
        {"channel_names": channels, "labels": labels, "numTraining": fingerprint.cases, "file_ending": ".nii.gz"},
    )
    intensities = {"mean": 0.0, "median": 0.0, "std": 1.0, "min": -1.0, "max": 1.0}
    intensities |= {"percentile_99_5": 1.0, "percentile_00_5": -1.0}
    content: Mapping[str, Any] = {
        "spacings": [list(fingerprint.spacing)] * fingerprint.cases,
        "shapes_after_crop": [list(fingerprint.shape)] * fingerprint.cases,
        "foreground_intensity_properties_per_channel": dict.fromkeys(channels, intensities),
        "median_relative_size_after_cropping": 1.0,
    }
    (workspace.preprocessed / dataset).mkdir(parents=True, exist_ok=True)
    write_json(workspace.preprocessed / dataset / "dataset_fingerprint.json", content)


def _write_image(path: Path, voxels: np.ndarray, spacing: Sequence[float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing([float(mm) for mm in spacing[::-1]])
    sitk.WriteImage(image, str(path))
