"""Body coordinates of a whole scan, by a pretrained network: sliding window, then the scan's own grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

from diffseg_nnunet.coordinates.grids import ScanGrid, as_vector_image, resampled
from diffseg_nnunet.coordinates.positions import UNIT_MM, case_to_patient
from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.inference.preprocessing import preprocess_case
from diffseg_nnunet.inference.pretrained import PretrainedModel
from diffseg_nnunet.raw_dataset import Case
from diffseg_nnunet.training.precision import autocast, float_format

_OVERLAP = 0.5
_WINDOWS_AT_ONCE = {2: 16, 3: 1}


def require_coordinates(model: PretrainedModel) -> None:
    """Raises BadInputError if the network was pretrained without coordinates."""
    if model.settings.coordinates.mode == "none":
        raise BadInputError(
            "This network was pretrained with `--coordinates none`: it does not know where in the body a voxel lies.",
            "Pretrain with coordinates (`diffseg pretrain ID --coordinates auxiliary`), or give another --checkpoint.",
        )


def predict_coordinates(model: PretrainedModel, images: Path | Sequence[Path]) -> sitk.Image:
    """The body coordinates of one scan, for each voxel of its own grid.

    Args:
        model: pretrained with coordinates.
        images: files of the scan, one a channel, in channel order.

    Returns:
        A vector image (float32, three components) with the geometry of the first file: mm along the patient's left,
        posterior and superior (LPS), up to an offset common to all scans of the model. ``sitk.GetArrayFromImage`` gives
        it as (z, y, x, 3).

    Raises:
        BadInputError: the network has no coordinates, or the scan cannot be read or has no 3D direction cosines.
        StageFailedError: the network returns NaN.
    """
    require_coordinates(model)
    files = (Path(images),) if isinstance(images, str | Path) else tuple(Path(path) for path in images)
    _refuse_flat(files[0])
    case = Case(files[0].name, files, None)
    data, _, properties = preprocess_case(case, model.plans, model.configuration, model.dataset_json)
    matrix = case_to_patient(properties, model.plans.transpose_forward, data.shape[1:])
    if matrix is None:
        raise _without_directions(files[0])
    values = preprocessed_coordinates(model, data).numpy()
    return resampled(as_vector_image(values, matrix), ScanGrid.of_file(files[0]))


@torch.inference_mode()
def preprocessed_coordinates(model: PretrainedModel, data: np.ndarray) -> Tensor:
    """Coordinates in mm of each voxel of a preprocessed scan, (C, z, y, x) -> (3, z, y, x), float32 on the CPU.

    Windows of the pretraining's patch size overlap by half, and their middle counts most (a Gaussian, as nnU-Net's).

    Raises:
        StageFailedError: a coordinate is not finite.
    """
    scan = torch.from_numpy(np.ascontiguousarray(data, np.float32))
    flat = len(model.patch_size) == 2
    # a 2D network reads the slices as a batch
    batch = scan.movedim(1, 0) if flat else scan[None]
    with autocast(model.device, float_format(model.device)):
        dense = sliding_window_inference(
            batch,
            model.patch_size,
            _WINDOWS_AT_ONCE[len(model.patch_size)],
            lambda window: model.assembly.coordinate_map(window).float(),
            overlap=_OVERLAP,
            mode="gaussian",
            sw_device=model.device,
            device=torch.device("cpu"),
        )
    if not torch.isfinite(dense).all():
        raise StageFailedError("The network's coordinates are not finite.", "Pretrain it again with a lower rate.")
    return (dense.movedim(0, 1) if flat else dense[0]) * UNIT_MM


def _refuse_flat(path: Path) -> None:
    try:
        flat = len(ScanGrid.of_file(path).size) < 3
    except RuntimeError:  # what is wrong with the file is said where it is checked
        return
    if flat:
        raise _without_directions(path)


def _without_directions(path: Path) -> BadInputError:
    return BadInputError(
        f"{path} has no 3D direction cosines, so its voxels have no place in the body.",
        "Give 3D scans in a format that keeps them, such as NIfTI.",
    )
