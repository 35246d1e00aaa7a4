"""Where voxels lie: grids in mm, how far two of them differ, and which way they face in the patient."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import SimpleITK as sitk

TOLERANCE_MM = 1e-3
TOLERANCE_DIRECTION = 1e-3
# nnU-Net's reader (channels) and integrity check (labels) stop where spacings differ by more than numpy.allclose allows
TOLERANCE_SPACING_RELATIVE = 1e-5
# Grids of one size whose voxels of one index lie nearer to each other than half a voxel are the same to resampling by
# nearest neighbours: taking over the other's header is then the whole repair. Half of that half is allowed, summed over
# origin, spacing and direction at the farthest corner: headers rounded to four digits stay below 0.1 on 512 voxels,
# while the commonest real error, origins that mean a voxel's corner in one file and its centre in the other, makes 0.5.
JITTER_VOXELS = 0.25
# beyond that, the nearest anatomical axis says little (the heart is imaged at 45 degrees)
OBLIQUE_DEGREES = 30.0

_TOWARDS = (("L", "R"), ("P", "A"), ("S", "I"))


@dataclass(frozen=True)
class Grid:
    """Geometry of a volume in SimpleITK's order of axes (x, y, z), in mm.

    Attributes:
        direction: cosines of the axes in the patient's left-posterior-superior frame, row by row of a 3×3 matrix whose
            columns are the axes.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, volume: sitk.Image) -> Grid:
        return cls(volume.GetSize(), volume.GetSpacing(), volume.GetOrigin(), volume.GetDirection())

    def differences(self, reference: Grid) -> dict[str, float]:
        """Names of the properties that differ by more than rounding does -> what is tolerated of each."""
        tolerances = {
            "size": 0.0,
            "spacing": TOLERANCE_SPACING_RELATIVE * min(reference.spacing),
            "origin": TOLERANCE_MM,
            "direction": TOLERANCE_DIRECTION,
        }
        return {
            name: tolerance
            for name, tolerance in tolerances.items()
            if any(
                abs(value - expected) > tolerance
                for value, expected in zip(getattr(self, name), getattr(reference, name), strict=True)
            )
        }

    def displacement_voxels(self, reference: Grid) -> float:
        """How far the voxels of this grid lie off those of the same index in a reference of the same size.

        Returns:
            The largest distance along an axis, in voxels of the reference. Both grids map indices linearly, so it is
            found at a corner.
        """
        corners = np.array(list(itertools.product(*((0, extent - 1) for extent in self.size))), dtype=float).T
        positions = self._axes_mm() @ corners + np.reshape(self.origin, (3, 1))
        indices = np.linalg.solve(reference._axes_mm(), positions - np.reshape(reference.origin, (3, 1)))
        return float(np.abs(indices - corners).max())

    def _axes_mm(self) -> np.ndarray:
        return np.reshape(self.direction, (3, 3)) * np.asarray(self.spacing)


def orientation_code(direction: tuple[float, ...]) -> str:
    """Where x, y and z point to: 'LPS' is to the left, the back, the head; 'oblique' if it is more than 30° off that.

    Args:
        direction: nine cosines, as in :class:`Grid`.
    """
    matrix = np.reshape(direction, (3, 3))
    rows = np.abs(matrix).argmax(axis=0)
    if sorted(rows) != [0, 1, 2] or np.abs(matrix).max(axis=0).min() < math.cos(math.radians(OBLIQUE_DEGREES)):
        return "oblique"
    return "".join(_TOWARDS[row][int(matrix[row, axis] < 0)] for axis, row in enumerate(rows))


def is_mirrored(direction: tuple[float, ...]) -> bool:
    """Whether the axes are left-handed (determinant below 0): as an array, the patient is seen in a mirror."""
    return bool(np.linalg.det(np.reshape(direction, (3, 3))) < 0)


def states_direction(volume: sitk.Image) -> bool:
    """Whether the file said how its axes lie in the patient; a NIfTI header whose two codes are 0 does not."""
    codes = ("qform_code", "sform_code")
    return not all(volume.HasMetaDataKey(code) and int(volume.GetMetaData(code)) == 0 for code in codes)
