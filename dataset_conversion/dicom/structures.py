"""Names of ROIs and segments -> labels."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import read_json_object
from diffseg_nnunet.verification import listed

from ..description import BACKGROUND, IGNORE

ROIS_FORM = "Write --rois 'liver=Liver,LIVER LOBES;kidney=Kidney_L,Kidney_R', or a JSON file of the same meaning."


def normalised(name: str) -> str:
    """``'  Left-Kidney '`` -> ``'left_kidney'``."""
    return re.sub(r"[\s_-]+", "_", name.strip()).strip("_").casefold()


def parse_rois(text: str | None) -> dict[str, str] | None:
    """``liver=Liver,LIVER;kidney=...`` or the path of a JSON file ``{"liver": ["Liver"], ...}`` -> spelling -> label.

    Spellings are normalised; a label is a spelling of itself. The order of labels is kept.

    Raises:
        BadInputError: it is neither, or one spelling stands for two labels.
    """
    if text is None:
        return None
    content = read_json_object(Path(text)) if text.endswith(".json") else _pairs(text)
    labels: dict[str, str] = {}
    for label, spellings in content.items():
        spellings = [spellings] if isinstance(spellings, str) else spellings
        named = isinstance(spellings, list) and all(isinstance(spelling, str) for spelling in spellings)
        if not named or not label.strip() or normalised(label) in (BACKGROUND, IGNORE):
            raise BadInputError(f"--rois: {label!r}: {json.dumps(spellings)} is no label with its names.", ROIS_FORM)
        for spelling in (label, *spellings):
            if labels.setdefault(normalised(spelling), label.strip()) != label.strip():
                raise BadInputError(f"--rois: '{spelling}' stands for two labels.", "Keep it in one of them.")
    return labels


def _pairs(text: str) -> dict[str, list[str]]:
    pairs: dict[str, list[str]] = {}
    for entry in filter(str.strip, text.split(";")):
        label, _, spellings = entry.partition("=")
        pairs[label.strip()] = [spelling for spelling in spellings.split(",") if spelling.strip()]
    if not pairs:
        raise BadInputError(f"--rois {text!r} names no label.", ROIS_FORM)
    return pairs


def label_of(rois: Mapping[str, str] | None, name: str) -> str | None:
    """The label a structure belongs to; None where it has none."""
    spelling = normalised(name)
    if rois is not None:
        return rois.get(spelling)
    return None if spelling in ("", BACKGROUND, IGNORE) else spelling


def label_values(rois: Mapping[str, str] | None, names: Iterable[str]) -> dict[str, int]:
    """Label -> value: in the order of --rois, else in alphabetical order; the background is 0."""
    labels = rois.values() if rois is not None else sorted({label_of(None, name) for name in names} - {None})
    return {BACKGROUND: 0, **{label: value for value, label in enumerate(dict.fromkeys(labels), start=1)}}


def notes_on_names(rois: Mapping[str, str] | None, cases: list[tuple[str, list[str]]]) -> list[str]:
    """What the user should know about the structures' names.

    Args:
        rois: as parsed.
        cases: (case identifier, names of its structures).
    """
    spellings: dict[str, Counter[str]] = {}
    unused: Counter[str] = Counter()
    having: Counter[str] = Counter()
    for _, names in cases:
        for name in names:
            if (label := label_of(rois, name)) is None:
                unused[name] += 1
            else:
                spellings.setdefault(label, Counter())[name] += 1
        having.update({label for name in names if (label := label_of(rois, name)) is not None})
    notes = []
    several = [f"{label}: {_counted(found)}" for label, found in sorted(spellings.items()) if len(found) > 1]
    if several:
        notes.append(f"Names that were taken for one structure: {listed(several)}.")
    wanted = list(dict.fromkeys(rois.values())) if rois is not None else sorted(having)
    if lacking := [f"{label} ({having[label]} of {len(cases)})" for label in wanted if having[label] < len(cases)]:
        notes.append(
            f"Structures that not every labelled case has: {listed(lacking)}. Elsewhere they count as absent, or, with "
            "--partial, as not looked for. Spellings of one structure are joined with --rois."
        )
    if unused:
        notes.append(f"Structures that were left out: {_counted(unused)}.")
    return notes


def _counted(names: Counter[str]) -> str:
    return listed(f"{name} ({count})" for name, count in sorted(names.items(), key=lambda item: (-item[1], item[0])))
