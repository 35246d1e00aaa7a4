"""Plain folders of images and, where there are any, of labels, paired by equal names or by patterns."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import VOLUME_ENDINGS, split_channel, split_ending, visible_files
from diffseg_nnunet.verification import listed

from .archives import ENDINGS, FOREIGN_ENDINGS
from .converter import Converter, Option, Recognition
from .description import BACKGROUND, ConversionPlan, SourceCase
from .label_names import numbered, read_label_names, renumbering
from .layouts import CASE, Layout, match
from .naming import usable_name
from .sources import VolumeFile, channels

EXPECTED = """\
images/liver_01.nii.gz         or liver_01_0000.nii.gz, liver_01_0001.nii.gz, ... with several channels
labels/liver_01.nii.gz         the same name; may be missing altogether
labels.json                    {"background": 0, "liver": 1}, or labels.csv with rows such as 1,liver

or, with --image-pattern "{case}/ct" --label-pattern "{case}/seg":
images/liver_01/ct.nrrd
images/liver_01/seg.nii.gz     or below --labels"""


class FolderConverter(Converter):
    """Images and labels in any mixture of NIfTI, NRRD and MHA."""

    format_name = "folder"
    title = "a folder of images and, optionally, of labels, paired by their names or by patterns"
    expects = EXPECTED
    needs_source = False
    options = (
        Option("modality", "Channel name(s), e.g. CT, or T1,FLAIR.", required=True),
        Option("images", "Folder of images, CASE.nii.gz; else SRC/images, or SRC itself.", Path),
        Option("labels", "Folder of labels; else SRC/labels; none: an unlabelled pool.", Path),
        Option("label_names", "JSON or CSV of the labels' names and values; else SRC/labels.json or .csv.", Path),
        Option("rest_unlabelled", "Images without a label join the unlabelled pool.", bool),
        Option("image_pattern", "Paths of images below --images, e.g. {case}/ct; {case}/t1,{case}/flair."),
        Option("label_pattern", "Paths of labels below --labels (else --images), e.g. {case}/seg."),
        Option("patients", "Regular expression that finds the patient in a case's name, e.g. '^[^_]+'; for the folds."),
    )

    def plan(
        self,
        source: Path | None = None,
        labels: Path | None = None,
        label_names: Path | None = None,
        modality: str | None = None,
        name: str | None = None,
        rest_unlabelled: bool = False,
        *,
        images: Path | None = None,
        image_pattern: str | None = None,
        label_pattern: str | None = None,
        patients: str | None = None,
    ) -> ConversionPlan:
        """Pair the files by their names.

        Args:
            source: folder of `images`, `labels` and ``labels.json``, whatever of them there is and is not given below;
                or of the images themselves.
            labels: folder of ``<case>.nii.gz``; None makes all images an unlabelled pool.
            label_names: JSON ``{"name": value}`` or ``{"value": "name"}``, or a table; needed with labels. Gaps between
                the values are closed.
            modality: channel names in channel order, separated by commas, e.g. 'CT' or 'T1,FLAIR'.
            name: name of the data set; None: the folder's.
            rest_unlabelled: with labels, use images without a label as unlabelled instead of refusing them.
            images: folder of ``<case>.nii.gz`` or ``<case>_XXXX.nii.gz`` (.nii, .nrrd and .mha as well).
            image_pattern: path of an image below the folder, ``{case}`` standing for the case, with or without its
                ending; several channels by several patterns, separated by commas.
            label_pattern: the same of a label, below `labels`, or below the images where `labels` is None.
            patients: finds in a case's name whom it shows (its first group, else the whole match): scans of one patient
                never lie on both sides of a fold. A case without a match is a patient of its own.

        Raises:
            BadInputError: a folder is missing or has no image, names do not pair, or label names are wrong.
        """
        found = _folders_in(source) if source is not None else {}
        images, labels = images or found.get("images"), labels or found.get("labels")
        label_names = label_names or found.get("label_names")
        given = {"SRC or --images": images, "--modality": modality}
        if missing := [option for option, value in given.items() if value is None]:
            raise BadInputError(f"The format 'folder' needs {listed(missing)}.", f"Expected is\n{EXPECTED}")
        channel_names = _channel_names(modality)
        count = len(channel_names)
        labels = labels or (images if label_pattern else None)
        label_files = _label_files(labels, label_pattern) if labels is not None else {}
        require_folder(images, EXPECTED)
        if image_pattern:
            image_files = _matched_images(images, image_pattern, count)
        else:
            image_files = numbered_images(images, set(label_files), count)
        if labels is None:
            if label_names is not None:
                raise BadInputError(
                    "Label names were given, but no labels.", "Give the folder of labels with --labels."
                )
            values = {BACKGROUND: 0}
        else:
            values = _label_values(label_names)
            _refuse_unpaired(image_files, label_files, rest_unlabelled)
        shown, notes = _patients(patients, image_files)
        cases = tuple(
            SourceCase(
                case,
                channels(files, count),
                VolumeFile(label_files[case]) if case in label_files else None,
                "training" if case in label_files else "unlabelled",
                patient=shown.get(case),
            )
            for case, files in sorted(image_files.items())
        )
        named = numbered(values)
        return ConversionPlan(
            name=_name_of(source or images) if name is None else name,
            channel_names=channel_names,
            labels=named,
            cases=cases,
            source_labels=values,
            notes=(*renumbering(values, named), *notes),
        )

    def recognise(self, source: Path) -> Recognition | None:
        """Weakly: a folder `images` of volumes (and `labels` beside it), or volumes right here."""
        images = _folders_in(source)["images"]
        count = len(visible_files(images, VOLUME_ENDINGS))
        reason = f"{count} image(s) lie in {images}, which tells nothing else"
        return Recognition(self.format_name, reason, 0.1, {}) if count else None


def _patients(pattern: str | None, cases: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Case -> patient, of those in whose names there is one, and notes."""
    if pattern is None:
        return {}, []
    try:
        found = {case: match for case in sorted(cases) if (match := re.search(pattern, case)) and match[0]}
    except re.error as error:
        raise BadInputError(f"--patients {pattern!r} is no regular expression ({error}).", "Mend it.") from error
    if not found:
        raise BadInputError(
            f"--patients {pattern!r} finds nothing in any case's name, such as {min(cases)}.",
            "Write what finds the patient in it, for example '^[^_]+': all before the first underscore.",
        )
    patients = {case: (match[1] if match.re.groups else None) or match[0] for case, match in found.items()}
    notes = [f"{len(cases)} cases are of {len(set(patients.values())) + len(cases) - len(found)} patient(s)."]
    if alone := sorted(set(cases) - set(found)):
        notes.append(f"No patient was found in the names of {len(alone)} case(s): {listed(alone)}.")
    return patients, notes


