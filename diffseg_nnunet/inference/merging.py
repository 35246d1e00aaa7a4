"""Two segmentations of one image as one: some structures of the second, all else of the first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray


def merged_labels(plain: NDArray, refined: NDArray, values: Sequence[int]) -> NDArray:
    """`plain`, and `refined` wherever either of the two has one of `values`.

    So a chosen structure is what `refined` says it is; a voxel it gives up is what `refined` says instead.
    """
    return np.where(np.isin(plain, values) | np.isin(refined, values), refined, plain)


def merge_files_of_labels(plain: Path, refined: Path, values: Sequence[int], target: Path) -> None:
    """The same of two files on one grid, written to `target`."""
    image = sitk.ReadImage(str(plain))
    arrays = sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(sitk.ReadImage(str(refined)))
    merged = sitk.GetImageFromArray(merged_labels(*arrays, values))
    merged.CopyInformation(image)
    sitk.WriteImage(merged, str(target), useCompression=True)
