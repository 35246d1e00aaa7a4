"""Coordinates of whole scans, by a regressor that needs no training: images whose voxels hold their own position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from diffseg_nnunet.coordinates.head import CoordinateSettings
from diffseg_nnunet.coordinates.positions import UNIT_MM
from diffseg_nnunet.diffusion.conditioning import TimeConditioning
from diffseg_nnunet.diffusion.gaussian import DiffusionSettings, GaussianDiffusion
from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.inference.coordinates import predict_coordinates, preprocessed_coordinates
from diffseg_nnunet.inference.pretrained import PretrainedModel
from diffseg_nnunet.training.assembly import Assembly
from diffseg_nnunet.training.objective import Denoiser
from diffseg_nnunet.training.settings import PretrainingSettings

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (14, 17, 12)  # x, y, z
RIM = 2  # voxels of value 0 around, which nnU-Net crops
OFFSET_MM = np.array([30.0, -20.0, 110.0])
TILTED = Rotation.from_euler("xyz", [8, -13, 21], degrees=True).as_matrix()
TURNED = Rotation.from_euler("xyz", [75, 20, -130], degrees=True).as_matrix()
MODES: dict[str, tuple[np.ndarray, tuple[int, ...], list[float], tuple[int, ...]]] = {
    "straight": (np.eye(3), (0, 1, 2), [3.0, 2.0, 1.5], (6, 6, 8)),
    "tilted, resampled": (TILTED, (0, 1, 2), [2.4, 1.6, 1.2], (4, 6, 8)),
    "turned, transposed": (TURNED, (2, 0, 1), [1.2, 2.4, 1.6], (6, 4, 4)),
    "patch beyond the scan": (np.diag([-1.0, -1.0, 1.0]), (1, 2, 0), [1.6, 1.2, 2.4], (24, 10, 30)),
    "slice by slice": (np.diag([-1.0, 1.0, -1.0]), (0, 1, 2), [2.3, 1.4], (6, 8)),
    "slice by slice, transposed": (np.eye(3), (1, 0, 2), [2.0, 1.7], (4, 24)),
}
"""Direction cosines, transposition, spacing in transposed axes, patch size."""


class ReadsItsPlace(nn.Module):
    """The three channels of a ramp are the position in mm; elsewhere, away from the gauge of the scanner."""

    def forward(self, clean: Tensor) -> Tensor:
        offset = torch.as_tensor(OFFSET_MM, dtype=clean.dtype).reshape(1, 3, *(1,) * (clean.ndim - 2))
        return (clean + offset) / UNIT_MM


class ReturnsNaN(nn.Module):
    def forward(self, clean: Tensor) -> Tensor:
        return clean * torch.nan


def model_of(
    regressor: nn.Module, transpose_forward: tuple[int, ...], spacing: list[float], patch_size: tuple[int, ...]
) -> PretrainedModel:
    """A model in guidance's mode, with plans that neither normalise nor smooth."""
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": False}
    configuration: dict[str, Any] = {
        "data_identifier": "ramps",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch_size),
        "spacing": spacing,
        "normalization_schemes": ["NoNormalization"] * 3,
        "use_mask_for_norm": [False] * 3,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True},
        "architecture": {},
    }
    plans = {
        "dataset_name": "Dataset001_Ramps",
        "plans_name": "ramps",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(transpose_forward),
        "transpose_backward": np.argsort(transpose_forward).tolist(),
        "foreground_intensity_properties_per_channel": {str(channel): {} for channel in range(3)},
        "configurations": {"ramps": configuration},
    }
    manager = PlansManager(plans)
    network = nn.Identity()
    denoiser = Denoiser(
        network, TimeConditioning(nn.Sequential(nn.BatchNorm3d(1))), GaussianDiffusion(DiffusionSettings()), regressor
    )
    return PretrainedModel(
        assembly=Assembly(denoiser, None, None),
        settings=PretrainingSettings(coordinates=CoordinateSettings(mode="guidance")),
        plans=manager,
        configuration=manager.get_configuration("ramps"),
        configuration_name="ramps",
        dataset_json={"channel_names": {"0": "x", "1": "y", "2": "z"}, "file_ending": ".nii.gz"},
        channels=3,
        patch_size=patch_size,
        pool={},
        device=torch.device("cpu"),
    )


