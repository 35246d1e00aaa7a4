"""The label-free loss of the coordinate head: differences of positions between voxels of one scan.

Dense form of relative position regression (RPR-Loc, arXiv 2012.07043; methods.md, option B):
``L = mean_{i,j of one scan} || (c_i − c_j) − (p_i − p_j) / 300 mm ||_1 / 3``, the mean over the axes. Only differences
enter, so a scan's origin, which says nothing about the body, drops out; the shared head fixes one gauge for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffseg_nnunet.coordinates.positions import UNIT_MM


def relative_position_loss(coordinates: Tensor, positions_mm: Tensor, weight: Tensor | None = None) -> Tensor:
    """The loss over all pairs of the points of each scan: a scalar.

    Args:
        coordinates: predicted, in units of 300 mm; shape (scans, points, 3).
        positions_mm: true positions, shape (scans, points, 3); only differences within a scan matter.
        weight: of each point, shape (scans, points), >= 0; a pair counts with the product of its points' weights.
            None: all pairs count the same.
    """
    error = coordinates.float() - positions_mm.float() / UNIT_MM
    pairwise = (error[:, :, None] - error[:, None, :]).abs().mean(dim=-1)
    if weight is None:
        return pairwise.mean()
    pair_weight = weight[:, :, None] * weight[:, None, :]
    return (pairwise * pair_weight).sum() / pair_weight.sum().clamp_min(torch.finfo(torch.float32).tiny)


def displacement_error_mm(coordinates: Tensor, positions_mm: Tensor) -> Tensor:
    """Median |error| of predicted displacements between points of one scan, mm per axis (x, y, z): shape (3,).

    Args:
        coordinates, positions_mm: shape (scans, points, 3), as in :func:`relative_position_loss`.
    """
    error = coordinates.float() * UNIT_MM - positions_mm.float()
    pairs = torch.triu_indices(error.shape[1], error.shape[1], offset=1, device=error.device)
    differences = error[:, pairs[0]] - error[:, pairs[1]]
    return differences.abs().reshape(-1, 3).median(dim=0).values
