"""TotalSegmentator's data sets (CT v1 and v2, MR): one folder a case, one binary mask a class."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import VOLUME_ENDINGS, split_ending, visible_files
from diffseg_nnunet.verification import listed

from .converter import Option, TreeConverter, described
from .description import ConversionPlan, Role, SourceCase, SplitScheme
from .label_names import numbered
from .layouts import FoundPart, Layout, Part
from .sources import MergedMasks, VolumeFile
from .totalsegmentator_classes import GROUPS, Release, all_classes, release_of, unified

EXPECTED = """\
Totalsegmentator_dataset_v201/      any name
    meta.csv                        image_id;...;split with train, val, test; may be missing
    s0000/ct.nii.gz                 or mri.nii.gz
    s0000/segmentations/liver.nii.gz    one binary mask a class"""
META, MASKS, CASE_NAME = "meta.csv", "segmentations", r"s\d{4,}"
ROLES: dict[str, Role] = {"train": "training", "val": "training", "test": "test"}
Masks = dict[str, dict[str, Path]]


class TotalSegmentatorConverter(TreeConverter):
    """Classes are read from what is there; roles and the official split from meta.csv."""

    format_name = "totalsegmentator"
    title = "TotalSegmentator: 117 (v2) or 104 (v1) structures in CT, 50 in MR"
    expects = EXPECTED
    licence = "CC BY 4.0 (CT); of MR see zenodo.org/records/14710732"
    citation = "Wasserthal et al., Radiology: Artificial Intelligence 5(5), e230024 (2023)"
    options = (
        Option("classes", "Classes to keep, separated by commas, e.g. liver,kidney_left; default all."),
        Option("group", f"Classes of one of TotalSegmentator's models: {', '.join(GROUPS)}."),
    )
    dataset_name = "TotalSegmentator"
    layouts = tuple(
        Layout(f"TotalSegmentator ({modality})", (Part("training", (f"{{case}}/{stem}",)),), case=CASE_NAME)
        for modality, stem in (("CT", "ct"), ("MR", "mri"))
    )
    certainty = 1.0

    def plan(
        self,
        source: Path | None,
        *,
        name: str | None = None,
        classes: str | None = None,
        group: str | None = None,
    ) -> ConversionPlan:
        found = self.find(source)
        (part,) = found.parts
        is_mr = found.layout is self.layouts[1]
        masks = {case: _masks(image.parent) for case, (image,) in part.images.items()}
        split, notes = _split(found.root, set(masks))
        _refuse_halves(found.root, masks, split)
        release, known = release_of({name for files in masks.values() for name in files}, is_mr)
        chosen = _chosen(masks, release, known, classes, group)
        labels = numbered(unified(each) for each in chosen)
        plan = ConversionPlan(
            name=name or self.dataset_name,
            channel_names={0: "MRI" if is_mr else "CT"},
            labels=labels,
            cases=tuple(
                _case(
                    case, part, masks[case], split.get(case, "train"), {each: labels[unified(each)] for each in chosen}
                )
                for case in masks
            ),
            extra=described(self),
            notes=(
                *self._notes(source, found),
                f"{len(chosen)} class(es) of TotalSegmentator {release}; names have the side first (right_kidney).",
                "Where masks overlap, the class of the higher value wins, as in TotalSegmentator's own conversion.",
                *notes,
                *_missing(masks, chosen),
            ),
        )
        return replace(plan, splits=_official(split, set(masks)))


def _masks(case: Path) -> dict[str, Path]:
    """Class -> file."""
    return {split_ending(path.name)[0]: path for path in visible_files(case / MASKS, VOLUME_ENDINGS)}


def _split(root: Path, cases: set[str]) -> tuple[dict[str, str], list[str]]:
    """Case -> 'train', 'val' or 'test' as in meta.csv, and notes on what does not fit."""
    path = root / META
    if not path.is_file():
        return {}, [f"There is no {META}: all cases are training cases, and the official split is unknown."]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path} cannot be read: {error}.", "Download it again, or remove it.") from error
    rows = list(csv.DictReader(lines, delimiter=max(";,", key="\n".join(lines).count)))
    split = {(row.get("image_id") or "").strip(): (row.get("split") or "").strip().lower() for row in rows}
    strange = sorted({value for value in split.values() if value not in ROLES})
    if strange or not split:
        message = f"{path} has no columns 'image_id' and 'split' with train, val and test"
        raise BadInputError(
            f"{message} (found: {listed(map(repr, strange)) or 'no row'}).", "Download it again, or remove it."
        )
    notes = []
    if absent := sorted(split.keys() - cases):
        notes.append(f"{len(absent)} case(s) of {META} are not here: {listed(absent)}.")
    if extra := sorted(cases - split.keys()):
        notes.append(f"{len(extra)} case(s) are not in {META} and became training cases: {listed(extra)}.")
    return split, notes


def _refuse_halves(root: Path, masks: Masks, split: dict[str, str]) -> None:
    folders = sorted(path.name for path in root.iterdir() if re.fullmatch(CASE_NAME, path.name) and path.is_dir())
    bare = [case for case, files in masks.items() if not files and split.get(case) != "test"]
    for cases, lack in (([case for case in folders if case not in masks], "image"), (bare, f"file in {MASKS}")):
        if cases:
            message = f"{len(cases)} case(s) in {root} have no {lack}: {listed(cases)}."
            raise BadInputError(message, "Extract the download again, or remove these folders.")


def _chosen(masks: Masks, release: str, known: Release, classes: str | None, group: str | None) -> tuple[str, ...]:
    """The classes to write in the order of their published values; classes of one's own come last."""
    published = all_classes(known)
    present = {name for files in masks.values() for name in files}
    ordered = (*(name for name in published if name in present), *sorted(present - set(published)))
    if classes and group:
        raise BadInputError("Both classes and a group of them were given.", "Give --classes or --group.")
    if group:
        if group not in known:
            message = f"TotalSegmentator {release} has no group '{group}'."
            raise BadInputError(message, f"Choose {', '.join(known)} with --group, or name classes with --classes.")
        ordered = tuple(name for name in known[group] if name in present)
    elif classes:
        wanted = {unified(name.strip()) for name in classes.split(",") if name.strip()}
        if unknown := sorted(wanted - {unified(name) for name in ordered}):
            message = f"No case has a mask of {listed(unknown)}."
            raise BadInputError(message, f"There are {', '.join(ordered)}.")
        ordered = tuple(name for name in ordered if unified(name) in wanted)
    if not ordered:
        raise BadInputError("No case has a mask of these classes.", f"Expected is\n{EXPECTED}")
    return ordered


