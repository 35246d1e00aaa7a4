"""An nnU-Net raw data set that exists already: to add unlabelled images, or to rename and merge its labels."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.patients import same_patient
from diffseg_nnunet.raw_dataset import (
    DATASET_JSON,
    VOLUME_ENDINGS,
    Case,
    RawDataset,
    split_channel,
    split_ending,
    visible_files,
)
from diffseg_nnunet.verification import listed

from .converter import Converter, Option, Recognition
from .description import BACKGROUND, ConversionPlan, SourceCase, SplitScheme
from .folder import numbered_images, require_folder
from .label_names import named_values, numbered, renumbering
from .naming import pairs_with_channel_numbers, plain_pairs, usable_name
from .sources import VolumeFile

EXPECTED = """\
Dataset123_Name/               or Task123_Name of nnU-Net v1
    dataset.json               "channel_names" (v1: "modality"), "labels", "file_ending"
    imagesTr/case_0000.nii.gz  case_0001.nii.gz, ... with several channels
    labelsTr/case.nii.gz
    imagesUn/, imagesTs/, labelsTs/, splits_final.json    if there are any"""
KEPT_ENTRIES = (
    "description",
    "reference",
    "licence",
    "license",
    "release",
    "citation",
    "overwrite_image_reader_writer",
)
NIFTI_READERS = ("SimpleITKIO", "NibabelIO", "NibabelIOWithReorient")
SPLITS = "splits_final.json"
FOLDER_NAME = re.compile(r"(?:Dataset|Task)\d{3}_(.+)")


class NNUNetConverter(Converter):
    """A raw data set of nnU-Net v2 or v1."""

    format_name = "nnunet"
    title = "an nnU-Net raw data set (v2, or v1's TaskXXX_Name)"
    expects = EXPECTED
    options = (
        Option("unlabelled", "Folder of images to add to the unlabelled pool; may be repeated.", Path, many=True),
        Option("map", "Labels to rename, merge or drop: old=new,…; several old ones to one new; old=background drops."),
    )

    def plan(
        self,
        source: Path | None,
        *,
        name: str | None = None,
        unlabelled: tuple[Path, ...] = (),
        map: str | None = None,  # noqa: A002 (the command's --map)
    ) -> ConversionPlan:
        """List the cases of imagesTr, imagesUn and imagesTs, or of dataset.json's key 'dataset'.

        Args:
            source: the data set's folder.
            name: name of the new data set; None: the old one's.
            unlabelled: folders of ``<case>_XXXX`` or, with one channel, ``<case>``.
            map: ``old=new,...``; names that it does not mention stay.

        Raises:
            BadInputError: this is no such data set, a file is missing, its labels are regions, or `map` names an
                unknown label.
        """
        dataset = _open(source)
        values = named_values(_labels(dataset), dataset.folder / DATASET_JSON)
        channel_names = _channel_names(dataset)
        renamed = _parse_map(map, values)
        test_labels = dataset.label_files("labelsTs")
        test = [Case(case.identifier, case.images, test_labels.get(case.identifier)) for case in dataset.test_cases()]
        cases = [
            *_cases(_labelled(dataset), "training", len(channel_names)),
            *_cases(dataset.unlabelled_cases(), "unlabelled", len(channel_names)),
            *_cases(test, "test", len(channel_names)),
        ]
        for folder in unlabelled or ():
            found = numbered_images(require_folder(folder, EXPECTED), set(), len(channel_names))
            added = [Case(case, files, None) for case, files in found.items()]
            cases += _cases(added, "unlabelled", len(channel_names))
        training = {case.identifier for case in cases if case.role == "training"}
        splits, notes = _splits(dataset, training)
        groups = same_patient(dataset.dataset_json)
        patients = {case: str(number) for number, group in enumerate(groups) for case in group}
        # names without a value of their own any more are not written, and the others close the gaps
        labels = numbered([renamed.get(name, name) for name in values])
        notes += renumbering(values, labels) if not map else []
        folder_name = FOLDER_NAME.fullmatch(dataset.folder.resolve().name)
        given = folder_name[1] if folder_name else str(dataset.dataset_json.get("name") or "")
        return ConversionPlan(
            name=name or usable_name(given, self.format_name),
            channel_names=channel_names,
            labels=labels,
            cases=tuple(replace(case, patient=patients.get(case.identifier)) for case in cases),
            source_labels=values,
            renamed=renamed,
            extra=_extra(dataset) | {"converted_from": self.format_name},
            notes=tuple(notes),
            splits=splits,
        )

    def recognise(self, source: Path) -> Recognition | None:
        """By dataset.json and by images that are called as their labels, with a channel number."""
        try:
            content = RawDataset.open(source).dataset_json
        except BadInputError:
            return None
        pairs = pairs_with_channel_numbers(source)
        by_json = "file_ending" in content and "channel_names" in content
        if len(pairs) < len(plain_pairs(source)) or not (pairs or by_json):
            return None
        reason = (
            f"{len(pairs)} label(s) have an image <case>_0000" if pairs else f"{DATASET_JSON} has nnU-Net's entries"
        )
        return Recognition(self.format_name, reason, 1.0 if FOLDER_NAME.fullmatch(source.resolve().name) else 0.95, {})


def _open(source: Path | None) -> RawDataset:
    """The data set; what v1 leaves unsaid is added."""
    source = require_folder(source, EXPECTED)
    if not (source / DATASET_JSON).is_file():
        around = sorted(
            path.parent for path in source.glob(f"*/{DATASET_JSON}") if not path.parent.name.startswith(".")
        )
        around = [str(path) for path in around] or [str(source.resolve().parent)] * (
            source.resolve().parent / DATASET_JSON
        ).is_file()
        hint = f" There is one in {listed(around)}: convert that." if around else ""
        raise BadInputError(f"{source} has no {DATASET_JSON}.{hint}", f"Expected is\n{EXPECTED}")
    dataset = RawDataset.open(source)
    ending = dataset.dataset_json.setdefault("file_ending", _ending(source))
    if ending not in VOLUME_ENDINGS:
        message = f"The files of {source} end in {ending!r}; converted are {', '.join(VOLUME_ENDINGS)}."
        raise BadInputError(message, "Use the data set as it is: it is one of nnU-Net's already.")
    return dataset


def _ending(source: Path) -> str:
    """Of the first image: nnU-Net v1 knows .nii.gz only, hand-made data sets know others."""
    return next((split_ending(path.name)[1] for path in visible_files(source / "imagesTr", VOLUME_ENDINGS)), ".nii.gz")


def _labels(dataset: RawDataset) -> dict[str, Any]:
    regions = [name for name, value in dataset.labels.items() if isinstance(value, list) and len(value) != 1]
    if regions:
        raise BadInputError(
            f"{dataset.folder / DATASET_JSON} has regions ({listed(regions)}), which overlap: a conversion gives each "
            "voxel's value one name, so they cannot be kept.",
            "The data set is one of nnU-Net's already: put unlabelled images into its folder imagesUn yourself, or "
            "give its values one name each.",
        )
    return {name: value[0] if isinstance(value, list) else value for name, value in dataset.labels.items()}


def _channel_names(dataset: RawDataset) -> dict[int, str]:
    names = dataset.channel_names
    if sorted(names) != sorted(str(channel) for channel in range(len(names))):
        message = f"The channels of {dataset.folder / DATASET_JSON} are numbered {listed(sorted(names))}."
        raise BadInputError(message, "Number them 0, 1, 2, ...")
    return {channel: names[str(channel)] for channel in range(len(names))}


def _parse_map(text: str | None, values: dict[str, int]) -> dict[str, str]:
    """``old=new,...`` -> {old: new}."""
    renamed = {}
    for entry in (text or "").split(",") if text else ():
        old, equals, new = (part.strip() for part in entry.partition("="))
        if not equals or not new or old not in values or old == BACKGROUND:
            known = listed(name for name in values if name != BACKGROUND)
            raise BadInputError(
                f"--map: '{entry.strip()}' does not rename a label; there are {known}.",
                "Write --map old=new,old2=new; the new name 'background' drops a label.",
            )
        renamed[old] = new
    return renamed


def _labelled(dataset: RawDataset) -> list[Case]:
    """Cases with a label; an image or a label that lacks its counterpart is refused, as are missing files."""
    cases = dataset.labelled_cases()
    if "dataset" in dataset.dataset_json:
        missing = [str(path) for case in cases for path in (*case.images, case.label) if not path.is_file()]
        if missing:
            message = (
                f"{len(missing)} file(s) that {dataset.folder / DATASET_JSON} lists are missing: {listed(missing)}."
            )
            raise BadInputError(message, "Mend the paths there, or copy the files.")
        return cases
    images, labels = set(dataset.image_files("imagesTr")), set(dataset.label_files("labelsTr"))
    for names, where, lack in ((images - labels, "imagesTr", "label"), (labels - images, "labelsTr", "image")):
        if names:
            hint = " Images must be called <case>_0000, <case>_0001, ..." if lack == "image" else ""
            message = f"{len(names)} case(s) in {dataset.folder / where} have no {lack}: {listed(sorted(names))}."
            raise BadInputError(message + hint, "Add what is missing, or move unlabelled images to imagesUn.")
    return cases


def _cases(cases: list[Case], role: str, channel_count: int) -> list[SourceCase]:
    for case in cases:
        numbers = [split_channel(split_ending(path.name)[0])[1] for path in case.images]
        if len(numbers) != channel_count or (channel_count > 1 and numbers != list(range(channel_count))):
            shown = listed(path.name for path in case.images)
            message = (
                f"The case '{case.identifier}' has {len(numbers)} image(s) ({shown}) for {channel_count} channel(s)."
            )
            raise BadInputError(message, "Number its channels 0000, 0001, ... without a gap.")
    return [
        SourceCase(
            case.identifier,
            tuple(VolumeFile(path) for path in case.images),
            VolumeFile(case.label) if case.label is not None else None,
            role,
        )
        for case in cases
    ]


def _splits(dataset: RawDataset, training: set[str]) -> tuple[tuple[SplitScheme, ...], list[str]]:
    """splits_final.json in the folder, else where nnU-Net keeps it: in the preprocessed data set of the same name."""
    name = dataset.folder.resolve().name
    roots = [dataset.folder, dataset.folder.resolve().parent.parent / "nnUNet_preprocessed" / name]
    if exported := os.environ.get("nnUNet_preprocessed"):
        roots.append(Path(exported) / name)
    path = next((root / SPLITS for root in roots if (root / SPLITS).is_file()), None)
    if path is None:
        return (), []
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        folds = tuple({part: tuple(map(str, fold[part])) for part in ("train", "val")} for fold in content)
    except (OSError, ValueError, TypeError, KeyError):
        return (), [f"{path} is no list of folds with 'train' and 'val': it was left out."]
    unknown = sorted({case for fold in folds for cases in fold.values() for case in cases} - training)
    if unknown or not folds:
        return (), [f"{path} names cases that are not here ({listed(unknown) or 'no fold at all'}): it was left out."]
    return (SplitScheme("own", folds, str(path)),), [f"The {len(folds)} fold(s) of {path} are kept."]


def _extra(dataset: RawDataset) -> dict[str, Any]:
    kept = {key: dataset.dataset_json[key] for key in KEPT_ENTRIES if key in dataset.dataset_json}
    # everything is written as .nii.gz, so a reader of other files cannot stay
    if kept.get("overwrite_image_reader_writer") not in (None, *NIFTI_READERS):
        del kept["overwrite_image_reader_writer"]
    return kept
