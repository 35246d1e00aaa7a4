"""Checks of one case: its images, its label, and whether their grids agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from diffseg_nnunet.raw_dataset import Case
from diffseg_nnunet.verification.findings import Finding, Severity, listed, numbers
from diffseg_nnunet.verification.volumes import MEND_NOT_FINITE, NOT_FINITE, UnreadableVolumeError, read_volume

TOLERANCE_MM = 1e-3
TOLERANCE_DIRECTION = 1e-3
# nnU-Net's reader (channels) and integrity check (labels) stop where spacings differ by more than numpy.allclose allows
TOLERANCE_SPACING_RELATIVE = 1e-5


@dataclass(frozen=True)
class Volume:
    """A volume that has been read, and the name it is shown under."""

    path: Path
    image: sitk.Image


def check_case(
    case: Case,
    *,
    channel_count: int,
    label_values: set[int] | None,
    label_required: bool = False,
) -> list[Finding]:
    """Read every file of a case once, voxels included, and say what is wrong with it.

    Args:
        case: the case; channels and label are compared with its first image.
        channel_count: how many images the case must have.
        label_values: the values its label may hold; None leaves them unchecked.
        label_required: a case without a label is an error.
    """
    unreadable: list[Finding] = []

    def read(path: Path) -> Volume | None:
        try:
            return Volume(path, read_volume(path))
        except UnreadableVolumeError as error:
            unreadable.append(error.as_finding(case.identifier))
            return None

    check = _CaseCheck(case.identifier)
    check.number_of_images(len(case.images), channel_count)
    check.images(volume for path in case.images if (volume := read(path)) is not None)
    if case.label is None:
        check.label_missing(label_required)
    elif (label := read(case.label)) is not None:
        check.label(label, label_values)
    return [*unreadable, *check.findings]


def examine(
    identifier: str,
    images: Sequence[Volume],
    label: Volume | None,
    *,
    channel_count: int,
    label_values: set[int] | None,
    label_required: bool = False,
) -> list[Finding]:
    """The same as :func:`check_case` for volumes that have been read."""
    check = _CaseCheck(identifier)
    check.number_of_images(len(images), channel_count)
    check.images(images)
    if label is None:
        check.label_missing(label_required)
    else:
        check.label(label, label_values)
    return check.findings


@dataclass(frozen=True)
class _Grid:
    """Geometry of a volume in SimpleITK's order of axes (x, y, z), in mm."""

    size: tuple[float, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, volume: sitk.Image) -> _Grid:
        return cls(volume.GetSize(), volume.GetSpacing(), volume.GetOrigin(), volume.GetDirection())


