"""FLARE22's official rules written down once more, from their description alone, and cases that try them.

numpy, nibabel and deepmind's surface-distance; nothing of diffseg_nnunet/evaluation, which is measured against this.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import surface_distance
from numpy.typing import NDArray
from scipy import ndimage

TOLERANCES = (5, 3, 3, 5, 2, 2, 2, 2, 2, 3, 5, 7, 3)
"""Of organs 1 to 13, mm."""
TUBES = (5, 6, 10)
CRASH = "crash"
BTCV_TO_FLARE = {1: 3, 2: 2, 3: 13, 4: 9, 5: 10, 6: 1, 7: 11, 8: 5, 9: 6, 10: 0, 11: 4, 12: 7, 13: 8}
"""Values by organ; 0 for the portal and splenic veins, which FLARE22 has not."""

Scores = tuple[float, float] | str


def official_scores(reference: Path, prediction: Path, revision: str = "2024") -> dict[int, Scores]:
    """DSC and NSD of organs 1 to 13, or CRASH where the official script would end with an error."""
    image = nibabel.load(reference)
    zooms = image.header.get_zooms()
    gt = np.uint8(image.get_fdata())
    seg = np.uint8(nibabel.load(prediction).get_fdata())
    return {organ: _organ(gt == organ, seg == organ, organ, zooms, revision) for organ in range(1, 14)}


def _organ(gt: NDArray, seg: NDArray, organ: int, zooms: tuple, revision: str) -> Scores:
    if not gt.any():
        return (0.0, 0.0) if seg.any() else (1.0, 1.0)
    if revision == "2024" and not seg.any():
        return 0.0, 0.0
    if organ in TUBES:
        slices = np.nonzero(gt)[2]
        lower, upper = slices.min(), slices.max()
        gt, seg = gt[:, :, lower:upper], seg[:, :, lower:upper]
    if not gt.size:
        return CRASH
    dsc = 2 * (gt & seg).sum() / (gt.sum() + seg.sum())
    if not seg.any() or (revision == "2024" and dsc < 0.2):
        # Without a prediction every distance is infinite; surface-distance has np.Inf there, which NumPy 2 has not.
        return round(dsc, 4), 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        distances = surface_distance.compute_surface_distances(gt, seg, zooms)
    nsd = surface_distance.compute_surface_dice_at_tolerance(distances, TOLERANCES[organ - 1])
    return round(dsc, 4), round(nsd, 4)


@dataclass(frozen=True)
class Pair:
    """Two label maps in nibabel's order (x, y, z), values as FLARE22 numbers them; spacing in mm."""

    name: str
    reference: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    spacing: tuple[float, float, float]

    def write(self, references: Path, predictions: Path) -> tuple[Path, Path]:
        """Write both as NIfTI, and return their paths."""
        paths = references / f"{self.name}.nii.gz", predictions / f"{self.name}.nii.gz"
        for path, labels in zip(paths, (self.reference, self.prediction), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(labels, np.diag([*self.spacing, 1.0])), path)
        return paths


def random_pairs(number: int, seed: int = 0) -> Iterator[Pair]:
    """Ellipsoids, shifted, dropped, invented, replaced by noise, cut to one or two slices: every rule is met."""
    generator = np.random.default_rng(seed)
    shape = (26, 22, 18)
    for case in range(number):
        spacing = tuple(float(side) for side in generator.choice([0.7, 0.8, 1.0, 1.5, 2.5, 3.0, 5.0], 3))
        gt, seg = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
        for organ in generator.permutation(np.arange(1, 14)):
            if generator.random() < 0.15:
                continue  # in neither, unless something else invents it
            centre, radii = generator.uniform(3, np.array(shape) - 3), generator.uniform(1.5, 7, 3)
            mask = _ellipsoid(shape, centre, radii)
            if organ in TUBES and generator.random() < 0.3:
                mask = _some_slices(mask, int(generator.integers(1, 3)))
            moved = _ellipsoid(shape, centre + generator.normal(0, generator.choice([0, 1, 3]), 3), radii)
            kind = generator.random()
            gt[mask & (kind > 0.1)] = organ
            seg[moved & (kind < 0.9)] = organ
        noise = generator.random(shape) < generator.choice([0, 0, 0.02])
        seg[noise] = generator.integers(0, 16, int(noise.sum()))  # 14 and 15 are no organ: background
        yield Pair(f"random_{case:03d}", gt, seg, spacing)


def real_pairs(labels: Mapping[str, Path], seed: int = 0) -> Iterator[Pair]:
    """BTCV's references with FLARE22's numbers, and each organ of them shifted, dilated, eroded or dropped."""
    for number, (name, path) in enumerate(sorted(labels.items())):
        image = nibabel.load(path)
        table = np.array([0, *(BTCV_TO_FLARE[value] for value in range(1, 14))], dtype=np.uint8)
        gt = table[np.asarray(image.dataobj).astype(int)]
        spacing = tuple(float(side) for side in image.header.get_zooms())
        yield Pair(name, gt, perturbed(gt, np.random.default_rng([seed, number])), spacing)


def perturbed(labels: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
    """Each structure shifted by up to two voxels, dilated or eroded by one, or (one in ten) dropped."""
    changed = np.zeros_like(labels)
    for value, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None or generator.random() < 0.1:
            continue
        wide = tuple(slice(max(0, side.start - 3), side.stop + 3) for side in box)
        mask = np.roll(labels[wide] == value, generator.integers(-2, 3, 3), (0, 1, 2))
        mask = (ndimage.binary_dilation, ndimage.binary_erosion, np.array)[int(generator.integers(3))](mask)
        changed[wide][mask] = value
    return changed


def _ellipsoid(shape: tuple[int, ...], centre: NDArray, radii: NDArray) -> NDArray[np.bool_]:
    grid = np.ogrid[tuple(slice(side) for side in shape)]
    return sum(((axis - at) / radius) ** 2 for axis, at, radius in zip(grid, centre, radii, strict=True)) <= 1


def _some_slices(mask: NDArray[np.bool_], number: int) -> NDArray[np.bool_]:
    slices = np.flatnonzero(mask.any(axis=(0, 1)))
    kept = np.zeros_like(mask)
    first = slices[len(slices) // 2]
    kept[:, :, first : first + number] = mask[:, :, first : first + number]
    return kept
