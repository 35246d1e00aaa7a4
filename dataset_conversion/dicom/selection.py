"""Which series of a tree are the images, and why the others are not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from .index import RTSTRUCT, SEGMENTATIONS, Series
from .planes import CLASSIC_IMAGES, ENHANCED_IMAGES

MODALITIES = ("CT", "MR")
_LOCALIZERS = {"LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW", "SCANOGRAM"}
_SECONDARY_CAPTURES = "1.2.840.10008.5.1.4.1.1.7"


@dataclass(frozen=True)
class Wanted:
    """What the user asks for.

    Attributes:
        modality: CT or MR.
        description: pattern that is searched for in SeriesDescription; None: any.
        derived: series that are marked as derived are wanted, too.
    """

    modality: str
    description: re.Pattern[str] | None
    derived: bool


def is_annotation(series: Series) -> bool:
    """Whether it consists of RTSTRUCT or DICOM SEG objects."""
    return series.first.sop_class == RTSTRUCT or series.first.sop_class in SEGMENTATIONS


def image_modality(series: Series) -> str | None:
    """CT or MR, where the series' objects are such images."""
    return (CLASSIC_IMAGES | ENHANCED_IMAGES).get(series.first.sop_class)


def pick(
    series: Iterable[Series], wanted: Wanted, annotated: Iterable[str]
) -> tuple[list[Series], Mapping[str, list[str]]]:
    """The image series, and reason -> descriptions of those that were left out.

    A series in `annotated` (UIDs) may be derived: whoever drew on it meant it. Localizers inside a series are dropped.
    """
    annotated = set(annotated)
    picked, left_out = [], {}
    for candidate in series:
        images = _without_localizers(candidate)
        reason = _why_not(candidate, images, wanted, candidate.uid in annotated)
        if reason is None:
            picked.append(images)
        else:
            left_out.setdefault(reason, []).append(candidate.first.description or candidate.folder.name)
    return picked, left_out


def _without_localizers(series: Series) -> Series:
    kept = tuple(
        instance
        for instance in series.instances
        if not _LOCALIZERS & set(instance.image_type) and instance.sop_class == series.first.sop_class
    )
    return replace(series, instances=kept)


def _why_not(series: Series, images: Series, wanted: Wanted, annotated: bool) -> str | None:
    first = series.first
    if image_modality(series) is None:
        if first.sop_class.startswith(_SECONDARY_CAPTURES):
            return "secondary captures"
        return f"no CT or MR images ({first.modality or 'unknown modality'})"
    if image_modality(series) != wanted.modality:
        return f"modality {image_modality(series)}"
    if not images.instances:
        return "localizers"
    if sum(len(instance.planes) for instance in images.instances) < 2:
        return "single images"
    if wanted.description is not None and not wanted.description.search(first.description):
        return "descriptions that do not match --series"
    kind = images.first.image_type
    if "DERIVED" in kind[:1] and not (wanted.derived or annotated):
        return "derived images (--derived takes them)"
    if "SECONDARY" in kind[1:2] and "ORIGINAL" not in kind[:1] and not (wanted.derived or annotated):
        return "secondary images (--derived takes them)"
    return None
