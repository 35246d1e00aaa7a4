"""What is mended while a case is written: geometry that differs by less than is tolerated, and labels kept as floats.

The checks (`verification.examine`) decide what is an error. Where they find none, a grid that is not quite the first
image's differs by less than they tolerate (1e-3 mm in the origin, 1e-3 in direction cosines, 1e-5 of the spacing), or
by what they call a jitter (no voxel is off by more than `JITTER_VOXELS`): the voxels correspond, and the written copy
gets the first image's header.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import SimpleITK as sitk

from diffseg_nnunet.verification import CaseRecord, Finding, UnreadableVolumeError, Volume, listed

# two exports of one float32 header differ by this much, which nobody notices: rewriting such files would gain nothing
ROUNDING_RELATIVE = 1e-6
ROUNDING_MM = 1e-6
JITTER = {"label": "label_jitter", "channel": "channel_jitter"}
MENDED = frozenset({*JITTER.values(), "label_float"})
HOW_MENDED = "The written copy is mended."


def mended_geometry(identifier: str, volumes: Sequence[Volume], kind: str) -> tuple[list[sitk.Image], list[Finding]]:
    """The images of `volumes` on the grid of the first one, the very images where they are on it up to rounding.

    Args:
        identifier: of the case.
        volumes: they have passed the checks, so that what differs is within tolerance.
        kind: a key of JITTER: what the volumes after the first one are.
    """
    reference, mended, findings = volumes[0].image, [volumes[0].image], []
    for volume in volumes[1:]:
        off = [name for name in ("spacing", "origin", "direction") if not _equal(name, volume.image, reference)]
        if off:
            message = f"{volume.path} differs slightly from {volumes[0].path} in its {' and '.join(off)}."
            findings.append(Finding(JITTER[kind], identifier, message, HOW_MENDED, "warning"))
            # a shallow copy that owns its header, so that what was read stays as it was
            copy = sitk.Image(volume.image)
            copy.CopyInformation(reference)
            mended.append(copy)
        else:
            mended.append(volume.image)
    return mended, findings


def is_float(image: sitk.Image) -> bool:
    return image.GetPixelID() in (sitk.sitkFloat32, sitk.sitkFloat64)


def renumbered(label: Volume, values: Mapping[int, int]) -> sitk.Image:
    """A label with its values mapped, as unsigned integers; the very image where it holds integers and none changes.

    Args:
        label: 3D.
        values: value -> value to write, 0 to 65535.

    Raises:
        UnreadableVolumeError: it holds a value that is not in `values`.
    """
    kind = np.uint8 if max(values.values()) < 256 else np.uint16
    known = np.array(sorted(values))
    targets = np.array([values[value] for value in sorted(values)], kind)
    voxels = sitk.GetArrayViewFromImage(label.image)
    mapped = np.empty(voxels.shape, kind)
    changed = is_float(label.image)
    # plane by plane: the index of every voxel takes eight bytes
    for plane, source in zip(mapped, voxels, strict=True):
        index = np.minimum(np.searchsorted(known, source), len(known) - 1)
        if (known[index] != source).any():
            unknown = np.setdiff1d(source, known).tolist()
            reason = f"it holds the values {listed(unknown)}, which have no name (named are {listed(known.tolist())})"
            raise UnreadableVolumeError(label.path, reason, "label_values", "Name them, or mend the label.")
        plane[...] = targets[index]
        changed = changed or bool((plane != source).any())
    if not changed:
        return label.image
    image = sitk.GetImageFromArray(mapped)
    image.CopyInformation(label.image)
    return image


def renumbered_record(record: CaseRecord | None, values: Mapping[int, int]) -> CaseRecord | None:
    """What is known of a case, with its label's values mapped as :func:`renumbered` maps the voxels."""
    if record is None or record.label is None:
        return record
    volumes: dict[int, float] = {}
    for value, volume in record.label.volumes_ml.items():
        if values[value]:
            volumes[values[value]] = volumes.get(values[value], 0.0) + volume
    return replace(record, label=replace(record.label, volumes_ml=volumes))


def refused(findings: Sequence[Finding]) -> list[Finding]:
    """The same findings, those that could be mended as errors: for users who want nothing mended."""
    return [
        Finding(each.code, each.case, each.message, "Export it again, or let it be mended (without --no-repair).")
        if each.code in MENDED
        else each
        for each in findings
    ]


def _equal(name: str, image: sitk.Image, reference: sitk.Image) -> bool:
    values, expected = (np.array(getattr(each, f"Get{name.capitalize()}")()) for each in (image, reference))
    return np.allclose(values, expected, rtol=ROUNDING_RELATIVE, atol=ROUNDING_MM)
