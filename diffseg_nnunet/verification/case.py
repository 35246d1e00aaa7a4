"""Checks of one case: its images, its label, and whether their grids agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
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


def check_case(
    case: Case,
    *,
    channel_count: int,
    label_values: set[int] | None,
    label_required: bool = False,
    shown_as: Mapping[Path, Path] | None = None,
) -> list[Finding]:
    """Read every file of a case once, voxels included, and say what is wrong with it.

    Args:
        case: the case; channels and label are compared with its first image.
        channel_count: how many images the case must have.
        label_values: the values its label may hold; None leaves them unchecked.
        label_required: a case without a label is an error.
        shown_as: names to show instead of a file's own, for files that have not reached their place.
    """
    check = _CaseCheck(case.identifier, shown_as or {})
    if not case.images:
        check.add("missing_image", f"The case '{case.identifier}' has no image.", "Add it, or remove its label.")
    elif len(case.images) != channel_count:
        check.add(
            "channel_count",
            f"The case '{case.identifier}' has {len(case.images)} image(s), the data set {channel_count} channel(s).",
            "Add what is missing, remove the case, or mend the channel names.",
        )
    reference: tuple[Path, _Grid] | None = None
    for path in case.images:
        grid = check.image(path)
        if grid is not None and reference is not None:
            check.same_grid("channel", (path, grid), reference)
        elif grid is not None:
            reference = path, grid
    check.report_constant(len(case.images))
    if case.label is None:
        if label_required:
            check.add("missing_label", f"The case '{case.identifier}' has no label.", "Add it, or remove its image.")
        return check.findings
    grid = check.label(case.label, label_values)
    if grid is not None and reference is not None:
        check.same_grid("label", (case.label, grid), reference)
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

    def __init__(self, identifier: str, shown_as: Mapping[Path, Path]):
        self.identifier = identifier
        self.shown_as = shown_as
        self.findings: list[Finding] = []
        self.constant: list[tuple[Path, float]] = []

    def add(self, code: str, message: str, mend: str, severity: Severity = "error") -> None:
        self.findings.append(Finding(code, self.identifier, message, mend, severity))

    def show(self, path: Path) -> Path:
        return self.shown_as.get(path, path)

    def image(self, path: Path) -> _Grid | None:
        """Check one channel; None where there is no 3D grid to compare with."""
        volume = self._read(path)
        if volume is None:
            return None
        voxels = sitk.GetArrayViewFromImage(volume)
        # min and max of anything with NaN are NaN, so these two passes find all that is wrong without a copy
        low, high = float(voxels.min()), float(voxels.max())
        if not math.isfinite(low) or not math.isfinite(high):
            self.add("not_finite", f"{self.show(path)} holds voxels that are {NOT_FINITE}.", MEND_NOT_FINITE)
        elif low == high:
            self.constant.append((path, low))
        return _Grid.of(volume)

    def report_constant(self, channel_count: int) -> None:
        """An error where no channel has any contrast; one empty channel of several may stand for a missing sequence."""
        nothing_left = len(self.constant) == channel_count
        for path, value in self.constant:
            message = f"{self.show(path)} is constant, {value:.10g} in every voxel"
            if nothing_left:
                self.add(
                    "constant_image", f"{message}: nothing can be learnt from it.", "Export it again, or remove it."
                )
            else:
                self.add("constant_image", f"{message}.", "Remove the case if that is not meant.", "warning")

    def label(self, path: Path, allowed: set[int] | None) -> _Grid | None:
        """Check a label; None where there is no 3D grid to compare with."""
        volume = self._read(path)
        if volume is None:
            return None
        values = np.unique(sitk.GetArrayViewFromImage(volume)).tolist()
        found = {int(value) for value in values if math.isfinite(value) and value == int(value)}
        unknown = found - (found if allowed is None else allowed)
        if len(found) < len(values):
            fractions = [value for value in values if value not in found]
            self.add(
                "label_not_integer",
                f"The label {self.show(path)} holds values that are no integers: {listed(fractions)}.",
                "Resample labels with nearest neighbours, and save them as integers.",
            )
        if unknown:
            self.add(
                "label_values",
                f"The label {self.show(path)} holds values that dataset.json does not name: {listed(sorted(unknown))} "
                f"(named are {listed(sorted(allowed or ()))}).",
                "Name them, or give those voxels a named value.",
            )
        if values == [0]:
            message = f"The label {self.show(path)} is background everywhere."
            self.add("empty_label", message, "Use the case as unlabelled if that is not meant.", "warning")
        return _Grid.of(volume)

    def same_grid(self, kind: str, one: tuple[Path, _Grid], reference: tuple[Path, _Grid]) -> None:
        """Compare size, spacing (mm), origin (mm) and direction cosines with those of the case's first image."""
        tolerances = {
            "size": 0.0,
            "spacing": TOLERANCE_SPACING_RELATIVE * min(reference[1].spacing),
            "origin": TOLERANCE_MM,
            "direction": TOLERANCE_DIRECTION,
        }
        units = {"size": "voxels", "spacing": "mm", "origin": "mm", "direction": "(cosines)"}
        for name, tolerance in tolerances.items():
            values, expected = getattr(one[1], name), getattr(reference[1], name)
            if all(abs(a - b) <= tolerance for a, b in zip(values, expected, strict=True)):
                continue
            allowed = f"; {tolerance:.2g} is tolerated" if tolerance else ""
            self.add(
                f"{kind}_{name}",
                f"The {kind} {self.show(one[0])} has the {name} {numbers(values)} {units[name]}, but its image "
                f"{self.show(reference[0])} has {numbers(expected)}{allowed}: their voxels do not correspond.",
                "Resample it to the image's grid, or export both again.",
            )

    def _read(self, path: Path) -> sitk.Image | None:
        """The volume, None where it is no three-dimensional grid of single numbers."""
        try:
            volume = read_volume(path)
        except UnreadableVolumeError as error:
            self.findings.append(error.as_finding(self.identifier, self.show(path)))
            return None
        if volume.GetDimension() != 3:
            self.add(
                "not_3d",
                f"{self.show(path)} is {volume.GetDimension()}D, {numbers(volume.GetSize())} voxels; expected is 3D.",
                "Save one volume a file; a 4D image is split only where it has as many channels as are named.",
            )
            return None
        if volume.GetNumberOfComponentsPerPixel() != 1 or "complex" in volume.GetPixelIDTypeAsString():
            message = f"{self.show(path)} holds {volume.GetPixelIDTypeAsString()} instead of one number a voxel."
            self.add("not_scalar", message, "Save each component as a channel of its own.")
            return None
        return volume
