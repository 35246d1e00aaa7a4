"""Writes one case of a conversion: reads and checks it, then links, copies or re-encodes its files."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import SimpleITK as sitk

from diffseg_nnunet.atomic import DISK_FULL, flush_to_disk
from diffseg_nnunet.verification import CaseRecord, Finding, UnreadableVolumeError, Volume, examine, walk_nifti

from .repair import MENDED, mended_geometry, refused, renumbered, renumbered_record
from .sources import VolumeFile

if TYPE_CHECKING:
    from .description import ConversionPlan, SourceCase
    from .sources import VolumeSource

FILE_ENDING = ".nii.gz"
IMAGE_FOLDERS = {"training": "imagesTr", "unlabelled": "imagesUn", "test": "imagesTs"}
LABEL_FOLDERS = {"training": "labelsTr", "test": "labelsTs"}


@dataclass(frozen=True)
class Handling:
    """How files are treated.

    Attributes:
        copy: never link, so that the data set is independent of its source.
        verify: read and check every file; else what needs no change is linked unread.
        repair: mend what can be mended (see `repair`); else it is an error.
    """

    copy: bool = False
    verify: bool = True
    repair: bool = True


@dataclass(frozen=True)
class Written:
    """What became of a case.

    Attributes:
        case: its identifier.
        findings: about it; with an error among them, no file was written.
        files: path within the data set -> 'linked', 'copied' or 'encoded'.
        record: what the case is, with labels as they are written; None where it was not read.
    """

    case: str
    findings: tuple[Finding, ...]
    files: dict[str, str]
    record: CaseRecord | None = None

    @property
    def is_bad(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)


class CaseWriter:
    """Reads a case, checks it, and writes it into `folder`; without state, for many threads at once."""

    def __init__(self, plan: ConversionPlan, folder: Path, handling: Handling):
        self.plan, self.folder, self.handling = plan, folder, handling
        for name in folders(plan):
            (folder / name).mkdir(exist_ok=True)

    def write(self, case: SourceCase) -> Written:
        """Write a case, unless one of its findings is an error."""
        values = self.plan.values(case)
        if not self.handling.verify:
            return self._unread(case, values)
        volumes, findings = _read(case, case.sources)
        if findings:
            return Written(case.identifier, tuple(findings), {})
        images, label = volumes[: len(case.images)], volumes[len(case.images)] if case.label else None
        examination = examine(
            case.identifier,
            images,
            label,
            channel_count=len(self.plan.channel_names),
            label_values=set(values),
            label_required=case.role == "training",
            role=case.role,
            repairs=True,
        )
        if any(finding.severity == "error" for finding in examination.findings):
            return Written(case.identifier, examination.findings, {})
        written = self._checked(case, images, label, examination.findings, values)
        return replace(written, record=renumbered_record(examination.record, values))

    def _checked(
        self, case: SourceCase, images: list[Volume], label: Volume | None, findings: Sequence[Finding], values: dict
    ) -> Written:
        """Mend what needs it, and publish all files of a case that has no error."""
        mended, more = mended_geometry(case.identifier, images, "channel")
        ready: dict[Path, tuple[VolumeSource, sitk.Image | None]] = {}
        for source, image, new, path in zip(case.images, images, mended, image_paths(case), strict=True):
            ready[path] = source, None if new is image.image and is_linkable(source) else new
        if label is not None:
            (_, aligned), off_grid = mended_geometry(case.identifier, [images[0], label], "label")
            new = renumbered(Volume(label.path, aligned), values)
            more += off_grid
            ready[label_path(case)] = case.label, None if new is label.image and is_linkable(case.label) else new
        # the checks have reported what is more than rounding
        told = {finding.code for finding in findings}
        findings = [*findings, *(finding for finding in more if finding.code not in told)]
        if not self.handling.repair:
            findings = refused(findings)
            if any(finding.code in MENDED for finding in findings):
                return Written(case.identifier, tuple(findings), {})
        files = {path.as_posix(): self._publish(*what, self.folder / path) for path, what in ready.items()}
        return Written(case.identifier, tuple(findings), files)

    def _unread(self, case: SourceCase, values: dict[int, int]) -> Written:
        """Publish a case without looking at what needs no change."""
        files: dict[str, str] = {}
        if len(case.images) != len(self.plan.channel_names):
            wrong = f"{len(case.images)} image(s), the data set {len(self.plan.channel_names)} channel(s)"
            message = f"The case '{case.identifier}' has {wrong}."
            return self._withdrawn(case, Finding("channel_count", case.identifier, message, "Mend its files."), files)
        sources = dict(zip(image_paths(case), case.images, strict=True))
        if case.label is not None:
            sources[label_path(case)] = case.label
        for path, source in sources.items():
            renumber = source is case.label and not is_identity(values)
            if is_linkable(source) and not renumber:
                if not source.path.is_file():
                    error = UnreadableVolumeError(source.path, "there is no such file", "missing_file")
                    return self._withdrawn(case, error, files)
                files[path.as_posix()] = self._publish(source, None, self.folder / path)
                continue
            volumes, findings = _read(case, [source])
            if findings:
                return self._withdrawn(case, findings[0], files)
            try:
                image = renumbered(volumes[0], values) if source is case.label else volumes[0].image
            except UnreadableVolumeError as error:
                return self._withdrawn(case, error, files)
            files[path.as_posix()] = self._publish(source, image, self.folder / path)
        return Written(case.identifier, (), files)

    def _withdrawn(
        self, case: SourceCase, reason: UnreadableVolumeError | Finding, files: Mapping[str, str]
    ) -> Written:
        for path in files:
            (self.folder / path).unlink()
        finding = reason if isinstance(reason, Finding) else reason.as_finding(case.identifier)
        return Written(case.identifier, (finding,), {})

    def _publish(self, source: VolumeSource, volume: sitk.Image | None, target: Path) -> str:
        """Link or copy the source where there is no volume to encode instead; says what it did."""
        # an earlier, killed run may have linked the source here: writing into it would change the source
        target.unlink(missing_ok=True)
        if volume is not None:
            _encode(volume, target)
            return "encoded"
        if not self.handling.copy and link(source.path, target):
            return "linked"
        shutil.copyfile(source.path, target)
        flush_to_disk(target)
        return "copied"


def folders(plan: ConversionPlan) -> list[str]:
    """The subfolders a data set needs; nnU-Net wants imagesTr and labelsTr even where they are empty."""
    used = {IMAGE_FOLDERS[case.role] for case in plan.cases}
    used |= {LABEL_FOLDERS[case.role] for case in plan.cases if case.label is not None}
    return sorted({"imagesTr", "labelsTr", *used})


def image_paths(case: SourceCase) -> list[Path]:
    """Where the images of a case go, within the data set; one a channel."""
    folder = Path(IMAGE_FOLDERS[case.role])
    return [folder / f"{case.identifier}_{channel:04d}{FILE_ENDING}" for channel in range(len(case.images))]


def label_path(case: SourceCase) -> Path:
    """Where the label of a case goes, within the data set."""
    return Path(LABEL_FOLDERS[case.role]) / f"{case.identifier}{FILE_ENDING}"


def is_linkable(source: VolumeSource) -> bool:
    """Whether the source is a file that may stay as it is, if its voxels and its header may."""
    return isinstance(source, VolumeFile) and source.path.name.endswith(FILE_ENDING)


def is_identity(values: Mapping[int, int]) -> bool:
    """Whether renumbering changes nothing."""
    return all(value == new for value, new in values.items())


def link(source: Path, target: Path) -> bool:
    """Hard-link a file (what a link leads to, never the link itself); False where the file system does not allow it."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        return False
    return True


