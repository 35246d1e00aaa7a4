"""Label-free losses of coordinates: what two voxels of one scan must differ by.

Only differences of positions enter, so a scan's origin, which says nothing about the body, drops out. Every loss is a
mean over pairs of a scan's points, one value a scan, so that the mean over scans is the same however they are shared
among processes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffseg_nnunet.coordinates.positions import UNIT_MM

CoordinateObjective = Literal["relative", "distance"]
_SMALL = 1e-12  # keeps the gradient of a norm finite at 0


def relative_position_loss(coordinates: Tensor, positions_mm: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of | (c_i − c_j) − (p_i − p_j) / 300 mm | over all pairs and the three axes: shape (scans,).

    Dense form of relative position regression (RPR-Loc, arXiv 2012.07043; methods.md, option B). The shared network
    fixes one gauge for all scans, with axes along the patient's.

    Args:
        coordinates: predicted, in units of 300 mm; shape (scans, points, 3).
        positions_mm: true positions, shape (scans, points, 3); only differences within a scan matter.
        weight: of each point, shape (scans, points), in 0..1; a pair counts with the product of its points' weights.
            None: all pairs count the same.
    """
    error = coordinates.float() - positions_mm.float() / UNIT_MM
    pairwise = (error[:, :, None] - error[:, None, :]).abs().mean(dim=-1)
    return _mean_over_pairs(pairwise, weight)


def distance_loss(coordinates: Tensor, positions_mm: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of ( ‖c_i − c_j‖ − ‖p_i − p_j‖ / 300 mm )² over all pairs: shape (scans,).

    The distance loss of anatomical positional embeddings (APE, arXiv 2409.10291; methods.md, option A), with a fixed
    unit instead of one a step. Distances fix coordinates up to turns and reflections: their axes need not be the
    patient's. Arguments as for :func:`relative_position_loss`.
    """
    predicted, true = _distances(coordinates.float()), _distances(positions_mm.float() / UNIT_MM)
    return _mean_over_pairs((predicted - true).square(), weight)


def consistency_loss(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Mean squared difference of the coordinates two patches give the same places: shape (scans,).

    APE's second term (methods.md, option A): over points and the three components.

    Args:
        first, second: shape (scans, points, 3).
        weight: of each point, shape (scans, points); 0 where a place is in one of the patches only.
    """
    squared = (first.float() - second.float()).square().mean(dim=-1)
    return (squared * weight).sum(1) / (weight > 0).sum(1).clamp_min(1)


def displacement_error_mm(coordinates: Tensor, positions_mm: Tensor) -> Tensor:
    """Median |error| of predicted displacements between points of one scan, mm per axis (x, y, z): shape (3,).

    Args:
        coordinates, positions_mm: shape (scans, points, 3), as in :func:`relative_position_loss`.
    """
    error = coordinates.float() * UNIT_MM - positions_mm.float()
    pairs = torch.triu_indices(error.shape[1], error.shape[1], offset=1, device=error.device)
    differences = error[:, pairs[0]] - error[:, pairs[1]]
    return differences.abs().reshape(-1, 3).median(dim=0).values


def _distances(points: Tensor) -> Tensor:
    return ((points[:, :, None] - points[:, None, :]).square().sum(dim=-1) + _SMALL).sqrt()


def _mean_over_pairs(pairwise: Tensor, weight: Tensor | None) -> Tensor:
    if weight is not None:
        pairwise = pairwise * (weight[:, :, None] * weight[:, None, :])
    return pairwise.mean(dim=(1, 2))
