"""Plain folders: one of images, and, where there are labels, one of label files with the same names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import VOLUME_ENDINGS, read_json_object, split_channel, split_ending, visible_files
from diffseg_nnunet.verification import listed

from .converter import Converter, Option
from .description import ConversionPlan, SourceCase
from .sources import VolumeFile, channels

ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")
EXPECTED = """\
images/liver_01.nii.gz         or liver_01_0000.nii.gz, liver_01_0001.nii.gz, ... with several channels
labels/liver_01.nii.gz         the same name; may be missing altogether
labels.json                    {"background": 0, "liver": 1}"""


class FolderConverter(Converter):
    """Images and labels that lie in two folders, under equal names (NIfTI, NRRD or MHA)."""

    format_name = "folder"
    title = "a folder of images and, optionally, of labels, paired by their names"
    expects = EXPECTED
    takes_source = False
    options = (
        Option("images", "Folder of images, CASE.nii.gz.", Path, required=True),
        Option("modality", "Channel name(s), e.g. CT, or T1,FLAIR.", required=True),
        Option("labels", "Folder of labels; none: an unlabelled pool.", Path),
        Option("label_names", 'JSON {"background": 0, "liver": 1, ...}.', Path),
        Option("rest_unlabelled", "Images without a label join the unlabelled pool.", bool),
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
    ) -> ConversionPlan:
        """Pair the files by their names.

        Args:
            source: folder of ``<case>.nii.gz`` or ``<case>_XXXX.nii.gz`` (.nii, .nrrd and .mha as well).
            labels: folder of ``<case>.nii.gz``; None makes all images an unlabelled pool.
            label_names: JSON ``{"name": value}`` or ``{"value": "name"}``; needed with `labels`.
            modality: channel names in channel order, separated by commas, e.g. 'CT' or 'T1,FLAIR'.
            name: name of the data set.
            rest_unlabelled: with `labels`, use images without a label as unlabelled instead of refusing them.
            images: the same as `source`, which the command lacks.

        Raises:
            BadInputError: a folder is missing or has no image, names do not pair, or label names are wrong.
        """
        images = images or source
        given = {"--images": images, "--modality": modality, "--name": name}
        if missing := [option for option, value in given.items() if not value]:
            raise BadInputError(f"The format 'folder' needs {listed(missing)}.", f"Expected is\n{EXPECTED}")
        channel_names = _channel_names(modality)
        label_files = _label_files(labels) if labels is not None else {}
        image_files = _image_files(require_folder(images, EXPECTED), set(label_files), len(channel_names))
        if labels is None:
            if label_names is not None:
                raise BadInputError(
                    "Label names were given, but no labels.", "Give the folder of labels with --labels."
                )
            values = {"background": 0}
        else:
            values = _label_values(label_names)
            _refuse_unpaired(image_files, label_files, rest_unlabelled)
        cases = tuple(
            SourceCase(
                case,
                channels(files, len(channel_names)),
                VolumeFile(label_files[case]) if case in label_files else None,
                "training" if case in label_files else "unlabelled",
            )
            for case, files in sorted(image_files.items())
        )
        return ConversionPlan(name, channel_names, values, cases)


def require_folder(folder: Path, expected: str) -> Path:
    """The folder itself if it is one and holds something.

    Raises:
        BadInputError: it is missing, empty, or an archive; the message shows the tree that is expected.
    """
    tree = f"Expected is\n{expected}"
    if folder.is_file():
        archive = folder.name.endswith(ARCHIVE_ENDINGS)
        reason = "is an archive; extract it first, then point to the folder" if archive else "is a file, not a folder"
        raise BadInputError(f"{folder} {reason}.", tree)
    if not folder.is_dir():
        raise BadInputError(f"There is no folder {folder}.", tree)
    if not any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise BadInputError(f"The folder {folder} is empty.", tree)
    return folder


def parse_label_names(content: Mapping[str, Any], where: Path | str) -> dict[str, int]:
    """``{"liver": 1}`` or ``{"1": "liver"}`` -> ``{"liver": 1}``, sorted by value, the value 0 named 'background'.

    Raises:
        BadInputError: an entry is neither, a name occurs twice, or the values are not 0, 1, 2, ...
    """
    named: dict[str, int] = {}
    for key, entry in content.items():
        name, number = (entry, key) if isinstance(entry, str) and not entry.strip().isdigit() else (key, entry)
        if isinstance(number, bool | float) or not str(number).isdigit():
            raise BadInputError(
                f"{where}: the label {key!r}: {entry!r} does not pair a name with a whole number.",
                'Write {"background": 0, "liver": 1, ...}.',
            )
        # nnU-Net knows the value 0 by this name only
        name = "background" if int(number) == 0 else name
        if name in named:
            raise BadInputError(f"{where}: two labels are called '{name}'.", "Give each value a name of its own.")
        named[name] = int(number)
    values = sorted(named.values())
    if values != list(range(len(values))) or not values:
        raise BadInputError(
            f"{where}: the label values are {listed(values) or 'none'}; nnU-Net needs background 0, then 1, 2, ... "
            "without a gap or a repetition.",
            "Renumber them there and in the label files.",
        )
    return dict(sorted(named.items(), key=lambda item: item[1]))


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


def _label_files(labels: Path) -> dict[str, Path]:
    files = volumes_by_stem(require_folder(labels, EXPECTED))
    if not files:
        raise BadInputError(f"{labels} holds no label ({', '.join(VOLUME_ENDINGS)}).", f"Expected is\n{EXPECTED}")
    return files


def _label_values(label_names: Path | None) -> dict[str, int]:
    if label_names is None:
        raise BadInputError(
            "The labels have no names.", 'Give a JSON file such as {"background": 0, "liver": 1} with --label-names.'
        )
    return parse_label_names(read_json_object(label_names), label_names)


def _image_files(images: Path, labelled: set[str], channel_count: int) -> dict[str, tuple[Path, ...]]:
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


def _refuse_unpaired(images: dict[str, tuple[Path, ...]], labels: dict[str, Path], unlabelled_rest: bool) -> None:
    hint = "" if images.keys() & labels.keys() else " No name fits: an image and its label must be called the same."
    if lonely := [labels[case] for case in sorted(labels.keys() - images.keys())]:
        message = f"{len(lonely)} label(s) in {lonely[0].parent} have no image: {listed(path.name for path in lonely)}."
        raise BadInputError(message + hint, "Add or rename the images, or remove these labels.")
    if unlabelled_rest:
        return
    if lonely := [images[case][0] for case in sorted(images.keys() - labels.keys())]:
        message = f"{len(lonely)} image(s) in {lonely[0].parent} have no label: {listed(path.name for path in lonely)}."
        raise BadInputError(message, "Add the labels, or use these images as unlabelled with --rest-unlabelled.")
