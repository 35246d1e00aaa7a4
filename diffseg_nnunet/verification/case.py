"""Checks of one case: its images, its label, and whether their grids agree; each volume is looked at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk

from diffseg_nnunet.raw_dataset import Case
from diffseg_nnunet.verification.findings import Finding, Severity, listed, numbers
from diffseg_nnunet.verification.geometry import JITTER_VOXELS, TOLERANCE_SPACING_RELATIVE, Grid, states_direction
from diffseg_nnunet.verification.records import CaseRecord, ChannelRecord, LabelRecord, Role
from diffseg_nnunet.verification.volumes import MEND_NOT_FINITE, NOT_FINITE, UnreadableVolumeError, read_volume
from diffseg_nnunet.verification.voxels import value_counts

_UNITS = {"size": "voxels", "spacing": "mm", "origin": "mm", "direction": "(cosines)"}
_MENDED = "Nothing to do: the copy is mended."


@dataclass(frozen=True)
class Volume:
    """A volume that has been read, and the name it is shown under."""

    path: Path
    image: sitk.Image


@dataclass(frozen=True)
class Examination:
    """What came out of one case.

    Attributes:
        findings: what is wrong with it.
        record: what it is like; None where an image is missing or cannot be used.
    """

    findings: tuple[Finding, ...]
    record: CaseRecord | None


def check_case(
    case: Case,
    *,
    channel_count: int,
    label_values: set[int] | None,
    label_required: bool = False,
    role: Role = "training",
) -> Examination:
    """Read every file of a case once, voxels included, and say what is in it and what is wrong with it.

    At most one volume is held in memory at a time.

    Args:
        case: the case; channels and label are compared with its first image.
        channel_count: how many images the case must have.
        label_values: the values its label may hold; None leaves them unchecked.
        label_required: a case without a label is an error.
        role: noted in the record.
    """
    unreadable: list[Finding] = []

    def read(path: Path) -> Volume | None:
        try:
            return Volume(path, read_volume(path))
        except UnreadableVolumeError as error:
            unreadable.append(error.as_finding(case.identifier))
            return None

    check = _CaseCheck(case.identifier, repairs=False)
    check.number_of_images(len(case.images), channel_count)
    check.images(volume for path in case.images if (volume := read(path)) is not None)
    if case.label is None:
        check.label_missing(label_required)
    elif (label := read(case.label)) is not None:
        check.label(label, label_values)
    check.findings[:0] = unreadable
    return check.examination(role, len(case.images))


def examine(
    identifier: str,
    images: Sequence[Volume],
    label: Volume | None,
    *,
    channel_count: int,
    label_values: set[int] | None,
    label_required: bool = False,
    role: Role = "training",
    repairs: bool = False,
) -> Examination:
    """The same as :func:`check_case` for volumes that have been read.

    Args:
        repairs: the caller writes a copy in which every volume has the first image's geometry, and whole numbers in
            labels are stored as integers: what that mends is a warning, where it would stop nnU-Net otherwise.
    """
    check = _CaseCheck(identifier, repairs)
    check.number_of_images(len(images), channel_count)
    check.images(images)
    if label is None:
        check.label_missing(label_required)
    else:
        check.label(label, label_values)
    return check.examination(role, len(images))


class _CaseCheck:
    """Collects the findings of one case, and what its record is made of."""

    def __init__(self, identifier: str, repairs: bool):
        self.identifier = identifier
        self.repairs = repairs
        self.findings: list[Finding] = []
        self.reference: tuple[Path, Grid] | None = None
        self.stated = True
        self.channels: list[ChannelRecord] = []
        self.label_record: LabelRecord | None = None

    def add(self, code: str, message: str, mend: str, severity: Severity = "error") -> None:
        self.findings.append(Finding(code, self.identifier, message, mend, severity))

    def examination(self, role: Role, image_count: int) -> Examination:
        record = None
        if self.reference is not None and len(self.channels) == image_count:
            grid = self.reference[1]
            record = CaseRecord.of(self.identifier, role, grid, self.stated, self.channels, self.label_record)
        return Examination(tuple(self.findings), record)

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
            grid = Grid.of(volume.image)
            if self.reference is None:
                self.reference = volume.path, grid
                self._direction_stated(volume)
            else:
                self._same_grid("channel", volume.path, grid)
            voxels = sitk.GetArrayViewFromImage(volume.image)
            # min and max of anything with NaN are NaN, so these two passes find all that is wrong without a copy
            low, high = float(voxels.min()), float(voxels.max())
            if not math.isfinite(low) or not math.isfinite(high):
                self.add("not_finite", f"{volume.path} holds voxels that are {NOT_FINITE}.", MEND_NOT_FINITE)
                continue
            if low == high:
                constant.append((volume.path, low))
            self.channels.append(ChannelRecord.of(volume.image))
        self._report_constant(constant, count)

    def _direction_stated(self, volume: Volume) -> None:
        self.stated = states_direction(volume.image)
        if not self.stated:
            self.add(
                "direction_missing",
                f"The header of {volume.path} does not say how its axes lie in the patient (its qform and sform codes "
                "are 0): left and right are a guess.",
                "Export it again from its DICOM series; if it is known how it lies, write that into the header.",
                "warning",
            )

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
        counts = value_counts(sitk.GetArrayViewFromImage(volume.image))
        found = {int(value) for value in counts if math.isfinite(value) and value == int(value)}
        unknown = found - (found if allowed is None else allowed)
        if len(found) < len(counts):
            fractions = [value for value in counts if value not in found]
            self.add(
                "label_not_integer",
                f"The label {path} holds values that are no integers: {listed(fractions)}.",
                "Resample labels with nearest neighbours, and save them as integers.",
            )
        else:
            self.label_record = LabelRecord.of(volume.image, counts)
            self._stored_as_integers(volume)
        if unknown:
            self.add(
                "label_values",
                f"The label {path} holds values that have no name: {listed(sorted(unknown))} "
                f"(named are {listed(sorted(allowed or ()))}).",
                "Name them, or give those voxels a named value.",
            )
        if set(counts) == {0}:
            message = f"The label {path} is background everywhere."
            self.add("empty_label", message, "Use the case as unlabelled if that is not meant.", "warning")
        if self.reference is not None:
            self._same_grid("label", path, Grid.of(volume.image))

    def _stored_as_integers(self, volume: Volume) -> None:
        kind = volume.image.GetPixelIDTypeAsString()
        if "float" in kind:
            message = f"The label {volume.path} stores whole numbers as {kind}, which not every tool takes for a label."
            mend = _MENDED if self.repairs else "Save it as integers; `diffseg convert` does so in its copy."
            self.add("label_float", message, mend, "warning")

    def _same_grid(self, kind: str, path: Path, grid: Grid) -> None:
        """Compare size, spacing (mm), origin (mm) and direction cosines with those of the case's first image."""
        shown, reference = self.reference
        differences = grid.differences(reference)
        if not differences:
            return
        if "size" not in differences and (off := grid.displacement_voxels(reference)) <= JITTER_VOXELS:
            self._report_jitter(kind, path, list(differences), off)
            return
        for name, tolerance in differences.items():
            allowed = f"; {tolerance:.2g} is tolerated" if tolerance else ""
            self.add(
                f"{kind}_{name}",
                f"The {kind} {path} has the {name} {numbers(getattr(grid, name))} {_UNITS[name]}, but its image "
                f"{shown} has {numbers(getattr(reference, name))}{allowed}: their voxels do not correspond.",
                "Resample it to the image's grid, or export both again.",
            )

    def _report_jitter(self, kind: str, path: Path, names: Sequence[str], off: float) -> None:
        """A difference as rounding makes it: nnU-Net overlooks it in origin and direction, and stops at spacings."""
        message = f"The {kind} {path} lies up to {off:.2g} voxels off its image {self.reference[0]}: "
        message += f"their headers differ in {' and '.join(names)}, as rounding makes them."
        stops = "spacing" in names
        if stops and not self.repairs:
            message += f" nnU-Net stops at spacings that differ by more than {TOLERANCE_SPACING_RELATIVE:.3%}."
        mend = _MENDED if self.repairs else "Give it the image's header; `diffseg convert` does so in its copy."
        self.add(f"{kind}_jitter", message, mend, "error" if stops and not self.repairs else "warning")

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
