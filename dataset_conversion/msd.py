"""Medical Segmentation Decathlon: ``TaskXX_Name`` with the labels and cases listed in dataset.json."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PureWindowsPath
from typing import Any

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import DATASET_JSON, read_json_object, split_channel, split_ending, visible_files
from diffseg_nnunet.verification import listed

from .converter import Converter, Recognition
from .description import ConversionPlan, SourceCase
from .folder import require_folder, volumes_by_stem
from .label_names import named_values, numbered, renumbering
from .naming import pairs_with_channel_numbers, plain_pairs, usable_name
from .sources import VolumeFile, channels

EXPECTED = """\
Task04_Hippocampus/            any name
    dataset.json               "modality": {"0": "MRI"}, "labels": {"0": "background", ...}, "training": [...]
    imagesTr/hippocampus_001.nii.gz    4D where there are several channels
    labelsTr/hippocampus_001.nii.gz
    imagesTs/                  may be missing"""
KEPT_ENTRIES = ("description", "reference", "licence", "license", "release", "citation")


# how the ten tasks call their files; each has a folder, which may have been renamed
TASK_FILES = re.compile(r"(BRATS|la|liver|hippocampus|prostate|lung|pancreas|hepaticvessel|spleen|colon)_\d+")


class MSDConverter(Converter):
    """A task of the Medical Segmentation Decathlon, or a data set in its layout."""

    format_name = "msd"
    title = "a task of the Medical Segmentation Decathlon, or any data set in its layout"
    expects = EXPECTED
    licence = "CC-BY-SA 4.0"
    citation = "Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13, 4128 (2022)"

    def plan(self, source: Path | None, *, name: str | None = None) -> ConversionPlan:
        """Read dataset.json and list the cases.

        Args:
            source: the extracted task folder.
            name: name of the data set; None takes the one in dataset.json, else the folder's, with '_' for what such
                a name cannot have ('LEFT ATRIUM').

        Raises:
            BadInputError: this is no such folder (the message shows the tree that is expected), a listed file is
                missing or lies outside the folder, or two labels have one name or one value.
        """
        content = read_json_object(_find_dataset_json(source))
        channel_names = _channel_names(source, content)
        values = named_values(_entry(source, content, "labels"), source / DATASET_JSON)
        labels = numbered(values)
        training, unlisted = _training_cases(source, content, len(channel_names))
        test, test_note = _test_cases(source, content, len(channel_names))
        given = str(content.get("name") or "").strip() or source.resolve().name
        return ConversionPlan(
            name=name or usable_name(given, self.format_name),
            channel_names=channel_names,
            labels=labels,
            cases=(*training, *test),
            source_labels=values,
            extra={key: content[key] for key in KEPT_ENTRIES if key in content} | {"converted_from": self.format_name},
            notes=(*renumbering(values, labels), *unlisted, *test_note),
        )

    def recognise(self, source: Path) -> Recognition | None:
        """By dataset.json and by images that are called as their labels, without a channel number."""
        pairs = plain_pairs(source)
        if not (source / DATASET_JSON).is_file() or len(pairs) <= len(pairs_with_channel_numbers(source)):
            return None
        ours = all(TASK_FILES.fullmatch(stem) for stem in pairs)
        reason = f"{len(pairs)} image(s) of imagesTr are called as their labels, beside a {DATASET_JSON}"
        return Recognition(self.format_name, reason, 1.0 if ours else 0.6, {})


def _find_dataset_json(source: Path) -> Path:
    require_folder(source, EXPECTED)
    if (source / DATASET_JSON).exists():
        return source / DATASET_JSON
    hint = ""
    if below := sorted(
        str(path.parent) for path in source.glob(f"*/{DATASET_JSON}") if not path.parent.name.startswith(".")
    ):
        hint = f" It is one level too high: convert {listed(below)}."
    elif (source.resolve().parent / DATASET_JSON).exists():
        hint = f" It is one level too low: convert {source.resolve().parent}."
    raise BadInputError(f"{source} has no {DATASET_JSON}.{hint}", f"Expected is\n{EXPECTED}")


def _entry(source: Path, content: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(content.get(key), dict) or not content[key]:
        message = f"{source / DATASET_JSON} has no '{key}'."
        raise BadInputError(message, f"Add it, or convert the images with the format 'folder'. Expected is\n{EXPECTED}")
    return content[key]


def _channel_names(source: Path, content: dict[str, Any]) -> dict[int, str]:
    names = _entry(source, content, "modality" if "modality" in content else "channel_names")
    if sorted(names) != sorted(str(channel) for channel in range(len(names))):
        message = f"The channels of {source / DATASET_JSON} are numbered {listed(sorted(names))}."
        raise BadInputError(message, "Number them 0, 1, 2, ...")
    return {int(channel): str(names[channel]) for channel in sorted(names, key=int)}


def _training_cases(source: Path, content: dict[str, Any], count: int) -> tuple[list[SourceCase], list[str]]:
    """The listed cases, or all pairs of imagesTr and labelsTr, and a note on images that are not listed."""
    entries = content.get("training")
    if not entries:
        return _paired_cases(source, count), []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        message = f"'training' in {source / DATASET_JSON} is no list of cases."
        raise BadInputError(message, 'Write it as [{"image": "./imagesTr/...", "label": "./labelsTr/..."}, ...].')
    pairs = [(_inside(source, entry.get("image")), _inside(source, entry.get("label"))) for entry in entries]
    _refuse_missing(source, [path for pair in pairs for path in pair])
    images = {image for image, _ in pairs}
    unlisted = [path.name for path in visible_files(source / "imagesTr") if path not in images]
    note = (
        f"{len(unlisted)} file(s) of imagesTr are not listed in {DATASET_JSON} and were left out: {listed(unlisted)}."
    )
    cases = [
        SourceCase(_identifier(image), channels([image], count), VolumeFile(label), "training")
        for image, label in pairs
    ]
    return cases, [note] * bool(unlisted)


def _paired_cases(source: Path, count: int) -> list[SourceCase]:
    images, labels = (volumes_by_stem(require_folder(source / sub, EXPECTED)) for sub in ("imagesTr", "labelsTr"))
    lonely = [str(images[stem]) for stem in sorted(images.keys() - labels.keys())]
    lonely += [str(labels[stem]) for stem in sorted(labels.keys() - images.keys())]
    if lonely:
        message = f"{len(lonely)} file(s) of imagesTr and labelsTr have no counterpart: {listed(lonely)}."
        raise BadInputError(message, "Add what is missing, or remove them.")
    return [SourceCase(stem, channels([images[stem]], count), VolumeFile(labels[stem]), "training") for stem in images]


def _test_cases(source: Path, content: dict[str, Any], count: int) -> tuple[list[SourceCase], list[str]]:
    entries = content.get("test") or []
    if not (source / "imagesTs").is_dir():
        note = f"{len(entries)} test image(s) are listed, but there is no imagesTs: converted without them."
        return [], [note] * bool(entries)
    if not entries:
        files = volumes_by_stem(source / "imagesTs").values()
        return [_test_case(path, count) for path in files], []
    # some data sets list {"image": ...} instead of the bare path
    paths = [_inside(source, entry.get("image") if isinstance(entry, dict) else entry) for entry in entries]
    _refuse_missing(source, paths)
    return [_test_case(path, count) for path in paths], []


def _test_case(path: Path, count: int) -> SourceCase:
    return SourceCase(_identifier(path), channels([path], count), None, "test")


def _inside(source: Path, entry: object) -> Path:
    """The file an entry of dataset.json means, which must lie below the source folder."""
    where = f"{source / DATASET_JSON} lists {entry!r}"
    if not isinstance(entry, str) or not entry:
        raise BadInputError(f"{where}, which is no path.", "Give each case an image and a label.")
    # what is a path on Windows only is refused as well: it cannot be meant
    path = posixpath.normpath(entry.replace("\\", "/"))
    if path.startswith(("/", "..")) or PureWindowsPath(path).drive:
        raise BadInputError(f"{where}, which leads out of that folder.", "Use paths such as ./imagesTr/case.nii.gz.")
    return source / path


def _identifier(path: Path) -> str:
    stem = split_ending(path.name)[0]
    if not stem:
        raise BadInputError(f"{path} is no NIfTI, NRRD or MHA file.", "Convert it, or remove it from dataset.json.")
    return stem


def _refuse_missing(source: Path, paths: list[Path]) -> None:
    missing = [str(path.relative_to(source)) for path in paths if not path.is_file()]
    if not missing:
        return
    message = f"{len(missing)} file(s) that {source / DATASET_JSON} lists are missing: {listed(missing)}."
    mend = "Extract the download again, or remove them from dataset.json."
    if any(split_channel(split_ending(path.name)[0])[1] == 0 for path in visible_files(source / "imagesTr")):
        mend = "The images are named <case>_0000, as in nnU-Net's own layout: convert them with the format 'nnunet'."
    raise BadInputError(message, mend)
