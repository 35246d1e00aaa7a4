"""Where a voxel of the preprocessed array lies in the patient, in mm.

nnU-Net transposes, crops, and resamples; all three are affine, so one 3×4 matrix per case maps an index of the
preprocessed array to a position in the patient's left–posterior–superior frame (SimpleITK's).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

UNIT_MM = 300.0
"""Coordinates are given in fractions of 300 mm, so that they are of order one for every body."""


@dataclass(frozen=True)
class ArrayGeometry:
    """Geometry of the array as read from the file, axes in SimpleITK's array order (z, y, x).

    Attributes:
        spacing: mm, one per array axis.
        origin: mm, LPS position of voxel (0, 0, 0), order x, y, z.
        direction: (3, 3); column k is the unit vector of *image* axis k (x, y, z), as in SimpleITK.
    """

    spacing: Sequence[float]
    origin: Sequence[float]
    direction: np.ndarray

    def index_to_patient(self) -> np.ndarray:
        """(3, 4) float64: position in mm = M[:, :3] @ (z, y, x) + M[:, 3]."""
        per_image_axis = np.asarray(self.direction, float).reshape(3, 3) * np.asarray(self.spacing, float)[::-1]
        return np.column_stack([per_image_axis[:, ::-1], np.asarray(self.origin, float)])


def preprocessed_to_patient(
    geometry: ArrayGeometry,
    transpose_forward: Sequence[int],
    crop_start: Sequence[int],
    cropped_shape: Sequence[int],
    preprocessed_shape: Sequence[int],
) -> np.ndarray:
    """The (3, 4) matrix from an index of the preprocessed array to a position in mm (LPS).

    Args:
        geometry: of the file's array.
        transpose_forward: nnU-Net's; preprocessed axis k is array axis transpose_forward[k].
        crop_start: first voxel kept by the crop to non-zero, in transposed axes.
        cropped_shape: shape after the crop and before resampling, transposed axes.
        preprocessed_shape: shape after resampling, transposed axes.

    The resampling aligns the outer faces of the two grids (scikit-image's ``resize``): voxel i of n covers
    [i, i+1) / n of the field of view, hence the half voxels.
    """
    scale = np.asarray(cropped_shape, float) / np.asarray(preprocessed_shape, float)
    offset = 0.5 * scale - 0.5 + np.asarray(crop_start, float)
    matrix = geometry.index_to_patient()
    linear_transposed = matrix[:, :3][:, list(transpose_forward)]
    return np.column_stack([linear_transposed * scale, linear_transposed @ offset + matrix[:, 3]])


def case_to_patient(
    properties: dict, transpose_forward: Sequence[int], preprocessed_shape: Sequence[int]
) -> np.ndarray | None:
    """:func:`preprocessed_to_patient` of a preprocessed case, None if its file carried no direction cosines (2D PNG).

    Args:
        properties: what nnU-Net's preprocessing recorded of it.
        transpose_forward, preprocessed_shape: as there.
    """
    geometry = geometry_from_properties(properties)
    if geometry is None:
        return None
    return preprocessed_to_patient(
        geometry,
        transpose_forward,
        [start for start, _ in properties["bbox_used_for_cropping"]],
        properties["shape_after_cropping_and_before_resampling"],
        preprocessed_shape,
    )


def geometry_from_properties(properties: dict) -> ArrayGeometry | None:
    """The geometry in the properties of a preprocessed case, None if the file carried no direction cosines (2D PNG).

    Reads what nnU-Net's SimpleITK and NIfTI readers record.
    """
    if (record := properties.get("sitk_stuff")) is not None:
        direction = np.asarray(record["direction"], float)
        if direction.size != 9:
            return None
        return ArrayGeometry(properties["spacing"], record["origin"], direction.reshape(3, 3))
    if (record := properties.get("nibabel_stuff")) is not None:
        # nibabel's affine is RAS and its array (after nnU-Net's reader) runs z, y, x
        ras = np.asarray(record.get("reoriented_affine", record["original_affine"]))
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ ras
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        return ArrayGeometry(spacing[::-1], affine[:3, 3], affine[:3, :3] / spacing)
    return None