def _folders_in(source: Path) -> dict[str, Path]:
    """What there is of `images` (else the source itself holds them), of `labels` beside it, and of their names."""
    images = source / "images"
    if not visible_files(images, VOLUME_ENDINGS):
        return {"images": source}
    found = {"images": images}
    if visible_files(source / "labels", VOLUME_ENDINGS):
        found["labels"] = source / "labels"
        named = [source / name for name in ("labels.json", "labels.csv") if (source / name).is_file()]
        found |= {"label_names": named[0]} if named else {}
    return found


def _name_of(folder: Path) -> str:
    """The folder's name, or its parent's where it is only called "images"."""
    folder = folder.resolve()
    return usable_name((folder.parent if folder.name.startswith("images") else folder).name, "Folder")


def require_folder(folder: Path, expected: str) -> Path:
    """The folder itself if it is one and holds something.

    Raises:
        BadInputError: it is missing, empty, or an archive; the message shows the tree that is expected.
    """
    tree = f"Expected is\n{expected}"
    if folder.is_file():
        archive = folder.name.lower().endswith((*ENDINGS, *FOREIGN_ENDINGS))
        reason = "is an archive; extract it first, then point to the folder" if archive else "is a file, not a folder"
        raise BadInputError(f"{folder} {reason}.", tree)
    if not folder.is_dir():
        raise BadInputError(f"There is no folder {folder}.", tree)
    if not any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise BadInputError(f"The folder {folder} is empty.", tree)
    return folder


def volumes_by_stem(folder: Path) -> dict[str, Path]:
    """Stem -> file of all visible volumes in a folder, sorted.

    Raises:
        BadInputError: two files differ by their ending only.
    """
    found: dict[str, Path] = {}
    for path in visible_files(folder, VOLUME_ENDINGS):
        stem = split_ending(path.name)[0]
        if stem in found:
            raise BadInputError(f"{found[stem]} and {path.name} are one case twice.", "Remove one of them.")
        found[stem] = path
    return found


def _channel_names(modality: str) -> dict[int, str]:
    names = [channel.strip() for channel in modality.split(",")]
    if not all(names):
        raise BadInputError(f"'{modality}' has an empty channel name.", "Give, for example, --modality CT or T1,FLAIR.")
    return dict(enumerate(names))