def _read(case: SourceCase, sources: Sequence[VolumeSource]) -> tuple[list[Volume], list[Finding]]:
    """The volumes, or what is wrong with those that cannot be read."""
    read = _Remembering()
    volumes: list[Volume] = []
    # channels of one file are broken together
    findings: dict[Finding, None] = {}
    for source in sources:
        try:
            volumes.append(Volume(source.files[0], read(source)))
        except UnreadableVolumeError as error:
            findings[error.as_finding(case.identifier)] = None
        except (RuntimeError, ValueError, OSError) as error:
            # what SimpleITK and numpy raise on files that a source did not check itself
            wrapped = UnreadableVolumeError(source.files[0], str(error))
            findings[wrapped.as_finding(case.identifier)] = None
    return volumes, list(findings)


def _encode(volume: sitk.Image, target: Path) -> None:
    """Write a compressed NIfTI and look at the result: SimpleITK reports success even when the disk is full."""
    try:
        sitk.WriteImage(volume, str(target), True)
        walk_nifti(target)
        flush_to_disk(target)
    except (RuntimeError, UnreadableVolumeError) as error:
        voxel_bytes = volume.GetSizeOfPixelComponent() * volume.GetNumberOfComponentsPerPixel()
        full = shutil.disk_usage(target.parent).free < volume.GetNumberOfPixels() * voxel_bytes
        number = errno.ENOSPC if full else errno.EIO
        raise OSError(number, os.strerror(number), str(target)) from error


class _Remembering:
    """Reads each source of one case once."""

    def __init__(self) -> None:
        self._read: dict[VolumeSource, sitk.Image] = {}

    def __call__(self, source: VolumeSource) -> sitk.Image:
        if source not in self._read:
            self._read[source] = source.read(self)
        return self._read[source]
