"""From planes to a grid: their order along the normal, and everything that keeps them from being a volume.

Tolerances: a plane may lie a tenth of the slice spacing off the even grid and a quarter of a voxel aside (positions are
often rounded to 0.1 mm), direction cosines may differ by 1e-3 and spacings by 0.1 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from diffseg_nnunet.verification import listed

from .planes import Plane

TOLERANCE_ALONG = 0.1
TOLERANCE_ASIDE = 0.25
TOLERANCE_COSINES = 1e-3
TOLERANCE_SPACING = 1e-3
MEND_SERIES = "Leave the series out, or get it complete from the archive."
MEND_TILT = (
    "Reconstruct the series without tilt, or correct the shear (dcm2niix does) and convert the result with the format "
    "'folder'."
)


class NoStackError(ValueError):
    """Planes are no volume.

    Attributes:
        reason: why, one clause with the series as its subject.
        mend: what to do.
        code: 'duplicates' where several planes lie at one position, else 'geometry'.
    """

    def __init__(self, reason: str, mend: str = MEND_SERIES, code: str = "geometry"):
        super().__init__(reason)
        self.reason, self.mend, self.code = reason, mend, code


@dataclass(frozen=True)
class Stack:
    """Planes in the order of a regular grid.

    Attributes:
        planes: from the first to the last, along the normal (row × column).
        spacing: x (along a row), y, z, mm.
        origin: of the first voxel, mm, left-posterior-superior.
        direction: 3×3, its columns the axes x, y, z.
    """

    planes: tuple[Plane, ...]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: np.ndarray


def stack(planes: Sequence[Plane]) -> Stack:
    """Order the planes and check that they are an even, straight, complete stack.

    Raises:
        NoStackError: they are not.
    """
    _refuse_unplaced(planes)
    _refuse_mixed(planes)
    row, column, normal = _axes(planes[0])
    positions = np.array([plane.position for plane in planes])
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    ordered, positions, along = [planes[index] for index in order], positions[order], along[order]
    _refuse_duplicates(ordered, along)
    between = (along[-1] - along[0]) / (len(planes) - 1)
    _refuse_uneven(ordered, along, between)
    row_spacing, column_spacing = ordered[0].spacing
    _refuse_sheared(positions - positions[0], along - along[0], normal, min(row_spacing, column_spacing))
    return Stack(
        planes=tuple(ordered),
        spacing=(column_spacing, row_spacing, float(between)),
        origin=tuple(positions[0].tolist()),
        direction=np.stack([row, column, normal], axis=1),
    )


def split(planes: Sequence[Plane]) -> list[tuple[str, tuple[Plane, ...]]]:
    """The stacks of one series: itself, or one an acquisition, echo, time or image type where positions repeat.

    Returns:
        (what tells the stack apart, e.g. ``echo2``; '' where it is the only one, its planes). A series that cannot be
        divided into whole stacks stays one, which :func:`stack` then refuses.
    """
    whole = [("", tuple(planes))]
    try:
        stack(planes)
    except NoStackError as error:
        if error.code != "duplicates":
            return whole
    else:
        return whole
    for name, key in _KEYS.items():
        groups: dict[object, list[Plane]] = {}
        for plane in planes:
            groups.setdefault(key(plane), []).append(plane)
        if len(groups) > 1 and all(_is_stack(group) for group in groups.values()):
            ordered = sorted(groups, key=lambda value: _natural(str(value)))
            return [(f"{name}{number}", tuple(groups[value])) for number, value in enumerate(ordered, start=1)]
    return whole


_KEYS: dict[str, Callable[[Plane], object]] = {
    "acq": lambda plane: plane.acquisition,
    "echo": lambda plane: plane.echo,
    "time": lambda plane: plane.time,
    "type": lambda plane: plane.image_type,
    "part": lambda plane: (plane.acquisition, plane.echo, plane.time, plane.image_type),
}


def _natural(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return math.inf, text


def _is_stack(planes: Sequence[Plane]) -> bool:
    try:
        stack(planes)
    except NoStackError:
        return False
    return True


def _refuse_unplaced(planes: Sequence[Plane]) -> None:
    if len(planes) < 2:
        raise NoStackError("is a single image, no volume")
    for attribute, keyword in (
        ("position", "ImagePositionPatient"),
        ("orientation", "ImageOrientationPatient"),
        ("spacing", "PixelSpacing"),
        ("rescale", "RescaleSlope or RescaleIntercept"),
    ):
        bad = [plane.path.name for plane in planes if getattr(plane, attribute) is None]
        if bad:
            raise NoStackError(f"has no valid {keyword} in {len(bad)} of {len(planes)} images ({listed(bad, 3)})")
    if any(min(plane.spacing) <= 0 or min(plane.size) < 1 for plane in planes):
        raise NoStackError("has images of no extent")


def _refuse_mixed(planes: Sequence[Plane]) -> None:
    """One orientation, one spacing and one size."""
    sizes = sorted({plane.size for plane in planes})
    if len(sizes) > 1:
        shown = listed(f"{rows}×{columns}" for rows, columns in sizes)
        raise NoStackError(f"mixes images of different sizes ({shown})")
    orientations = np.array([plane.orientation for plane in planes])
    if np.abs(orientations - orientations[0]).max() > TOLERANCE_COSINES:
        count = len(np.unique(orientations.round(2), axis=0))
        raise NoStackError(f"mixes images of {max(count, 2)} orientations", "Leave it out: it may be a localizer.")
    spacings = np.array([plane.spacing for plane in planes])
    if np.abs(spacings / spacings[0] - 1).max() > TOLERANCE_SPACING:
        raise NoStackError(f"mixes pixel spacings from {spacings.min():g} to {spacings.max():g} mm")


def _axes(plane: Plane) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Orthonormal row, column and normal: the cosines' rounding is taken out."""
    row, column = np.array(plane.orientation[:3]), np.array(plane.orientation[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if max(abs(length - 1) for length in lengths) > 1e-2 or abs(row @ column) > TOLERANCE_COSINES * 10:
        raise NoStackError("has an ImageOrientationPatient whose axes are no unit vectors at right angles")
    row = row / lengths[0]
    column = column - (column @ row) * row
    column = column / np.linalg.norm(column)
    return row, column, np.cross(row, column)


def _refuse_duplicates(planes: Sequence[Plane], along: np.ndarray) -> None:
    gaps = np.diff(along)
    # with most positions doubled the median gap is 0; then the largest is the yardstick
    typical = np.median(gaps) or gaps.max()
    twice = np.flatnonzero(gaps <= TOLERANCE_ALONG * typical)
    if len(twice) or typical == 0:
        first = int(twice[0]) if len(twice) else 0
        names = f"{_name(planes[first])} and {_name(planes[first + 1])}"
        raise NoStackError(
            f"has {max(len(twice), 1)} position(s) with more than one image, such as {names}, and neither acquisition, "
            "echo, time nor image type divides them into whole stacks",
            "Keep one image a position.",
            code="duplicates",
        )


def _refuse_uneven(planes: Sequence[Plane], along: np.ndarray, between: float) -> None:
    gaps = np.diff(along)
    typical = float(np.median(gaps))
    steps = gaps / typical
    wide = np.flatnonzero((np.round(steps) >= 2) & (np.abs(steps - np.round(steps)) <= TOLERANCE_ALONG * 2))
    if len(wide) and np.abs(np.delete(steps, wide) - 1).max(initial=0) <= TOLERANCE_ALONG * 2:
        missing = int(np.round(steps[wide]).sum()) - len(wide)
        after = listed((_name(planes[index]) for index in wide), 3)
        raise NoStackError(f"lacks {missing} slice(s), after {after}: {typical:g} mm apart, once {gaps.max():g} mm")
    off = np.abs(along - along[0] - between * np.arange(len(along))).max()
    if off > TOLERANCE_ALONG * between:
        raise NoStackError(
            f"is unevenly spaced: neighbours are {gaps.min():.4g} to {gaps.max():.4g} mm apart",
            "Leave it out, or resample it to even slices and convert the result with the format 'folder'.",
        )


def _refuse_sheared(offsets: np.ndarray, along: np.ndarray, normal: np.ndarray, in_plane: float) -> None:
    aside = offsets - along[:, None] * normal
    if np.linalg.norm(aside, axis=1).max() <= TOLERANCE_ASIDE * in_plane:
        return
    slope = aside[-1] / along[-1]
    if np.linalg.norm(aside - along[:, None] * slope, axis=1).max() <= TOLERANCE_ASIDE * in_plane:
        angle = math.degrees(math.atan(np.linalg.norm(slope)))
        raise NoStackError(
            f"is sheared (gantry tilt): its slices follow each other at {angle:.1f}° to their normal", MEND_TILT
        )
    shift = np.linalg.norm(aside, axis=1).max()
    raise NoStackError(f"has slices that are shifted against each other, by up to {shift:.4g} mm in plane")


def _name(plane: Plane) -> str:
    return plane.path.name if plane.frame is None else f"frame {plane.frame + 1} of {plane.path.name}"
