"""The raw nnU-Net data set on disk: which cases it has, which files they consist of, what dataset.json says.

Layout (``<id>`` is the case identifier, ``XXXX`` the channel number from 0000)::

    DatasetXXX_Name/
        dataset.json
        imagesTr/<id>_XXXX.nii.gz    labelled images
        labelsTr/<id>.nii.gz         their labels
        imagesUn/<id>_XXXX.nii.gz    unlabelled images, for pretraining only (ours; stock nnU-Net ignores the folder)
        imagesTs/<id>_XXXX.nii.gz    test images

Reads file names and JSON only: no voxel, no nnU-Net, no heavy import.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.patients import SAME_PATIENT

DATASET_JSON = "dataset.json"
SPLITS_FILE = "splits_final.json"
_GZIP_TRAILER = 8
"""Bytes: the checksum of what is compressed, and its size (RFC 1952)."""
VOLUME_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")
SIGNED_FOLDERS = ("imagesTr", "labelsTr", "imagesUn")

_CHANNEL_SUFFIX = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class Case:
    """One scan.

    Attributes:
        identifier: the file name without channel number and ending.
        images: one file a channel, in channel order.
        label: the segmentation, None for an unlabelled or test case.
    """

    identifier: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class RawDataset:
    """A raw data set; every method looks at the disk anew.

    Attributes:
        folder: ``.../DatasetXXX_Name``.
        dataset_json: the content of its dataset.json.
    """

    folder: Path
    dataset_json: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str) -> RawDataset:
        """Read dataset.json; what it says is checked when it is asked for, and by `verification.verify_dataset`.

        Raises:
            BadInputError: the folder or its dataset.json is missing, or dataset.json is not a JSON object.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise BadInputError(
                f"There is no data set in {folder}.",
                "Convert one with `diffseg convert`, or point --workspace at the right folder.",
            )
        return cls(folder, read_json_object(folder / DATASET_JSON))

    @property
    def name(self) -> str:
        """``DatasetXXX_Name``, as nnU-Net calls it."""
        return self.folder.name

    @property
    def file_ending(self) -> str:
        """The ending of all images and labels, with its dot; raises BadInputError where dataset.json lacks it."""
        return str(self._required("file_ending", str))

    @property
    def channel_names(self) -> dict[str, str]:
        """Channel number (as a string) -> name; raises BadInputError where dataset.json lacks it."""
        # `modality` is the key's old name, which nnU-Net still accepts
        key = "channel_names" if "channel_names" in self.dataset_json else "modality"
        return dict(self._required(key, dict, called="channel_names"))

    @property
    def labels(self) -> dict[str, Any]:
        """Label name -> value; regions (lists of values) and 'ignore' as they are in dataset.json.

        Raises:
            BadInputError: dataset.json has no labels.
        """
        return dict(self._required("labels", dict))

    @property
    def label_values(self) -> set[int]:
        """Every value that a label file may hold, those of regions and of 'ignore' included."""
        return values_of_labels(self.labels)

    def labelled_cases(self) -> list[Case]:
        """Cases that have images and a label: those of dataset.json's key 'dataset', else imagesTr with labelsTr."""
        if "dataset" in self.dataset_json:
            return self._listed_cases()
        labels = self.label_files("labelsTr")
        images = self.image_files("imagesTr")
        return [Case(name, files, labels[name]) for name, files in images.items() if name in labels]

    def unlabelled_cases(self) -> list[Case]:
        """Cases of imagesUn."""
        return [Case(name, files, None) for name, files in self.image_files("imagesUn").items()]

    def test_cases(self) -> list[Case]:
        """Cases of imagesTs; their labels, where there are any, are not looked for."""
        return [Case(name, files, None) for name, files in self.image_files("imagesTs").items()]

    def image_files(self, subfolder: str) -> dict[str, tuple[Path, ...]]:
        """Identifier -> its channel files, in order; files not named ``<id>_XXXX<ending>`` are left out."""
        grouped: dict[str, list[Path]] = {}
        for path in visible_files(self.folder / subfolder, (self.file_ending,)):
            identifier, channel = split_channel(path.name[: -len(self.file_ending)])
            if channel is not None:
                grouped.setdefault(identifier, []).append(path)
        return {identifier: tuple(grouped[identifier]) for identifier in sorted(grouped)}

    def label_files(self, subfolder: str) -> dict[str, Path]:
        """Identifier -> label file."""
        files = visible_files(self.folder / subfolder, (self.file_ending,))
        return {path.name[: -len(self.file_ending)]: path for path in files}

    def content_signature(self) -> str:
        """SHA-256 (hexadecimal) that changes when dataset.json, or any labelled or unlabelled file, changes.

        Who shows in which case (``same_patient``) is no content: folds depend on it, and no voxel.

        Files enter by relative path, size, and checksum where they are gzip's, which ends with one of its content, or
        else time of modification: hardly anything is read. So a copied workspace of ``.nii.gz`` is unchanged.
        """
        content = {key: value for key, value in self.dataset_json.items() if key != SAME_PATIENT}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        files = [path for name in SIGNED_FOLDERS for path in visible_files(self.folder / name)]
        if "dataset" in self.dataset_json:
            files += [path for case in self._listed_cases() for path in (*case.images, case.label) if path is not None]
        for path in sorted(set(files)):
            digest.update(repr((Path(os.path.relpath(path, self.folder)).as_posix(), _file_state(path))).encode())
        return digest.hexdigest()

    def _listed_cases(self) -> list[Case]:
        entries = self._required("dataset", dict)
        cases = []
        for identifier in sorted(entries):
            try:
                images = tuple(self._listed_path(image) for image in entries[identifier]["images"])
                label = self._listed_path(entries[identifier]["label"])
            except (KeyError, TypeError) as error:
                raise BadInputError(
                    f"{self.folder / DATASET_JSON} lists no images and label for '{identifier}' under 'dataset'.",
                    'Write it as {"images": ["..."], "label": "..."}.',
                ) from error
            cases.append(Case(identifier, images, label))
        return cases

    def _listed_path(self, entry: str) -> Path:
        # relative entries count from the data set's folder, and variables are expanded, as in nnU-Net
        return self.folder / os.path.expandvars(entry)

    def _required(self, key: str, kind: type, called: str | None = None) -> Any:
        if not isinstance(self.dataset_json.get(key), kind):
            raise BadInputError(
                f"{self.folder / DATASET_JSON} has no valid '{called or key}'.",
                "Add it as nnU-Net's dataset format asks, or convert the data set again with `diffseg convert`.",
            )
        return self.dataset_json[key]


