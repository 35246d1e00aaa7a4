"""FLARE23: 13 abdominal organs and lesions in CT; most of its 2200 labels show only some of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import read_json_object
from diffseg_nnunet.verification import listed

from . import splits
from .anatomy import structure
from .converter import Option, TreeConverter
from .description import IGNORE, ConversionPlan, SourceCase, SplitScheme
from .flare22 import ORGANS
from .layouts import Found, Layout, Part, match
from .partial import PartialLabel
from .sources import VolumeFile

LESION = "lesion"
CORRECTED = "labelsTr2200/20230507-fix/{case}"
COMPLETE, BY_CONTENT = "complete", "by-content"
_ASSUMED = {
    COMPLETE: "their labels were taken as complete, so an organ that nobody annotated is taught as background.",
    BY_CONTENT: (
        "where a label lacks any of the 13 organs (of those among them that --labels chose), its background became "
        "nnU-Net's ignore label, because the missing organ may hide in it; where all are there, what is left was taken "
        "as background. An organ that the patient lacks costs that case's background; lesions that nobody marked are "
        "taught as organ or background."
    ),
}


class FLARE23Converter(TreeConverter):
    """FLARE23; what was annotated in which case is not in the download and must be told or assumed."""

    format_name = "flare23"
    title = "FLARE23: 13 abdominal organs and lesions in CT, partially labelled"
    expects = """\
MICCAI-FLARE23/                                  any name
    imagesTr2200/FLARE23_0001_0000.nii.gz
    labelsTr2200/FLARE23_0001.nii.gz
    unlabeledTr1800/FLARE23_2201_0000.nii.gz     (or without _0000)
    validation/CASE_0000.nii.gz
