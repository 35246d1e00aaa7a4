"""Which annotation labels which stack of images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from diffseg_nnunet.verification import UnreadableVolumeError

from . import rtstruct, segmentation
from .annotations import Annotation, Drawn, DrawnLabel
from .index import RTSTRUCT, Series
from .planes import Plane
from .selection import image_modality
from .series import DAMAGED, DicomSeries
from .stack import split
from .structures import label_of


@dataclass(frozen=True)
class ImageStack:
    """One case's images.

    Attributes:
        series: it belongs to.
        suffix: what tells it from the series' other stacks, or ''.
        planes: it consists of.
    """

    series: Series
    suffix: str
    planes: tuple[Plane, ...]

    @property
    def source(self) -> DicomSeries:
        paths = tuple(dict.fromkeys(plane.path for plane in self.planes))
        frames = {plane.frame for plane in self.planes} - {None}
        every = {plane.frame for instance in self.series.instances for plane in instance.planes} - {None}
        return DicomSeries(paths, None if frames == every else tuple(sorted(frames)))

    @property
    def instances(self) -> set[str]:
        """The UIDs of its files."""
        paths = {plane.path for plane in self.planes}
        return {instance.uid for instance in self.series.instances if instance.path in paths}


def stacks(series: Iterable[Series]) -> list[ImageStack]:
    """All stacks, in the order of the series."""
    return [
        ImageStack(each, suffix, planes)
        for each in series
        for suffix, planes in split([plane for instance in each.instances for plane in instance.planes])
    ]


def described(series: Iterable[Series]) -> tuple[list[tuple[bool, Annotation]], list[str]]:
    """(is it an RTSTRUCT, annotation) of every object, and notes on those that cannot be read."""
    found, notes = [], []
    for each in series:
        for instance in each.instances:
            is_rtstruct = instance.sop_class == RTSTRUCT
            describe = rtstruct.describe if is_rtstruct else segmentation.describe
            try:
                found.append((is_rtstruct, describe(instance.path)))
            except (UnreadableVolumeError, *DAMAGED) as error:
                notes.append(f"{instance.path} was left out: it is no valid label object ({error}).")
    return found, notes


def annotated_series(annotation: Annotation, images: Iterable[Series]) -> set[str]:
    """UIDs of the image series an annotation refers to; by frame of reference where it names none."""
    uids = {each.uid for each in images}
    if annotation.series:
        return set(annotation.series) & uids
    by_image = {each.uid for each in images if annotation.instances & {one.uid for one in each.instances}}
    frame = annotation.frame_of_reference
    by_frame = {
        each.uid for each in images if image_modality(each) and frame and each.first.frame_of_reference == frame
    }
    return by_image or (by_frame if len(by_frame) == 1 else set())


def stack_of(annotation: Annotation, candidates: list[ImageStack]) -> ImageStack | None:
    """The stack of a series an annotation was drawn on; None where it cannot be told."""
    if len(candidates) == 1:
        return candidates[0]
    drawn_on = [stack for stack in candidates if annotation.instances & stack.instances]
    return drawn_on[0] if len(drawn_on) == 1 else None


def label_source(
    stack: ImageStack,
    annotations: Iterable[tuple[bool, Annotation]],
    rois: Mapping[str, str] | None,
    values: Mapping[str, int],
) -> DrawnLabel | None:
    """The label of a stack; None where nothing that is wanted was drawn on it."""
    objects: list[Drawn] = []
    for is_rtstruct, annotation in annotations:
        wanted = tuple(
            (number, values[label])
            for number, name in annotation.structures
            if (label := label_of(rois, name)) is not None
        )
        if wanted:
            objects.append((rtstruct.RtStruct if is_rtstruct else segmentation.DicomSeg)(annotation.path, wanted))
    return DrawnLabel(stack.source, tuple(objects)) if objects else None
