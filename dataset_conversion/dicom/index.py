"""What DICOM files there are in a tree: headers only, whatever the files are called."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffseg_nnunet.verification import UnreadableVolumeError, in_threads

from .planes import CLASSIC_IMAGES, ENHANCED_IMAGES, Plane, planes, words
from .series import DAMAGED, read_dataset

if TYPE_CHECKING:
    from pydicom import Dataset

RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # plain, and label maps
_DICOMDIR = "1.2.840.10008.1.3.10"
# a preamble and DICM, or, without one, a first element of the group 0002 or 0008
_MAGIC_OFFSET, _MAGIC, _FIRST_GROUPS = 128, b"DICM", (b"\x02\x00", b"\x08\x00", b"\x00\x08")


@dataclass(frozen=True)
class Instance:
    """A DICOM file's header, as far as picking and naming series needs it."""

    path: Path
    sop_class: str
    uid: str
    modality: str
    series: str
    frame_of_reference: str
    patient: str
    study: str
    study_date: str
    series_number: str
    description: str
    image_type: tuple[str, ...]
    padded: bool
    planes: tuple[Plane, ...]


@dataclass(frozen=True)
class Series:
    """The files of one SeriesInstanceUID, sorted by path."""

    uid: str
    instances: tuple[Instance, ...]

    @property
    def first(self) -> Instance:
        return self.instances[0]

    @property
    def folder(self) -> Path:
        """The innermost folder that holds all files."""
        return Path(os.path.commonpath([instance.path.parent for instance in self.instances]))


@dataclass(frozen=True)
class Index:
    """What a tree holds.

    Attributes:
        series: sorted by UID.
        ignored: what was passed over -> how many.
    """

    series: tuple[Series, ...]
    ignored: dict[str, int]


def index(root: Path, workers: int) -> Index:
    """Read all headers below a folder. Links to folders are not followed, hidden files are passed over."""
    ignored: Counter[str] = Counter()
    files = list(_files(root, ignored))
    series: dict[str, dict[object, Instance]] = {}
    for found in in_threads(_instance, files, workers):
        if isinstance(found, str):
            ignored[found] += 1
            continue
        # the same file twice in a tree is common; equal UIDs of different images come from careless anonymisation
        places = tuple((plane.frame, plane.position, plane.time, plane.echo) for plane in found.planes)
        twin = series.setdefault(found.series, {}).setdefault((found.uid, places), found)
        if twin is not found:
            ignored["copies of another file"] += 1
    grouped = [Series(uid, tuple(instances.values())) for uid, instances in sorted(series.items())]
    return Index(tuple(grouped), dict(sorted(ignored.items())))


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do."""
    try:
        with path.open("rb") as stream:
            head = stream.read(_MAGIC_OFFSET + len(_MAGIC))
    except OSError:
        return False
    return head[_MAGIC_OFFSET:] == _MAGIC or (len(head) > _MAGIC_OFFSET and head.startswith(_FIRST_GROUPS))


def _files(folder: Path, ignored: Counter[str]) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path), ignored)
        elif entry.is_dir():
            ignored["links to folders"] += 1
        elif entry.is_file():
            yield Path(entry.path)


def _instance(path: Path) -> Instance | str:
    """The header, or why there is none."""
    if path.name.upper() == "DICOMDIR":
        return "DICOMDIR"
    if not is_dicom(path):
        return "files that are no DICOM"
    try:
        header = read_dataset(path, pixels=False)
        return "DICOMDIR" if header.SOPClassUID == _DICOMDIR else _described(header, path)
    except (UnreadableVolumeError, *DAMAGED):
        # a header is believed only where all of it can be read
        return "files whose header is damaged"


def _described(header: Dataset, path: Path) -> Instance:
    sop_class = str(header.SOPClassUID)
    image = sop_class in CLASSIC_IMAGES or sop_class in ENHANCED_IMAGES

    def text(keyword: str) -> str:
        return str(header.get(keyword) or "").strip()

    return Instance(
        path=path,
        sop_class=sop_class,
        uid=text("SOPInstanceUID"),
        modality=text("Modality"),
        series=text("SeriesInstanceUID"),
        frame_of_reference=text("FrameOfReferenceUID"),
        patient=text("PatientID"),
        study=text("StudyInstanceUID"),
        study_date=text("StudyDate"),
        series_number=text("SeriesNumber"),
        description=text("SeriesDescription"),
        image_type=tuple(word.upper() for word in words(header.get("ImageType"))),
        padded="PixelPaddingValue" in header,
        planes=planes(header, path) if image else (),
    )
