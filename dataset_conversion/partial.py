"""Labels that show some structures only, without saying which were looked for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffseg_nnunet.verification.volumes import UnreadableVolumeError

from .sources import Read, VolumeFile

if TYPE_CHECKING:
    import SimpleITK as sitk


@dataclass(frozen=True)
class PartialLabel:
    """A label whose background stands only if all of some structures are in it; else it gets the value `ignore`.

    A structure that is not there may not have been looked for, and may then hide in the background.

    Attributes:
        path: the label file.
        required: (name, value) of the structures that must all occur for the background to stand.
        ignore: what the background becomes otherwise; no voxel of the file may have it.
    """

    path: Path
    required: tuple[tuple[str, int], ...]
    ignore: int

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def keeping(self, names: Collection[str]) -> PartialLabel:
        """The same where only these structures are asked for: others may hide in the background."""
        return replace(self, required=tuple(entry for entry in self.required if entry[0] in names))

    def read(self, read: Read) -> sitk.Image:
        import SimpleITK as sitk

        label = read(VolumeFile(self.path))
        voxels = sitk.GetArrayViewFromImage(label)
        present = np.unique(voxels)
        if self.ignore in present:
            reason = f"it holds the value {self.ignore}, which names no structure"
            raise UnreadableVolumeError(self.path, reason, "label_values", "Download it again.")
        if np.isin([value for _, value in self.required], present).all():
            return label
        masked = sitk.GetImageFromArray(np.where(voxels == 0, voxels.dtype.type(self.ignore), voxels))
        masked.CopyInformation(label)
        return masked
