"""Surfaces of two masks, their areas, and how far each lies from the other: computed once for NSD, HD95 and ASSD.

A surface element sits at every corner between voxels whose 2 x 2 x 2 neighbours are not all in or all out of the mask;
its area is that of the marching-cubes triangles there. In a single slice, whose every voxel would be surface above and
below, it sits between 2 x 2 pixels, and has the length of the contour there. Definitions, kernel and areas are those of
Nikolov et al., arXiv:1809.04430, in deepmind's surface-distance, whose tables are used here. Its own distances come
from two distance transforms and a sort in Python; a search tree over the corners gives the same numbers several times
as fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from surface_distance import lookup_tables

_WEIGHTS = {
    2: lookup_tables.ENCODE_NEIGHBOURHOOD_2D_KERNEL.astype(np.uint8),
    3: lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL.astype(np.uint8),
}
_FULL = {2: 15, 3: 255}
_SIZES = {
    2: lookup_tables.create_table_neighbour_code_to_contour_length,
    3: lookup_tables.create_table_neighbour_code_to_surface_area,
}


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances and areas of the surface elements of two masks that are not empty, each side sorted by distance.

    Attributes:
        from_reference_mm: distance of every element of the reference to the prediction's surface, mm, shape (n,).
        from_prediction_mm: likewise, of the prediction's elements, shape (m,).
        reference_mm2: areas of the reference's elements, in the same order; in a slice lengths, mm.
        prediction_mm2: likewise.
    """

    from_reference_mm: NDArray[np.float64]
    from_prediction_mm: NDArray[np.float64]
    reference_mm2: NDArray[np.float64]
    prediction_mm2: NDArray[np.float64]

    def dice(self, tolerance_mm: float) -> float:
        """NSD: share of the area of both surfaces within the tolerance of the other one, 0 to 1."""
        within = np.sum(self.reference_mm2[self.from_reference_mm <= tolerance_mm])
        within += np.sum(self.prediction_mm2[self.from_prediction_mm <= tolerance_mm])
        whole = np.sum(self.reference_mm2) + np.sum(self.prediction_mm2)
        # Two sums in different orders can exceed the whole by a rounding error.
        return min(1.0, float(within / whole))

    def hausdorff_mm(self, percent: float) -> float:
        """The larger of the two directed percentiles of distance, by area, in mm."""
        sides = ((self.from_reference_mm, self.reference_mm2), (self.from_prediction_mm, self.prediction_mm2))
        return max(_percentile(distances, areas, percent) for distances, areas in sides)

    def average_mm(self) -> float:
        """ASSD: mean distance over the area of both surfaces together, in mm."""
        total = np.sum(self.from_reference_mm * self.reference_mm2)
        total += np.sum(self.from_prediction_mm * self.prediction_mm2)
        return float(total / (np.sum(self.reference_mm2) + np.sum(self.prediction_mm2)))


def surface_distances(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing_mm: Sequence[float]
) -> SurfaceDistances:
    """The surfaces of two masks and the distances between them.

    Args:
        reference: bool mask with a voxel in it at least, three axes, or two of a single slice; beyond its border
            everything is out.
        prediction: the same, of the same shape.
        spacing_mm: voxel spacing in mm, in the order of the axes.

    Raises:
        ValueError: a mask is empty.
    """
    spacing = np.asarray(spacing_mm, dtype=float)
    codes = [_neighbour_codes(mask) for mask in (reference, prediction)]
    borders = [(code != 0) & (code != _FULL[code.ndim]) for code in codes]
    if not all(border.any() for border in borders):
        raise ValueError("There is no surface in an empty mask.")
    areas_of_code = _areas(tuple(spacing.tolist()))
    corners = [np.argwhere(border) for border in borders]
    sides = []
    for own, other in ((0, 1), (1, 0)):
        distances = _nearest_mm(corners[own], corners[other], borders[other], spacing)
        areas = areas_of_code[codes[own][borders[own]]]
        # Sorted by area as well, so that sums do not depend on the order of the voxels.
        order = np.lexsort((areas, distances))
        sides.append((distances[order], areas[order]))
    return SurfaceDistances(sides[0][0], sides[1][0], sides[0][1], sides[1][1])


def _neighbour_codes(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """One code a corner, shape of the mask + 1: which of its eight neighbours, or four, are in the mask."""
    padded = np.pad(mask, 1).view(np.uint8)
    shape = tuple(side - 1 for side in padded.shape)
    codes = np.zeros(shape, dtype=np.uint8)
    for offset in np.ndindex((2,) * mask.ndim):
        corner = tuple(slice(start, start + side) for start, side in zip(offset, shape, strict=True))
        codes += padded[corner] * _WEIGHTS[mask.ndim][offset]
    return codes


def _nearest_mm(
    corners: NDArray[np.integer], others: NDArray[np.integer], on_other: NDArray[np.bool_], spacing: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distance of every corner to the nearest of the others, in mm; a corner that is one of them is not searched."""
    distances = np.zeros(len(corners))
    apart = ~on_other[tuple(corners.T)]
    if apart.any():
        _, nearest = cKDTree(others * spacing).query(corners[apart] * spacing)
        # From whole steps, as a distance transform has it: differences of positions in mm would add their rounding.
        distances[apart] = np.sqrt(np.square((corners[apart] - others[nearest]) * spacing).sum(axis=1))
    return distances


def _percentile(distances: NDArray[np.float64], areas: NDArray[np.float64], percent: float) -> float:
    share = np.cumsum(areas) / np.sum(areas)
    return float(distances[min(np.searchsorted(share, percent / 100), len(distances) - 1)])


@lru_cache(maxsize=64)
def _areas(spacing_mm: tuple[float, ...]) -> NDArray[np.float64]:
    """Area in mm2 of a surface element by neighbour code, shape (256,); in a slice its length in mm, shape (16,)."""
    return _SIZES[len(spacing_mm)](spacing_mm)
