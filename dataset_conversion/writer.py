"""Writes one case of a conversion: reads and checks it, then links, copies or re-encodes its files."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import SimpleITK as sitk

from diffseg_nnunet.verification import Finding, UnreadableVolumeError, Volume, examine, walk_nifti

from .sources import VolumeFile

if TYPE_CHECKING:
    from .description import ConversionPlan, SourceCase
    from .sources import VolumeSource

FILE_ENDING = ".nii.gz"
IMAGE_FOLDERS = {"training": "imagesTr", "unlabelled": "imagesUn", "test": "imagesTs"}
LABEL_FOLDERS = {"training": "labelsTr", "test": "labelsTs"}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class CaseWriter:
    """Reads a case, checks it, and writes it into `folder`. Used by many threads at once."""

    def __init__(self, plan: ConversionPlan, folder: Path, copy: bool):
        self.plan = plan
        self.folder = folder
        self.copy = copy
        # one entry a file; appending to a list is safe in threads, counting is not
        self.done: list[str] = []
        used = {IMAGE_FOLDERS[case.role] for case in plan.cases}
        used |= {LABEL_FOLDERS[case.role] for case in plan.cases if case.label is not None}
        for name in sorted({"imagesTr", "labelsTr", *used}):
            (folder / name).mkdir()

    def write(self, case: SourceCase) -> list[Finding]:
        """The findings about a case; it is written unless one of them is an error."""
        read = _Remembering()
        findings: list[Finding] = []

        def volume(source: VolumeSource) -> Volume | None:
            try:
                return Volume(source.files[0], read(source))
            except UnreadableVolumeError as error:
                # channels of one file are broken together
                if (finding := error.as_finding(case.identifier)) not in findings:
                    findings.append(finding)
                return None

        images = [volume(source) for source in case.images]
        label = volume(case.label) if case.label is not None else None
        if findings:
            return findings
        values = self.plan.values(case)
        findings += examine(
            case.identifier,
            images,
            label,
            channel_count=len(self.plan.channel_names),
            label_values=set(values),
            label_required=case.role == "training",
            role=case.role,
        ).findings
        if any(finding.severity == "error" for finding in findings):
            return findings
        stem = self.folder / IMAGE_FOLDERS[case.role] / case.identifier
        for channel, (source, image) in enumerate(zip(case.images, images, strict=True)):
            self._publish(source, image.image, stem.with_name(f"{stem.name}_{channel:04d}{FILE_ENDING}"))
        if label is not None:
            remapped = renumbered(label.image, values)
            target = self.folder / LABEL_FOLDERS[case.role] / f"{case.identifier}{FILE_ENDING}"
            self._publish(case.label if remapped is label.image else None, remapped, target)
        return findings

    def _publish(self, source: VolumeSource | None, volume: sitk.Image, target: Path) -> None:
        """Link or copy the source where it is a file that may stay as it is, else encode the volume."""
        if not isinstance(source, VolumeFile) or not source.path.name.endswith(FILE_ENDING):
            self._encode(volume, target)
        elif not self.copy and link(source.path, target):
            self.done.append("linked")
        else:
            shutil.copyfile(source.path, target)
            self.done.append("copied")

    def _encode(self, volume: sitk.Image, target: Path) -> None:
        """Write a compressed NIfTI and look at the result: SimpleITK reports success even when the disk is full."""
        try:
            sitk.WriteImage(volume, str(target), True)
            walk_nifti(target)
        except (RuntimeError, UnreadableVolumeError) as error:
            voxel_bytes = volume.GetSizeOfPixelComponent() * volume.GetNumberOfComponentsPerPixel()
            full = shutil.disk_usage(self.folder).free < volume.GetNumberOfPixels() * voxel_bytes
            number = errno.ENOSPC if full else errno.EIO
            raise OSError(number, os.strerror(number), str(target)) from error
        self.done.append("encoded")


class _Remembering:
    """Reads each source of one case once."""

    def __init__(self) -> None:
        self._read: dict[VolumeSource, sitk.Image] = {}

    def __call__(self, source: VolumeSource) -> sitk.Image:
        if source not in self._read:
            self._read[source] = source.read(self)
        return self._read[source]


def renumbered(label: sitk.Image, values: Mapping[int, int]) -> sitk.Image:
    """A label with its values mapped; the very image where no voxel changes.

    Args:
        label: 3D, whole numbers, all of them in `values`.
        values: value -> value to write, 0 to 65535.
    """
    voxels = sitk.GetArrayViewFromImage(label)
    present, where = np.unique(voxels, return_inverse=True)
    target = np.array([values[int(value)] for value in present])
    if np.array_equal(present, target):
        return label
    kind = np.uint8 if max(values.values()) < 256 else np.uint16
    mapped = sitk.GetImageFromArray(target.astype(kind)[where].reshape(voxels.shape))
    mapped.CopyInformation(label)
    return mapped


def link(source: Path, target: Path) -> bool:
    """Hard-link a file (what a link leads to, never the link itself); False where the file system does not allow it."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        return False
    return True
