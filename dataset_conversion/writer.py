"""Writes one case of a conversion: links, copies, re-encodes or splits its files, and checks what has been written."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import SimpleITK as sitk

from diffseg_nnunet.raw_dataset import Case
from diffseg_nnunet.verification import Finding, UnreadableVolumeError, check_case, read_volume, walk_nifti

if TYPE_CHECKING:
    from .core import ConversionPlan, SourceCase

FILE_ENDING = ".nii.gz"
IMAGE_FOLDERS = {"training": "imagesTr", "unlabelled": "imagesUn", "test": "imagesTs"}
LABEL_FOLDERS = {"training": "labelsTr", "test": "labelsTs"}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class CaseWriter:
    """Writes cases into `folder`, and checks what has been written. Used by many threads at once."""

    def __init__(self, plan: ConversionPlan, folder: Path, copy: bool):
        self.folder = folder
        self.copy = copy
        self.channel_count = len(plan.channel_names)
        self.label_values = set(plan.labels.values())
        # one entry a file; appending to a list is safe in threads, counting is not
        self.done: list[str] = []
        used = {IMAGE_FOLDERS[case.role] for case in plan.cases}
        used |= {LABEL_FOLDERS[case.role] for case in plan.cases if case.label is not None}
        for name in sorted({"imagesTr", "labelsTr", *used}):
            (folder / name).mkdir()

    def write(self, case: SourceCase) -> list[Finding]:
        shown_as: dict[Path, Path] = {}
        try:
            images = self._write_images(case, shown_as)
            label = self._write_label(case, shown_as)
        except UnreadableVolumeError as error:
            return [error.as_finding(case.identifier)]
        return check_case(
            Case(case.identifier, images, label),
            channel_count=self.channel_count,
            label_values=self.label_values,
            label_required=case.role == "training",
            shown_as=shown_as,
        )

    def _write_images(self, case: SourceCase, shown_as: dict[Path, Path]) -> tuple[Path, ...]:
        stem = self.folder / IMAGE_FOLDERS[case.role] / case.identifier
        split = len(case.images) == 1 < self.channel_count and _fourth_axis(case.images[0]) == self.channel_count
        sources = case.images * self.channel_count if split else case.images
        targets = [stem.with_name(f"{stem.name}_{channel:04d}{FILE_ENDING}") for channel in range(len(sources))]
        shown_as.update(zip(targets, sources, strict=True))
        volume = read_volume(case.images[0]) if split else None
        for channel, (source, target) in enumerate(zip(sources, targets, strict=True)):
            if volume is None:
                self._transfer(source, target)
            else:
                # SimpleITK's slicing keeps spacing, origin and direction of the first three axes
                self._encode(volume[:, :, :, channel], target)
        return tuple(targets)

    def _write_label(self, case: SourceCase, shown_as: dict[Path, Path]) -> Path | None:
        if case.label is None:
            return None
        target = self.folder / LABEL_FOLDERS[case.role] / f"{case.identifier}{FILE_ENDING}"
        shown_as[target] = case.label
        self._transfer(case.label, target)
        return target

    def _transfer(self, source: Path, target: Path) -> None:
        if not source.name.endswith(FILE_ENDING):
            self._encode(read_volume(source), target)
            return
        if not os.access(source, os.R_OK):
            raise UnreadableVolumeError(source, "it is missing, a link that leads nowhere, or not permitted")
        if not self.copy and link(source, target):
            self.done.append("linked")
            return
        shutil.copyfile(source, target)
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


def _fourth_axis(path: Path) -> int:
    """Length of a 4D file's last axis by its header, else 0: what is wrong with the file, the case's check tells."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return 0
    return reader.GetSize()[3] if reader.GetDimension() == 4 else 0


def link(source: Path, target: Path) -> bool:
    """Hard-link a file (what a link leads to, never the link itself); False where the file system does not allow it."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        return False
    return True
