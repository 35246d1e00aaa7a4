"""Checks that see all cases at once, from their records alone: copies, orientations, spacings, labels nobody has."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from diffseg_nnunet.raw_dataset import values_of_labels
from diffseg_nnunet.verification.findings import Finding, Severity, listed, numbers
from diffseg_nnunet.verification.geometry import is_mirrored
from diffseg_nnunet.verification.plausibility import implausible, is_ct
from diffseg_nnunet.verification.records import CaseRecord
from diffseg_nnunet.verification.robust import OUTLIER_Z, robust_z

_FOLDERS = {"training": "imagesTr", "unlabelled": "imagesUn", "test": "imagesTs"}
_NOT_STRUCTURES = ("background", "ignore")
# A whole CT has air at its lower end and a few voxels of metal at its upper one; one that was clipped to a window has
# at least one voxel in 200 at either end, and starts well above air.
_WINDOW_MINIMUM_HU = -900.0


def check_records(
    records: Sequence[CaseRecord], channel_names: Sequence[str], labels: Mapping[str, Any]
) -> list[Finding]:
    """What the records of a data set's cases say against it.

    Args:
        records: in any order; findings follow it.
        channel_names: in channel order.
        labels: name -> value, or values, as in dataset.json; empty leaves them unchecked.
    """
    return [
        *(finding for record in records for finding in implausible(record, channel_names)),
        *_duplicates(records),
        *_orientations(records),
        *_spacings(records),
        *_windows(records, channel_names),
        *_unused_labels(records, labels),
    ]


def _duplicates(records: Iterable[CaseRecord]) -> Iterator[Finding]:
    """Cases with equal voxels in all channels.

    A copy of a training image among the test images is an error: a score on it says what was memorised. A copy in the
    unlabelled pool brings no label with it, and copies within a part only weigh double, unless a split parts them.
    """
    same: dict[tuple[str, ...], list[CaseRecord]] = defaultdict(list)
    for record in records:
        if any(channel.minimum < channel.maximum for channel in record.channels):
            same[record.voxels].append(record)
    for copies in (copies for copies in same.values() if len(copies) > 1):
        shown = listed(f"{record.case} ({_FOLDERS[record.role]})" for record in copies)
        roles = Counter(record.role for record in copies)
        message = f"{len(copies)} cases have the same voxels: {shown}."
        severity: Severity = "warning"
        if roles["training"] and roles["test"]:
            severity = "error"
            message += " A score on a test image that was trained on says nothing."
        elif roles["training"] > 1:
            message += " Where a split parts them, a validation case has been trained on."
            if len({record.label.digest for record in copies if record.label is not None}) > 1:
                message += " Their labels differ."
        elif roles["training"]:
            message += " A fold that validates on it is pretrained without the unlabelled copy."
        elif roles["test"] and roles["unlabelled"]:
            message += " The pretraining would see a test image, though not its label."
        else:
            message += " They would count that many times."
        yield Finding("duplicate_case", copies[0].case, message, "Remove all but one of them.", severity)


def _orientations(records: Sequence[CaseRecord]) -> Iterator[Finding]:
    """nnU-Net trains on arrays as they are stored: what is left in one case must not be right in another."""
    counts = Counter(record.orientation for record in records if record.orientation != "oblique")
    mirrored = Counter(is_mirrored(record.direction) for record in records)
    usual = counts.most_common(1)[0][0] if counts else ""
    if len(counts) > 1 or len(mirrored) > 1:
        counts = Counter(record.orientation for record in records)
        shown = listed(f"{count} {code}" for code, count in counts.most_common())
        others = [record.case for record in records if record.orientation not in (usual, "oblique")]
        message = f"The cases are stored in several orientations (where x, y and z point to): {shown}"
        message += f"; not {usual} are {listed(others)}. " if others else ". "
        message += "nnU-Net does not look at that, so networks see some cases turned"
        message += ", and left and right exchanged." if len(mirrored) > 1 else "."
        mend = (
            f"Bring all into one, e.g. with SimpleITK.DICOMOrient(image, '{usual or 'LPS'}'), images and labels alike."
        )
        yield Finding("mixed_orientations", "", message, mend, "warning")
    elif mirrored[True] and not mirrored[False]:
        message = f"All {len(records)} cases have left-handed axes ({usual or 'oblique'}): as arrays they show the "
        message += "patient in a mirror. Alone they fit together; weights of other data sets may take left for right."
        yield Finding("mirrored_axes", "", message, "Use SimpleITK.DICOMOrient(image, 'LPS') if that matters.", "note")


def _spacings(records: Sequence[CaseRecord]) -> Iterator[Finding]:
    for record, axes in spacing_outliers(records):
        message = f"The spacing {numbers(record.spacing_mm)} mm (z, y, x) of the case '{record.case}' is far from the "
        message += f"others' along {' and '.join(axes)} (robust z-score above {OUTLIER_Z:g})."
        yield Finding("spacing_outlier", record.case, message, "Look whether its header is right.", "note")


def spacing_outliers(records: Sequence[CaseRecord]) -> list[tuple[CaseRecord, list[str]]]:
    """Cases whose spacing is an outlier (`robust.robust_z`), and along which axes ('z', 'y', 'x')."""
    return _axis_outliers(records, [record.spacing_mm for record in records])


def size_outliers(records: Sequence[CaseRecord]) -> list[tuple[CaseRecord, list[str]]]:
    """Cases whose number of voxels along an axis is an outlier, and along which axes."""
    return _axis_outliers(records, [record.size for record in records])


def _axis_outliers(
    records: Sequence[CaseRecord], triples: Sequence[Sequence[float]]
) -> list[tuple[CaseRecord, list[str]]]:
    off = [abs(robust_z([triple[axis] for triple in triples])) > OUTLIER_Z for axis in range(3)]
    axes = [[name for name, outlier in zip("zyx", off, strict=True) if outlier[i]] for i in range(len(records))]
    return [(record, found) for record, found in zip(records, axes, strict=True) if found]


def _windows(records: Sequence[CaseRecord], channel_names: Sequence[str]) -> Iterator[Finding]:
    for number in (number for number, name in enumerate(channel_names) if is_ct(name)):
        channels = [record.channels[number] for record in records if number < len(record.channels)]
        clipped = [
            channel
            for channel in channels
            if _WINDOW_MINIMUM_HU < channel.minimum < 0
            and channel.percentile_00_5 == channel.minimum
            and channel.percentile_99_5 == channel.maximum > channel.minimum
        ]
        if clipped:
            low, high = min(channel.minimum for channel in clipped), max(channel.maximum for channel in clipped)
            message = (
                f"{len(clipped)} of {len(channels)} CTs (channel {number}) end sharply within {low:g} to {high:g} HU: "
            )
            message += "they were clipped to a window. Networks trained on them expect that window of new scans, too."
            mend = "Use the unclipped scans where there are any."
            yield Finding("hu_window", "", message, mend, "note")


def _unused_labels(records: Sequence[CaseRecord], labels: Mapping[str, Any]) -> Iterator[Finding]:
    training = [record.label.volumes_ml for record in records if record.role == "training" and record.label is not None]
    if not training:
        return
    there = {value for volumes in training for value in volumes}
    for name, value in labels.items():
        if name not in _NOT_STRUCTURES and not values_of_labels({name: value}) & there:
            message = (
                f"The label '{name}' ({value}) occurs in none of {len(training)} training cases: it cannot be learnt."
            )
            mend = "Remove it from dataset.json and renumber the others, or add cases that have it."
            yield Finding("label_never_occurs", "", message, mend, "warning")