def _matched(folder: Path, pattern: str) -> dict[str, Path]:
    """What `{case}` stands for -> file."""
    pattern = split_ending(pattern)[0] or pattern
    levels = pattern.split("/")
    if CASE not in pattern or pattern.startswith("/") or {"", ".", ".."} & set(levels):
        raise BadInputError(
            f"'{pattern}' is no pattern of paths below {folder}.",
            'Write it with "/" and with {case} for what tells the cases apart, for example "{case}/ct".',
        )
    found = match(pattern, folder, Layout("a pattern", ()))
    if not found:
        message = f"Nothing in {folder} fits '{pattern}' with an ending of {', '.join(VOLUME_ENDINGS)}."
        raise BadInputError(message, f"Expected is\n{EXPECTED}")
    return found


def _matched_images(folder: Path, patterns: str, channel_count: int) -> dict[str, tuple[Path, ...]]:
    """Case -> its channel files, one pattern a channel; or one pattern of files that hold all channels."""
    found = [_matched(folder, pattern.strip()) for pattern in patterns.split(",")]
    if len(found) not in (1, channel_count):
        message = f"There are {len(found)} image patterns for {channel_count} channel(s)."
        raise BadInputError(message, "Give one pattern a channel, in the order of --modality.")
    cases = sorted({case for channel in found for case in channel})
    if lacking := [case for case in cases if not all(case in channel for channel in found)]:
        message = f"{len(lacking)} case(s) in {folder} lack one of their {len(found)} channels: {listed(lacking)}."
        raise BadInputError(message, "Add what is missing, or remove these cases.")
    return {case: tuple(channel[case] for channel in found) for case in cases}


def _label_files(labels: Path, pattern: str | None) -> dict[str, Path]:
    require_folder(labels, EXPECTED)
    files = _matched(labels, pattern) if pattern else volumes_by_stem(labels)
    if not files:
        raise BadInputError(f"{labels} holds no label ({', '.join(VOLUME_ENDINGS)}).", f"Expected is\n{EXPECTED}")
    return files


def _label_values(label_names: Path | None) -> dict[str, int]:
    if label_names is None:
        raise BadInputError(
            "The labels have no names.", 'Give a JSON file such as {"background": 0, "liver": 1} with --label-names.'
        )
    return read_label_names(label_names)


def numbered_images(images: Path, labelled: set[str], channel_count: int) -> dict[str, tuple[Path, ...]]:
    """Case -> its channel files.

    Whether ``case_0001`` is channel 1 of ``case`` or a case of its own, the labels' names decide; where they say
    nothing, it is a channel if every such image then has a channel number that exists.
    """
    files = volumes_by_stem(images)
    if not files:
        deeper = sorted({path.parent.name for path in images.glob("*/*") if path.name.endswith(VOLUME_ENDINGS)})
        hint = f" Its subfolders {listed(deeper)} do." if deeper else ""
        raise BadInputError(f"{images} holds no image ({', '.join(VOLUME_ENDINGS)}).{hint}", f"Expected is\n{EXPECTED}")
    open_stems = [stem for stem in files if stem not in labelled and split_channel(stem)[0] not in labelled]
    numbers = [split_channel(stem)[1] for stem in open_stems]
    suffixed = all(number is not None and number < channel_count for number in numbers)
    cases: dict[str, dict[int, Path]] = {}
    for stem, path in files.items():
        case, channel = split_channel(stem)
        if channel is None or stem in labelled or (case not in labelled and not suffixed):
            case, channel = stem, 0
        cases.setdefault(case, {})[channel] = path
    for case, of_case in cases.items():
        if sorted(of_case) != list(range(len(of_case))):
            message = f"The case '{case}' in {images} has the channels {listed(sorted(of_case))}."
            raise BadInputError(message, "Number them 0000, 0001, ... without a gap.")
    return {case: tuple(of_case[number] for number in sorted(of_case)) for case, of_case in cases.items()}


def _refuse_unpaired(images: dict[str, tuple[Path, ...]], labels: dict[str, Path], rest_unlabelled: bool) -> None:
    hint = "" if images.keys() & labels.keys() else " No name fits: an image and its label must be called the same."
    if lonely := [labels[case] for case in sorted(labels.keys() - images.keys())]:
        message = f"{len(lonely)} label(s) in {lonely[0].parent} have no image: {listed(path.name for path in lonely)}."
        raise BadInputError(message + hint, "Add or rename the images, or remove these labels.")
    if rest_unlabelled:
        return
    if lonely := [images[case][0] for case in sorted(images.keys() - labels.keys())]:
        message = f"{len(lonely)} image(s) in {lonely[0].parent} have no label: {listed(path.name for path in lonely)}."
        raise BadInputError(message, "Add the labels, or use these images as unlabelled with --rest-unlabelled.")