def _case(case: str, part: FoundPart, masks: dict[str, Path], split: str, values: dict[str, int]) -> SourceCase:
    painted = tuple((masks[name], value) for name, value in values.items() if name in masks)
    if masks and not painted:
        # none of the classes: any other mask lends its size, and paints nothing
        painted = ((next(iter(masks.values())), 0),)
    (image,) = part.images[case]
    return SourceCase(case, (VolumeFile(image),), MergedMasks(painted) if painted else None, ROLES[split])


def _missing(masks: Masks, chosen: tuple[str, ...]) -> list[str]:
    lacking = {case: [name for name in chosen if name not in files] for case, files in masks.items() if files}
    lacking = {case: names for case, names in lacking.items() if names}
    if not lacking:
        return []
    case, names = next(iter(lacking.items()))
    return [
        f"{len(lacking)} case(s) lack the mask of one or more classes, which are background there "
        f"({case}: {listed(names)})."
    ]


def _official(split: dict[str, str], cases: set[str]) -> tuple[SplitScheme, ...]:
    fold = {part: tuple(sorted(case for case in cases if split.get(case) == part)) for part in ("train", "val")}
    if not all(fold.values()):
        return ()
    expected = {case for case, part in split.items() if part != "test"}
    name = "official" if expected <= cases else "official-part"
    return (SplitScheme(name, (fold,), META),)