def _file_state(path: Path) -> tuple[int, int] | None:
    """What tells that a file has changed: its size, and the checksum (CRC-32) that gzip ends with, which survives a
    copy, or of other formats the time of modification; None where it has vanished, or is a broken link."""
    try:
        status = path.stat()
        return status.st_size, _check(path, status.st_size, status.st_mtime_ns)
    except FileNotFoundError:
        return None


@lru_cache(maxsize=100_000)
def _check(path: Path, size: int, modified: int) -> int:
    if path.suffix != ".gz" or size < _GZIP_TRAILER:
        return modified
    try:
        with open(path, "rb") as stream:
            stream.seek(-_GZIP_TRAILER, os.SEEK_END)
            trailer = stream.read()
            # of several members, as bgzip writes them, the last is empty and says nothing of the others
            return int.from_bytes(trailer, "little") if any(trailer[4:]) else modified
    except PermissionError:  # for `diffseg verify` to report
        return modified


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds one object.

    Raises:
        BadInputError: the file is missing, cannot be read, is not JSON (the message gives line and column), or holds
            something other than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise BadInputError(f"{path} is missing.", "Check the path, or extract the download again.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path} cannot be read: {error}.", "Check its permissions and its encoding.") from error
    except json.JSONDecodeError as error:
        raise BadInputError(
            f"{path} is not valid JSON: {error.msg}, line {error.lineno}, column {error.colno}.",
            "Mend that line (a missing or trailing comma is the usual cause).",
        ) from error
    if not isinstance(content, dict):
        raise BadInputError(f"{path} holds no JSON object.", "Write it as {...}.")
    return content


def values_of_labels(labels: Mapping[str, Any]) -> set[int]:
    """All label values of ``{name: value}``, where a value is an integer or, for a region, a list of integers."""
    return {
        int(value) for entry in labels.values() for value in (entry if isinstance(entry, list | tuple) else [entry])
    }


def visible_files(folder: Path, endings: Iterable[str] = ("",)) -> list[Path]:
    """Files of `folder` with one of `endings`, sorted by name; none where the folder is missing.

    Hidden files (macOS leaves ``._*`` behind) are ignored. Broken links are listed: they are somebody's data that has
    not arrived, and must not vanish silently.
    """
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".")
        and path.name.endswith(tuple(endings))
        and (path.is_file() or path.is_symlink())
    )


def split_ending(name: str) -> tuple[str, str]:
    """File name -> (stem, ending), the ending one of `VOLUME_ENDINGS`; ('', '') where it is none of them."""
    for ending in VOLUME_ENDINGS:
        if name.endswith(ending):
            return name[: -len(ending)], ending
    return "", ""


def split_channel(stem: str) -> tuple[str, int | None]:
    """``'liver_01_0002'`` -> ``('liver_01', 2)``; the channel is None where there is no four-digit suffix."""
    match = _CHANNEL_SUFFIX.fullmatch(stem)
    return (match[1], int(match[2])) if match else (stem, None)


def why_unusable(identifier: str) -> str | None:
    """Why nnU-Net or a shell cannot handle a case identifier, None if they can."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", identifier):
        return (
            "it has characters other than letters, digits and '_', '-', '.', '+', or starts with one of the last three"
        )
    if identifier.endswith("_seg"):
        return "nnU-Net takes preprocessed files that end in '_seg' for segmentations and would drop the case"
    return None