def ramps(folder: Path, direction: np.ndarray) -> tuple[list[Path], np.ndarray, np.ndarray]:
    """Files of three channels, the position (z, y, x, 3) of each voxel, and which are not in the rim."""
    header = sitk.Image(SIZE, sitk.sitkFloat32)
    header.SetSpacing((1.5, 2.0, 3.0))
    header.SetOrigin((-120.0, 340.0, 75.0))
    header.SetDirection(direction.ravel().tolist())
    places = np.array(
        [
            [[header.TransformIndexToPhysicalPoint((x, y, z)) for x in range(SIZE[0])] for y in range(SIZE[1])]
            for z in range(SIZE[2])
        ]
    )
    inner = np.zeros(SIZE[::-1], bool)
    inner[RIM:-RIM, RIM:-RIM, RIM:-RIM] = True
    files = []
    for channel in range(3):
        image = sitk.GetImageFromArray(np.where(inner, places[..., channel], 0).astype(np.float32))
        image.CopyInformation(header)
        files.append(folder / f"ramp_{channel:04d}.nii.gz")
        sitk.WriteImage(image, str(files[-1]))
    return files, places, inner


@pytest.mark.parametrize("mode", MODES)
def test_each_voxel_of_the_scan_gets_the_coordinate_predicted_for_its_place(mode: str, tmp_path: Path) -> None:
    direction, transpose_forward, spacing, patch_size = MODES[mode]
    files, places, inner = ramps(tmp_path, direction)
    model = model_of(ReadsItsPlace(), transpose_forward, spacing, patch_size)

    image = predict_coordinates(model, files)
    scan = sitk.ReadImage(str(files[0]))
    assert image.GetPixelID() == sitk.sitkVectorFloat32
    assert image.GetNumberOfComponentsPerPixel() == 3
    for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(image, geometry)() == getattr(scan, geometry)()
    values = sitk.GetArrayFromImage(image)
    # one voxel less: at the crop's faces nnU-Net repeats the outermost value
    exact = np.zeros_like(inner)
    exact[RIM + 1 : -RIM - 1, RIM + 1 : -RIM - 1, RIM + 1 : -RIM - 1] = True
    np.testing.assert_allclose(values[exact], (places + OFFSET_MM)[exact], atol=0.02)
    assert np.isfinite(values).all()


def test_a_map_that_is_not_finite_is_refused() -> None:
    model = model_of(ReturnsNaN(), (0, 1, 2), [1.0, 1.0, 1.0], (4, 4, 4))
    with pytest.raises(StageFailedError, match="not finite"):
        preprocessed_coordinates(model, np.zeros((3, 6, 6, 6), np.float32))


def test_a_flat_image_has_no_place_in_the_body(tmp_path: Path) -> None:
    model = model_of(ReadsItsPlace(), (0, 1, 2), [1.0, 1.0], (4, 4))
    path = tmp_path / "flat_0000.png"
    sitk.WriteImage(sitk.GetImageFromArray(np.arange(30, dtype=np.uint8).reshape(5, 6)), str(path))
    with pytest.raises(BadInputError, match=r"flat_0000.png has no 3D direction cosines.*NIfTI"):
        predict_coordinates(model, path)


def test_a_scan_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    model = model_of(ReadsItsPlace(), (0, 1, 2), [1.0, 1.0, 1.0], (4, 4, 4))
    files, _, _ = ramps(tmp_path, np.eye(3))
    files[1].write_bytes(files[1].read_bytes()[:200])
    with pytest.raises(BadInputError, match=r"ramp_0001.nii.gz cannot be used"):
        predict_coordinates(model, files)
    with pytest.raises(BadInputError, match=r"has 1 image\(s\), the data set 3 channel"):
        predict_coordinates(model, files[0])
