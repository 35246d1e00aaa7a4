"""What can be read but is hardly meant: spacings and CT numbers that no scanner gives. Warnings, from records alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from diffseg_nnunet.verification.findings import Finding, numbers
from diffseg_nnunet.verification.records import CaseRecord, ChannelRecord

# micro-CT goes below, and a gap between slices beyond
SPACING_RANGE_MM = (0.05, 20.0)
LARGEST_ANISOTROPY = 20.0
# the matrix of clinical scanners, whose field of view of 512 mm and whose slices of just as much are not to be expected
_CT_MATRIX = 512

CT = "ct"
# With air at -1000 any scan of a body has voxels below 0, if only fat; rounding and interpolation may leave a few HU.
OFFSET_MINIMUM_HU = -10.0
OFFSET_MAXIMUM_HU = 2000.0
OFFSET_BRIGHT_HU = 1000.0  # at the 99.5th percentile, even of a windowed scan: dense bone, or soft tissue plus 1024
EIGHT_BIT = (100.0, 255.0)
# 16 bits, and what marks the outside of the field of view in them
LARGEST_HU = 32767.0


def is_ct(channel_name: str) -> bool:
    """Whether nnU-Net takes a channel of this name for CT numbers (Hounsfield units)."""
    return channel_name.casefold() == CT


def implausible(record: CaseRecord, channel_names: Sequence[str]) -> Iterator[Finding]:
    """Warnings about one case.

    Args:
        channel_names: in channel order; more or fewer than the record's channels are compared as far as they go.
    """
    yield from _spacing(record, any(map(is_ct, channel_names)))
    for number, (name, channel) in enumerate(zip(channel_names, record.channels, strict=False)):
        if is_ct(name) and channel.minimum < channel.maximum:
            yield from _hounsfield(record.case, number, channel)


def _spacing(record: CaseRecord, is_a_ct: bool) -> Iterator[Finding]:
    # across a single slice, the spacing is whatever the exporter wrote
    spacings = [mm for extent, mm in zip(record.size, record.spacing_mm, strict=True) if extent > 1]
    shown = numbers(record.spacing_mm)
    low, high = SPACING_RANGE_MM
    again = "Export it again from its source, or mend the spacing in its header."
    if any(not low <= mm <= high for mm in spacings):
        message = (
            f"The case '{record.case}' has the spacing {shown} mm (z, y, x); {low:g} to {high:g} mm are plausible."
        )
        yield Finding("implausible_spacing", record.case, message, again, "warning")
    elif spacings and max(spacings) / min(spacings) > LARGEST_ANISOTROPY:
        ratio = max(spacings) / min(spacings)
        message = f"The case '{record.case}' has the spacing {shown} mm (z, y, x), {ratio:.0f} times as much along one "
        message += "axis as along another: in 3D, little connects its slices."
        yield Finding(
            "anisotropy", record.case, message, "If it is right, `-c 2d` may do better than 3d_fullres.", "warning"
        )
    elif is_a_ct and record.spacing_mm == (1.0, 1.0, 1.0) and record.size.count(_CT_MATRIX) >= 2:
        message = f"The case '{record.case}' is a CT of {_CT_MATRIX}×{_CT_MATRIX} voxels a slice and has exactly "
        message += "1×1×1 mm: its header was probably lost on the way, and lengths and volumes with it."
        yield Finding("lost_spacing", record.case, message, again, "warning")


def _hounsfield(case: str, number: int, channel: ChannelRecord) -> Iterator[Finding]:
    where = f"Channel {number} of the case '{case}' is named CT, but holds {channel.minimum:g} to {channel.maximum:g}"
    rescale = "Convert the DICOM series again with its rescale slope and intercept"
    if channel.minimum <= -LARGEST_HU - 1 or channel.maximum > LARGEST_HU:
        message = f"{where}: no CT number, perhaps a mark of what lies outside the field of view."
        yield Finding("hu_huge", case, message, "Give those voxels the value of air, -1000.", "warning")
    elif channel.minimum >= OFFSET_MINIMUM_HU and (
        channel.maximum > OFFSET_MAXIMUM_HU or channel.percentile_99_5 > OFFSET_BRIGHT_HU
    ):
        message = f"{where} and nothing below: air seems to be at 0 instead of -1000, so that other CTs do not compare."
        yield Finding("hu_offset", case, message, f"{rescale}, or subtract 1024 from every voxel.", "warning")
    elif channel.whole_numbers and channel.minimum >= 0 and EIGHT_BIT[0] <= channel.maximum <= EIGHT_BIT[1]:
        message = f"{where}, whole numbers of 8 bits: a grey image, no CT numbers, and the window is not known."
        mend = f"{rescale}; if that cannot be, call the channel by another name, which normalises each image by itself."
        yield Finding("hu_8bit", case, message, mend, "warning")