The last two folders may be missing."""
    citation = "Ma et al., FLARE23: Automatic Organ and Pan-cancer Segmentation in Abdomen CT (arXiv 2408.12534)"
    options = (
        Option("annotated", "CSV or JSON: which structures were annotated in which case.", kind=Path),
        Option("assume", f"Of cases that are not listed: {BY_CONTENT} (default) or {COMPLETE}."),
    )
    dataset_name = "FLARE23"
    labels = {**ORGANS, LESION: len(ORGANS) + 1}  # noqa: RUF012
    layouts = tuple(
        Layout(
            f"FLARE23{detail}",
            (
                Part("training", ("imagesTr2200/{case}_0000",), "labelsTr2200/{case}", expected=2200),
                Part("unlabelled", (f"unlabeledTr1800/{{case}}{suffix}",), None, "{case}", True, 1800),
                Part(
                    "test",
                    ("validation/{case}_0000",),
                    "val-gt-50cases-for-sanity-check/{case}",
                    "validation_{case}",
                    True,
                    100,
                ),
            ),
            case=r"[^/_]+_\d+",
        )
        for suffix, detail in (("_0000", ""), ("", " (unlabelled scans without _0000)"))
    )

    def adapted(
        self,
        plan: ConversionPlan,
        found: Found,
        annotated: Path | None = None,
        assume: str | None = None,
        **_: Any,
    ) -> ConversionPlan:
        assume = assume or BY_CONTENT
        if assume not in _ASSUMED:
            raise BadInputError(f"'{assume}' is no assumption.", f"Choose {listed(_ASSUMED)} with --assume.")
        listing = read_annotated(annotated, self.labels) if annotated is not None else {}
        corrected = match(CORRECTED, found.root, found.layout)
        with_ignore = {**plan.labels, IGNORE: max(plan.labels.values()) + 1}
        cases = tuple(self._told(case, listing, corrected, assume, with_ignore) for case in plan.cases)
        needed = any(case.unannotated or isinstance(case.label, PartialLabel) for case in cases)
        notes = (*plan.notes, *self._explained(plan, listing, corrected, assume))
        return replace(plan, cases=cases, labels=with_ignore if needed else plan.labels, notes=notes)

    def splits(self, plan: ConversionPlan) -> tuple[SplitScheme, ...]:
        return splits.k_fold(case.identifier for case in plan.cases if case.role == "training")

    def _told(
        self,
        case: SourceCase,
        listing: Mapping[str, tuple[str, ...]],
        corrected: Mapping[str, Path],
        assume: str,
        values: dict[str, int],
    ) -> SourceCase:
        """A training case with what is known of its background."""
        if case.role != "training":
            return case
        path = corrected.get(case.identifier, case.label.files[0])
        if case.identifier in listing:
            unannotated = tuple(name for name in self.labels if name not in listing[case.identifier])
            return replace(case, label=VolumeFile(path), unannotated=unannotated)
        if assume == COMPLETE:
            return replace(case, label=VolumeFile(path))
        source = PartialLabel(path, tuple(ORGANS.items()), values[IGNORE])
        return replace(case, label=source, source_labels=values)

    def _explained(
        self, plan: ConversionPlan, listing: Mapping[str, tuple[str, ...]], corrected: Mapping[str, Path], assume: str
    ) -> list[str]:
        training = {case.identifier for case in plan.cases if case.role == "training"}
        notes = []
        if used := training & corrected.keys():
            notes.append(f"{len(used)} label(s) were taken from {CORRECTED.rsplit('/', 1)[0]}, which corrects them.")
        if listing:
            partial = sum(set(listing[case]) != set(self.labels) for case in training & listing.keys())
            notes.append(
                f"{len(training & listing.keys())} training case(s) are listed with what was annotated; in {partial} "
                "of them something was not, and their background became nnU-Net's ignore label."
            )
            if partial == len(training):
                notes.append(
                    "No training case has a background that is known, so a network learns none. List lesions as "
                    "annotated where unmarked ones are acceptable."
                )
        if absent := sorted(listing.keys() - training):
            notes.append(f"{len(absent)} listed case(s) are not here: {listed(absent)}.")
        if rest := training - listing.keys():
            notes.append(f"What was annotated in {len(rest)} training case(s) is not known: {_ASSUMED[assume]}")
        return notes


def read_annotated(path: Path, labels: dict[str, int]) -> dict[str, tuple[str, ...]]:
    """Which structures were annotated in which case, those that the patient does not have included.

    Args:
        path: JSON ``{"FLARE23_0001": ["liver", "spleen"], ...}``, or CSV with a case in the first cell of a row and
            structures, by name or value, in the others; a first row that begins with "case" is skipped.
        labels: name -> value of the structures there are.

    Raises:
        BadInputError: the file cannot be read, or names a structure or a case wrongly.
    """
    found: dict[str, tuple[str, ...]] = {}
    for where, case, names in _json_rows(path) if path.suffix.lower() == ".json" else _csv_rows(path):
        if case in found:
            raise BadInputError(f"{where}: '{case}' is listed twice.", "Remove one of the two.")
        known = {structure(name, labels, where) for name in names}
        found[case] = tuple(name for name in labels if name in known)
    if not found:
        raise BadInputError(f"{path} lists no case.", "Write one case a row, with what was annotated in it.")
    return found


def _json_rows(path: Path) -> list[tuple[str, str, list[str]]]:
    rows = []
    for case, names in read_json_object(path).items():
        if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
            raise BadInputError(
                f"{path}: '{case}' has {json.dumps(names)[:80]} instead of a list of structures.",
                'Write {"FLARE23_0001": ["liver", "spleen"], ...}.',
            )
        rows.append((str(path), case, [str(name) for name in names]))
    return rows


def _csv_rows(path: Path) -> list[tuple[str, str, list[str]]]:
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInputError(f"{path} cannot be read: {error}.", "Check the path; expected is CSV or JSON.") from error
    rows = []
    for number, cells in enumerate(lines, start=1):
        words = [word.strip() for cell in cells for word in cell.split(";") if word.strip()]
        if words and not (number == 1 and words[0].lower() == "case"):
            rows.append((f"{path}, line {number}", words[0], words[1:]))
    return rows
