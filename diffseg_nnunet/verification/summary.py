"""What a data set is like: sizes, spacings, orientations, intensities, labels, and cases unlike the rest."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffseg_nnunet.raw_dataset import values_of_labels
from diffseg_nnunet.verification.across import size_outliers, spacing_outliers
from diffseg_nnunet.verification.records import ROLES, CaseRecord
from diffseg_nnunet.verification.robust import LEAST_CASES, OUTLIER_Z, robust_z

OUTLIER_RULE = (
    f"Outliers lie more than {OUTLIER_Z:g} robust standard deviations (by the median absolute deviation, of logarithms)"
    f" off the median; among fewer than {LEAST_CASES} cases none is named."
)


@dataclass(frozen=True)
class Spread:
    """Median and range over cases."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class ChannelSummary:
    """A channel over all cases: each case's minimum, percentiles, maximum and mean, spread over cases."""

    name: str
    pixel_types: dict[str, int]
    minimum: Spread
    percentile_00_5: Spread
    median: Spread
    percentile_99_5: Spread
    maximum: Spread
    mean: Spread


@dataclass(frozen=True)
class LabelSummary:
    """A structure over the labelled training cases.

    Attributes:
        name: as in dataset.json.
        values: its value, or those of a region.
        cases: how many have it.
        volume_ml: over those; None where there is none.
        outliers: (case, volume in ml), ascending by volume.
    """

    name: str
    values: tuple[int, ...]
    cases: int
    volume_ml: Spread | None
    outliers: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class DatasetSummary:
    """What `diffseg dataset` shows.

    Attributes:
        cases: role -> how many could be read.
        labelled: training cases with a label, which the labels are counted in.
        size: axis ('z', 'y', 'x' of the array) -> voxels.
        spacing_mm: axis -> mm.
        orientations: where x, y and z point to -> cases.
        channels: in channel order.
        labels: in the order of dataset.json, without the background.
        size_outliers, spacing_outliers: case -> axes.
    """

    cases: dict[str, int]
    labelled: int
    size: dict[str, Spread]
    spacing_mm: dict[str, Spread]
    orientations: dict[str, int]
    channels: tuple[ChannelSummary, ...]
    labels: tuple[LabelSummary, ...]
    size_outliers: dict[str, list[str]]
    spacing_outliers: dict[str, list[str]]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "outlier_rule": OUTLIER_RULE}


def summarise(records: Sequence[CaseRecord], channel_names: Sequence[str], labels: Mapping[str, Any]) -> DatasetSummary:
    """Summarise at least one record; `channel_names` in channel order, `labels` as in dataset.json."""
    labelled = [record for record in records if record.role == "training" and record.label is not None]
    structures = {name: tuple(sorted(values_of_labels({name: value}))) for name, value in labels.items()}
    return DatasetSummary(
        cases={role: sum(record.role == role for record in records) for role in ROLES},
        labelled=len(labelled),
        size=_by_axis([record.size for record in records]),
        spacing_mm=_by_axis([record.spacing_mm for record in records]),
        orientations=dict(Counter(record.orientation for record in records).most_common()),
        channels=tuple(_channel(records, number, name) for number, name in enumerate(channel_names)),
        labels=tuple(_label(labelled, name, values) for name, values in structures.items() if values != (0,)),
        size_outliers={record.case: axes for record, axes in size_outliers(records)},
        spacing_outliers={record.case: axes for record, axes in spacing_outliers(records)},
    )


def _by_axis(triples: Sequence[Sequence[float]]) -> dict[str, Spread]:
    return {axis: Spread.of(values) for axis, values in zip("zyx", zip(*triples, strict=True), strict=True)}


def _channel(records: Sequence[CaseRecord], number: int, name: str) -> ChannelSummary:
    channels = [record.channels[number] for record in records if number < len(record.channels)]
    measures = ("minimum", "percentile_00_5", "median", "percentile_99_5", "maximum", "mean")
    return ChannelSummary(
        name,
        dict(Counter(channel.pixel_type for channel in channels).most_common()),
        **{measure: Spread.of(getattr(channel, measure) for channel in channels) for measure in measures},
    )


def _label(labelled: Sequence[CaseRecord], name: str, values: tuple[int, ...]) -> LabelSummary:
    volumes = {record.case: sum(record.label.volumes_ml.get(value, 0.0) for value in values) for record in labelled}
    there = {case: volume for case, volume in volumes.items() if volume > 0}
    off = robust_z(list(there.values()))
    outliers = [entry for entry, z in zip(there.items(), off, strict=True) if abs(z) > OUTLIER_Z]
    return LabelSummary(
        name,
        values,
        len(there),
        Spread.of(there.values()) if there else None,
        tuple(sorted(outliers, key=lambda entry: entry[1])),
    )