class _CaseCheck:
    """Collects the findings of one case."""

    def __init__(self, identifier: str):
        self.identifier = identifier
        self.findings: list[Finding] = []
        self.reference: tuple[Path, _Grid] | None = None

    def add(self, code: str, message: str, mend: str, severity: Severity = "error") -> None:
        self.findings.append(Finding(code, self.identifier, message, mend, severity))

    def number_of_images(self, count: int, expected: int) -> None:
        if not count:
            self.add("missing_image", f"The case '{self.identifier}' has no image.", "Add it, or remove its label.")
        elif count != expected:
            self.add(
                "channel_count",
                f"The case '{self.identifier}' has {count} image(s), the data set {expected} channel(s).",
                "Add what is missing, remove the case, or mend the channel names.",
            )

    def label_missing(self, required: bool) -> None:
        if required:
            self.add("missing_label", f"The case '{self.identifier}' has no label.", "Add it, or remove its image.")

    def images(self, volumes: Iterable[Volume]) -> None:
        """Check all channels; the first one's grid is what the others and the label are compared with."""
        constant: list[tuple[Path, float]] = []
        count = 0
        for volume in volumes:
            count += 1
            if not self._is_scalar_3d(volume):
                continue
            grid = _Grid.of(volume.image)
            voxels = sitk.GetArrayViewFromImage(volume.image)
            # min and max of anything with NaN are NaN, so these two passes find all that is wrong without a copy
            low, high = float(voxels.min()), float(voxels.max())
            if not math.isfinite(low) or not math.isfinite(high):
                self.add("not_finite", f"{volume.path} holds voxels that are {NOT_FINITE}.", MEND_NOT_FINITE)
            elif low == high:
                constant.append((volume.path, low))
            if self.reference is None:
                self.reference = volume.path, grid
            else:
                self._same_grid("channel", volume.path, grid)
        self._report_constant(constant, count)

    def _report_constant(self, constant: Sequence[tuple[Path, float]], channel_count: int) -> None:
        """An error where no channel has any contrast; one empty channel of several may stand for a missing sequence."""
        nothing_left = len(constant) == channel_count
        for path, value in constant:
            message = f"{path} is constant, {value:.10g} in every voxel"
            if nothing_left:
                self.add(
                    "constant_image", f"{message}: nothing can be learnt from it.", "Export it again, or remove it."
                )
            else:
                self.add("constant_image", f"{message}.", "Remove the case if that is not meant.", "warning")

    def label(self, volume: Volume, allowed: set[int] | None) -> None:
        """Check a label's values, and its grid against the image's."""
        if not self._is_scalar_3d(volume):
            return
        path = volume.path
        values = np.unique(sitk.GetArrayViewFromImage(volume.image)).tolist()
        found = {int(value) for value in values if math.isfinite(value) and value == int(value)}
        unknown = found - (found if allowed is None else allowed)
        if len(found) < len(values):
            fractions = [value for value in values if value not in found]
            self.add(
                "label_not_integer",
                f"The label {path} holds values that are no integers: {listed(fractions)}.",
                "Resample labels with nearest neighbours, and save them as integers.",
            )
        if unknown:
            self.add(
                "label_values",
                f"The label {path} holds values that dataset.json does not name: {listed(sorted(unknown))} "
                f"(named are {listed(sorted(allowed or ()))}).",
                "Name them, or give those voxels a named value.",
            )
        if values == [0]:
            message = f"The label {path} is background everywhere."
            self.add("empty_label", message, "Use the case as unlabelled if that is not meant.", "warning")
        if self.reference is not None:
            self._same_grid("label", path, _Grid.of(volume.image))

    def _same_grid(self, kind: str, path: Path, grid: _Grid) -> None:
        """Compare size, spacing (mm), origin (mm) and direction cosines with those of the case's first image."""
        shown, reference = self.reference
        tolerances = {
            "size": 0.0,
            "spacing": TOLERANCE_SPACING_RELATIVE * min(reference.spacing),
            "origin": TOLERANCE_MM,
            "direction": TOLERANCE_DIRECTION,
        }
        units = {"size": "voxels", "spacing": "mm", "origin": "mm", "direction": "(cosines)"}
        for name, tolerance in tolerances.items():
            values, expected = getattr(grid, name), getattr(reference, name)
            if all(abs(a - b) <= tolerance for a, b in zip(values, expected, strict=True)):
                continue
            allowed = f"; {tolerance:.2g} is tolerated" if tolerance else ""
            self.add(
                f"{kind}_{name}",
                f"The {kind} {path} has the {name} {numbers(values)} {units[name]}, but its image "
                f"{shown} has {numbers(expected)}{allowed}: their voxels do not correspond.",
                "Resample it to the image's grid, or export both again.",
            )

    def _is_scalar_3d(self, volume: Volume) -> bool:
        """Whether it is a three-dimensional grid of single numbers."""
        image = volume.image
        if image.GetDimension() != 3:
            self.add(
                "not_3d",
                f"{volume.path} is {image.GetDimension()}D, {numbers(image.GetSize())} voxels; expected is 3D.",
                "Save one volume a file; a 4D image is split only where it has as many channels as are named.",
            )
            return False
        if image.GetNumberOfComponentsPerPixel() != 1 or "complex" in image.GetPixelIDTypeAsString():
            message = f"{volume.path} holds {image.GetPixelIDTypeAsString()} instead of one number a voxel."
            self.add("not_scalar", message, "Save each component as a channel of its own.")
            return False
        return True
