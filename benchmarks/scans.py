"""Held-out scans as a pretrained network sees them: preprocessed by its plan, placed in mm, cut into windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import SimpleITK as sitk
import torch
from abdomen import HeldOut
from numpy.typing import NDArray
from scipy import ndimage

from diffseg_nnunet.coordinates.positions import UNIT_MM, geometry_from_properties, preprocessed_to_patient
from diffseg_nnunet.inference.pretrained import PretrainedModel

BODY_FROM_HU = {"BTCV": -110.0, "OpenKBP": -500.0}
"""BTCV's scans are cut to the window -125 ... 275 HU, where air has the lowest value and fat lies just above it."""
_OPENING = 2  # voxels: takes the body off the table

Window = tuple[slice, ...]


@dataclass(frozen=True)
class Scan:
    """A preprocessed scan.

    Attributes:
        case: its name.
        voxels: float32 (C, z, y, x), normalised.
        matrix: (3, 4), mm = matrix[:, :3] @ index + matrix[:, 3], in the patient's left-posterior-superior frame.
        labels: of the voxels, (z, y, x); None where the scan has none.
    """

    case: str
    voxels: NDArray[np.float32]
    matrix: NDArray[np.float64]
    labels: NDArray | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.voxels.shape[1:]

    def to_mm(self, index: NDArray) -> NDArray[np.float64]:
        """(N, 3) -> (N, 3)"""
        return index @ self.matrix[:, :3].T + self.matrix[:, 3]

    def to_index(self, mm: NDArray) -> NDArray[np.float64]:
        """The inverse of :meth:`to_mm`."""
        return np.linalg.solve(self.matrix[:, :3], (mm - self.matrix[:, 3]).T).T

    @cached_property
    def left_axis(self) -> int:
        """The array axis that runs along the patient's left-right."""
        return int(np.abs(self.matrix[0, :3]).argmax())

    def centroid(self, label: int) -> NDArray[np.float64]:
        """The index of a structure's centre of mass, shape (3,)."""
        return np.argwhere(self.labels == label).mean(axis=0)


def read_scan(model: PretrainedModel, held_out: HeldOut) -> Scan:
    """Preprocess a scan as the model's plan says, and its labels with it."""
    label = None if held_out.label is None else str(held_out.label)
    preprocessor = model.configuration.preprocessor_class(verbose=False)
    voxels, labels, properties = preprocessor.run_case(
        [str(held_out.image)], label, model.plans, model.configuration, model.dataset_json
    )
    matrix = preprocessed_to_patient(
        geometry_from_properties(properties),
        model.plans.transpose_forward,
        [start for start, _ in properties["bbox_used_for_cropping"]],
        properties["shape_after_cropping_and_before_resampling"],
        voxels.shape[1:],
    )
    return Scan(held_out.case, np.asarray(voxels, np.float32), matrix, None if label is None else np.asarray(labels[0]))


def body_points(held_out: HeldOut, from_hu: float) -> NDArray[np.float64]:
    """Positions of the body's voxels in mm, (N, 3): the largest component from a HU value on."""
    image = sitk.ReadImage(str(held_out.image))
    body = largest_component(sitk.GetArrayFromImage(image) > from_hu)
    index = np.argwhere(body)[:, ::-1]
    direction = np.asarray(image.GetDirection()).reshape(3, 3)
    return (index * np.asarray(image.GetSpacing())) @ direction.T + np.asarray(image.GetOrigin())


def largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest connected part of an opened mask."""
    opened = ndimage.binary_opening(mask, iterations=_OPENING)
    parts, count = ndimage.label(opened)
    if count == 0:
        return mask
    sizes = np.bincount(parts.ravel())
    return parts == sizes[1:].argmax() + 1


def span(centre: float, size: int, low: int, high: int) -> slice:
    """`size` voxels around a centre, moved into low ... high, or cut to it."""
    size = min(size, high - low)
    start = int(np.clip(round(centre - (size - 1) / 2), low, high - size))
    return slice(start, start + size)


def window(centre: Sequence[float], size: Sequence[int], shape: Sequence[int]) -> Window:
    """The box of `size` around a voxel, moved into the scan, or cut to it."""
    return tuple(span(c, s, 0, n) for c, s, n in zip(centre, size, shape, strict=True))


def inside(index: NDArray, box: Window) -> NDArray[np.bool_]:
    """Which of the points (N, 3) lie within a box."""
    low, high = (np.array([getattr(part, end) for part in box]) for end in ("start", "stop"))
    return ((index >= low) & (index <= high - 1)).all(axis=1)


def padded(voxels: NDArray, size: Sequence[int]) -> tuple[NDArray, Window]:
    """Pad (C, ...) with zeros to `size`, as nnU-Net's loader does, and say where the voxels came to lie."""
    missing = [s - n for s, n in zip(size, voxels.shape[1:], strict=True)]
    margins = [(gap // 2, gap - gap // 2) for gap in missing]
    place = tuple(slice(low, low + n) for (low, _), n in zip(margins, voxels.shape[1:], strict=True))
    return np.pad(voxels, [(0, 0), *margins]), place


def stride(model: PretrainedModel) -> tuple[int, ...]:
    """By what the sides of the network's input must be divisible."""
    return tuple(int(n) for n in np.prod(model.configuration.pool_op_kernel_sizes, axis=0))


def rounded_to(size: Sequence[float], divisor: Sequence[int], up: bool = True) -> tuple[int, ...]:
    """Multiples of the divisor, at least one of it."""
    rounding = np.ceil if up else np.floor
    return tuple(max(1, int(rounding(s / d))) * d for s, d in zip(size, divisor, strict=True))


@torch.no_grad()
def coordinates_mm(
    model: PretrainedModel, scan: Scan, box: Window, size: Sequence[int], index: NDArray
) -> NDArray[np.float64]:
    """The coordinates the network gives to places of a window of a clean scan, in its own mm: (N, 3) -> (N, 3).

    Args:
        box: what the network sees.
        size: of its input; the box is padded to it.
        index: places in the scan, within the box, interpolated linearly.
    """
    voxels, place = padded(scan.voxels[(slice(None), *box)], size)
    dense = model.assembly.coordinate_map(torch.from_numpy(voxels)[None].to(model.device))
    offset = np.array([part.start for part in place]) - np.array([part.start for part in box])
    where = (index + offset).T
    maps = dense[0].float().cpu().numpy() * UNIT_MM
    read = [ndimage.map_coordinates(each, where, order=1, mode="nearest") for each in maps]
    return np.stack(read, axis=1).astype(np.float64)
