"""What there is to know about a case once it has been read: small, comparable, and storable as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import SimpleITK as sitk

from diffseg_nnunet.verification.geometry import Grid, orientation_code
from diffseg_nnunet.verification.voxels import digest, distribution

Role = Literal["training", "unlabelled", "test"]
ROLES: tuple[Role, ...] = ("training", "unlabelled", "test")


@dataclass(frozen=True)
class ChannelRecord:
    """One channel.

    Attributes:
        pixel_type: as SimpleITK calls it, e.g. '16-bit signed integer'.
        minimum, maximum, mean, percentile_00_5, median, percentile_99_5: over all voxels, in the file's intensities.
        whole_numbers: no voxel has a fraction.
        digest: of the voxels, the same in whatever format and type they are stored.
    """

    pixel_type: str
    minimum: float
    maximum: float
    mean: float
    percentile_00_5: float
    median: float
    percentile_99_5: float
    whole_numbers: bool
    digest: str

    @classmethod
    def of(cls, volume: sitk.Image) -> ChannelRecord:
        """Of a 3D volume of finite scalars."""
        voxels = sitk.GetArrayViewFromImage(volume)
        found = distribution(voxels)
        return cls(
            volume.GetPixelIDTypeAsString(),
            found.minimum,
            found.maximum,
            found.mean,
            *found.percentiles,
            found.whole_numbers,
            digest(voxels),
        )


@dataclass(frozen=True)
class LabelRecord:
    """A label map.

    Attributes:
        pixel_type: as in `ChannelRecord`.
        volumes_ml: value, other than 0, that occurs -> its volume in ml.
        digest: as in `ChannelRecord`.
    """

    pixel_type: str
    volumes_ml: dict[int, float]
    digest: str

    @classmethod
    def of(cls, volume: sitk.Image, counts: Mapping[float, int]) -> LabelRecord:
        """Of a 3D label map of whole numbers, and the number of voxels of each value."""
        x, y, z = volume.GetSpacing()
        volumes = {int(value): count * x * y * z / 1000 for value, count in counts.items() if value != 0}
        return cls(volume.GetPixelIDTypeAsString(), volumes, digest(sitk.GetArrayViewFromImage(volume)))


@dataclass(frozen=True)
class CaseRecord:
    """One case; its geometry is that of its first image.

    Attributes:
        case: the case identifier.
        role: what it is for.
        size: voxels, in array order (z, y, x).
        spacing_mm: in array order (z, y, x).
        origin_mm: of the first voxel's centre, (x, y, z) in the patient's left-posterior-superior frame.
        direction: nine cosines, row by row; the columns are the axes x, y, z in that frame.
        orientation: where x, y, z point to, e.g. 'LPS' or 'RAS'; 'oblique' where that is not clear.
        direction_stated: False where the header says nothing about it, and the reader has assumed something.
        channels: in channel order.
        label: None where there is none.
    """

    case: str
    role: Role
    size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    direction: tuple[float, ...]
    orientation: str
    direction_stated: bool
    channels: tuple[ChannelRecord, ...]
    label: LabelRecord | None

    @property
    def voxels(self) -> tuple[str, ...]:
        """Digests of its channels: the same for copies of its images, and for these alone."""
        return tuple(channel.digest for channel in self.channels)

    @classmethod
    def of(
        cls,
        case: str,
        role: Role,
        grid: Grid,
        stated: bool,
        channels: Sequence[ChannelRecord],
        label: LabelRecord | None,
    ) -> CaseRecord:
        """Put together from its parts, `grid` being the first image's."""
        return cls(
            case,
            role,
            grid.size[::-1],
            grid.spacing[::-1],
            grid.origin,
            grid.direction,
            orientation_code(grid.direction),
            stated,
            tuple(channels),
            label,
        )

    def to_json(self) -> dict[str, Any]:
        """As stored; the inverse is :meth:`from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> CaseRecord:
        """Raises KeyError, TypeError or ValueError where `stored` is not what :meth:`to_json` gives."""
        sequences = {name: tuple(stored[name]) for name in ("size", "spacing_mm", "origin_mm", "direction")}
        channels = tuple(ChannelRecord(**channel) for channel in stored["channels"])
        label = stored["label"]
        if label is not None:
            volumes = {int(value): float(volume) for value, volume in label["volumes_ml"].items()}
            label = LabelRecord(**{**label, "volumes_ml": volumes})
        return cls(**{**stored, **sequences, "channels": channels, "label": label})
