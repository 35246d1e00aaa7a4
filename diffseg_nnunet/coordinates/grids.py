"""A coordinate map brought from the preprocessed grid to the scan's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from diffseg_nnunet.coordinates.positions import ArrayGeometry


@dataclass(frozen=True)
class ScanGrid:
    """The grid of a 3D scan, as SimpleITK has it: axes in its image order (x, y, z).

    Attributes:
        size: voxels.
        spacing: mm.
        origin: mm, LPS position of voxel (0, 0, 0).
        direction: the direction cosines, row by row.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, header: sitk.Image | sitk.ImageFileReader) -> ScanGrid:
        return cls(header.GetSize(), header.GetSpacing(), header.GetOrigin(), header.GetDirection())

    @classmethod
    def of_file(cls, path: Path | str) -> ScanGrid:
        """Reads the header alone.

        Raises:
            RuntimeError: the file is missing, or no image that SimpleITK knows.
        """
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        return cls.of(reader)

    def index_to_patient(self) -> NDArray[np.float64]:
        """(3, 4): position in mm (LPS) = M[:, :3] @ (z, y, x) + M[:, 3]."""
        direction = np.asarray(self.direction).reshape(3, 3)
        return ArrayGeometry(self.spacing[::-1], self.origin, direction).index_to_patient()


def as_vector_image(values: NDArray[np.float32], index_to_patient: NDArray[np.float64]) -> sitk.Image:
    """A vector image of `values` where they lie in the patient.

    Args:
        values: (components, *shape), three axes of space in any order.
        index_to_patient: (3, 4) matrix from an index of `shape` to mm (LPS); its first three columns at right angles.
    """
    image = sitk.GetImageFromArray(np.moveaxis(values, 0, -1), isVector=True)
    # SimpleITK counts an array's axes from its end
    axes = np.asarray(index_to_patient)[:, 2::-1]
    spacing = np.linalg.norm(axes, axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((axes / spacing).ravel().tolist())
    image.SetOrigin(np.asarray(index_to_patient)[:, 3].tolist())
    return image


def resampled(image: sitk.Image, grid: ScanGrid) -> sitk.Image:
    """`image` on another grid: linear between its voxels; beyond them, the value of the nearest."""
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize(grid.size)
    resampler.SetOutputSpacing(grid.spacing)
    resampler.SetOutputOrigin(grid.origin)
    resampler.SetOutputDirection(grid.direction)
    resampler.SetInterpolator(sitk.sitkLinear)
    resampler.SetUseNearestNeighborExtrapolator(True)
    return resampler.Execute(image)
