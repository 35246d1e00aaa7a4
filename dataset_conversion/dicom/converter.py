"""A tree of DICOM files: one case a series of CT or MR images."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.verification import listed

from ..converter import Converter, Option, Recognition
from ..converter import described as provenance
from ..description import IGNORE, ConversionPlan, SourceCase
from ..folder import require_folder
from .annotations import Annotation
from .index import Index, index, is_dicom
from .matching import ImageStack, annotated_series, described, label_source, stack_of, stacks
from .naming import IDENTIFIERS, identifiers
from .patients import patients_of
from .selection import MODALITIES, Wanted, image_modality, is_annotation, pick
from .structures import label_of, label_values, notes_on_names, parse_rois

EXPECTED = """\
anything/                      any names, any depth; ZIP files extracted
    patient_1/ct/0001.dcm      the images of one series, in one file each or in one multi-frame file
    patient_1/rtstruct.dcm     RTSTRUCT or DICOM SEG objects, if there are any"""
# headers are read by Python, which more threads do not speed up; they hide the disk's latency
_INDEX_THREADS = 4
_LOOKED_AT = 200


class DicomConverter(Converter):
    """Series of CT or MR images, labelled by RTSTRUCT or DICOM SEG objects where there are any."""

    format_name = "dicom"
    title = "A tree of DICOM series, with RTSTRUCT or DICOM SEG objects as labels if there are any"
    expects = EXPECTED
    options = (
        Option("modality", "CT or MR; needed where the tree has both."),
        Option("series", "Regular expression: take only series in whose SeriesDescription it is found."),
        Option("derived", "Take series that are marked as derived or secondary as well.", bool),
        Option("identify", "Name cases by 'patient' (PatientID, StudyDate, SeriesNumber), 'folder' or 'uid'."),
        Option("rois", "Labels and the ROI or segment names they go by: 'liver=Liver,LIVER;…', or a JSON file."),
        Option("annotation", "Regular expression: take only RTSTRUCT and SEG objects whose description has it."),
        Option("partial", "Structures that a case lacks were not looked for there: ignore its background.", bool),
    )

    def plan(
        self,
        source: Path | None,
        *,
        name: str | None = None,
        modality: str | None = None,
        series: str | None = None,
        derived: bool = False,
        identify: str | None = None,
        rois: str | None = None,
        annotation: str | None = None,
        partial: bool = False,
    ) -> ConversionPlan:
        """Read all headers and list the series.

        Raises:
            BadInputError: there is no CT or MR series, both modalities, or an option is wrong.
        """
        source = require_folder(source, EXPECTED)
        identify = _one_of("identify", identify or "patient", IDENTIFIERS)
        description, drawn_by = _pattern("series", series), _pattern("annotation", annotation)
        spellings = parse_rois(rois)
        found = index(source, _INDEX_THREADS)
        modality = _modality(found, modality, source)
        objects, notes = described(each for each in found.series if is_annotation(each))
        objects = [each for each in objects if drawn_by is None or drawn_by.search(each[1].description)]
        drawn_on = [annotated_series(each, found.series) for _, each in objects]
        images = [each for each in found.series if not is_annotation(each)]
        picked, left_out = pick(images, Wanted(modality, description, derived), set().union(*drawn_on))
        if not picked:
            raise BadInputError(
                f"{source} has no series that can be used. Left out: {_counted(left_out)}.",
                "Change --modality or --series.",
            )
        cases = _Cases(stacks(picked), identify, source)
        notes += _notes_on_source(found, left_out, cases.stacks)
        notes += cases.annotate(objects, drawn_on)
        values = label_values(spellings, cases.structure_names())
        labelled, more = cases.described(spellings, values, partial)
        if partial and any(case.unannotated for case in labelled):
            values[IGNORE] = len(values)
        return ConversionPlan(
            name=name or "_".join(re.findall(r"[A-Za-z0-9]+", source.resolve().name)) or "DICOM",
            channel_names={0: modality},
            labels=values,
            cases=tuple(labelled),
            extra=provenance(self),
            notes=(*notes, *more),
        )

    def recognise(self, source: Path) -> Recognition | None:
        walked = (Path(folder) / file for folder, _, files in os.walk(source) for file in files)
        dicom = sum(is_dicom(path) for path in islice(walked, _LOOKED_AT) if path.is_file())
        return Recognition(self.format_name, "it holds DICOM files", 0.6, {}) if dicom else None


class _Cases:
    """The stacks, their names, and what was drawn on each."""

    def __init__(self, found: list[ImageStack], identify: str, root: Path):
        self.stacks = found
        self._names = identifiers([(each.series, each.suffix) for each in found], identify, root)
        self._drawn: list[list[tuple[bool, Annotation]]] = [[] for _ in found]

    def annotate(self, objects: Iterable[tuple[bool, Annotation]], drawn_on: Iterable[set[str]]) -> list[str]:
        """Give each stack its annotations; notes on those that found none."""
        notes, homeless, special = [], [], []
        for each, uids in zip(objects, drawn_on, strict=True):
            annotation = each[1]
            special += [f"{annotation.path.name}: {note}" for note in annotation.notes]
            candidates = [stack for stack in self.stacks if stack.series.uid in uids]
            stack = stack_of(annotation, candidates) if candidates else None
            if stack is None:
                homeless.append(annotation.path.name)
            else:
                self._drawn[self.stacks.index(stack)].append(each)
        if homeless:
            notes.append(
                f"{len(homeless)} RTSTRUCT or SEG object(s) were left out, because the series they refer to was not "
                f"found, not taken, or holds several stacks: {listed(homeless, 5)}."
            )
        if special:
            notes.append(f"About structures: {listed(special, 5)}.")
        return notes

    def structure_names(self) -> list[str]:
        """The names of all structures of all cases."""
        return [name for drawn in self._drawn for names in map(_names, drawn) for name in names]

    def described(
        self, rois: Mapping[str, str] | None, values: Mapping[str, int], partial: bool
    ) -> tuple[list[SourceCase], list[str]]:
        """The cases, and notes on their structures."""
        cases, named = [], []
        patients, notes = patients_of([stack.series for stack in self.stacks])
        for stack, identifier, drawn, patient in zip(self.stacks, self._names, self._drawn, patients, strict=True):
            label = label_source(stack, drawn, rois, values)
            names = [name for each in drawn for name in _names(each)]
            if drawn:
                named.append((identifier, names))
            having = {label_of(rois, name) for name in names}
            lacking = tuple(each for each, value in values.items() if value and each not in having)
            role = "unlabelled" if label is None else "training"
            unannotated = lacking if partial and label is not None else ()
            cases.append(SourceCase(identifier, (stack.source,), label, role, None, unannotated, patient))
        return cases, [*notes, *notes_on_names(rois, named)]


def _names(drawn: tuple[bool, Annotation]) -> list[str]:
    return [name for _, name in drawn[1].structures]


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise BadInputError(f"--{option} {value} is unknown.", f"Choose one of {listed(choices)}.")
    return value


def _pattern(option: str, text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise BadInputError(f"--{option} {text!r} is no regular expression ({error}).", "Mend it.") from error


def _modality(found: Index, wanted: str | None, source: Path) -> str:
    counts = Counter(modality for each in found.series if (modality := image_modality(each)) is not None)
    if wanted is not None:
        return _one_of("modality", wanted.upper(), MODALITIES)
    if len(counts) == 1:
        return next(iter(counts))
    if counts:
        shown = " and ".join(f"{count} {modality}" for modality, count in sorted(counts.items()))
        raise BadInputError(f"{source} has {shown} series.", "Choose one with --modality, for example --modality CT.")
    passed = listed(f"{count} {what}" for what, count in found.ignored.items())
    others = Counter(each.first.modality or "unknown" for each in found.series)
    shown = listed(f"{count} {modality}" for modality, count in sorted(others.items()))
    raise BadInputError(
        f"{source} has no CT or MR series"
        + (f", only other DICOM objects ({shown})" if shown else "")
        + (f"; passed over: {passed}." if passed else "."),
        f"Expected is\n{EXPECTED}",
    )


def _notes_on_source(found: Index, left_out: Mapping[str, list[str]], taken: list[ImageStack]) -> list[str]:
    notes = []
    if found.ignored:
        notes.append(f"Passed over: {listed(f'{count} {what}' for what, count in found.ignored.items())}.")
    if left_out:
        notes.append(f"Series left out: {_counted(left_out)}.")
    if divided := sorted({stack.series.uid for stack in taken if stack.suffix}):
        notes.append(f"{len(divided)} series hold several images a position and became one case a stack.")
    if padded := sum(any(one.padded for one in stack.series.instances) for stack in taken):
        notes.append(f"{padded} case(s) have padding outside of the field of view, which keeps its value.")
    return notes


def _counted(left_out: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{len(names)} {reason} ({listed(names, 3)})" for reason, names in sorted(left_out.items()))
