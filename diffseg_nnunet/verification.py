"""Checks of images and labels: before a converter publishes them, and for `diffseg verify`.

SimpleITK alone is not enough. It reads a truncated ``.nii`` or ``.nii.gz`` without an error and leaves the rest of the
voxels empty, it reads NaN in them as 0, and it reports success when the disk is full: `read_volume` and `walk_nifti`
look at the whole file instead.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
import SimpleITK as sitk

from diffseg_nnunet.raw_dataset import (
    VOLUME_ENDINGS,
    Case,
    RawDataset,
    split_channel,
    split_ending,
    values_of_labels,
    visible_files,
    why_unusable,
)

TOLERANCE_MM = 1e-3
TOLERANCE_DIRECTION = 1e-3
# nnU-Net's reader (channels) and integrity check (labels) stop where spacings differ by more than numpy.allclose allows
TOLERANCE_SPACING_RELATIVE = 1e-5
REQUIRED_KEYS = ("channel_names", "labels", "numTraining", "file_ending")

_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 20
_NIFTI_HEADER_BYTES = 348
_NIFTI_FLOATS = {16: "f4", 64: "f8"}
_NOT_FINITE = "NaN or infinite (one is enough to turn a network's weights into NaN)"
_MEND_NOT_FINITE = "Replace them, for example by the value of air."

Severity = Literal["error", "warning"]
Progress = Callable[[int, int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        code: what kind of thing, for machines, e.g. 'label_values'.
        case: the case identifier, '' where the data set as a whole is meant.
        message: what is wrong, in which file, and why that matters.
        mend: what to do about it.
        severity: an 'error' stops a conversion or a training, a 'warning' does not.
    """

    code: str
    case: str
    message: str
    mend: str
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.message} {self.mend}"


class UnreadableVolumeError(Exception):
    """A file is missing, damaged, no volume, or would be read wrongly.

    Attributes:
        path: the file.
        reason: why, without the file's name.
        code: as in `Finding`.
        mend: as in `Finding`.
    """

    def __init__(self, path: Path, reason: str, code: str = "unreadable", mend: str = "Download or export it again."):
        super().__init__(f"{path} cannot be used: {reason}.")
        self.path, self.reason, self.code, self.mend = path, reason, code, mend

    def as_finding(self, case: str, shown_as: Path | None = None) -> Finding:
        """The same as a finding about `case`, with another name for the file if one is given."""
        return Finding(self.code, case, f"{shown_as or self.path} cannot be used: {self.reason}.", self.mend)


# --- one file: is all of it there? ----------------------------------------------------------------------------------


def read_volume(path: Path) -> sitk.Image:
    """Read a volume, voxels and geometry, after making sure that SimpleITK will read what the file says.

    Raises:
        UnreadableVolumeError: the file is missing, truncated, damaged, or no image that SimpleITK knows; or it is a
            NIfTI file with NaN or infinite voxels, which SimpleITK would turn into 0 without a word.
    """
    if not path.is_file():
        reason = "the link leads nowhere" if path.is_symlink() else "there is no such file"
        raise UnreadableVolumeError(path, reason, "missing_file")
    if path.name.endswith((".nii", ".nii.gz")) and (count := walk_nifti(path)):
        raise UnreadableVolumeError(path, f"{count} of its voxels are {_NOT_FINITE}", "not_finite", _MEND_NOT_FINITE)
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise UnreadableVolumeError(path, _last_words(error)) from error


def walk_nifti(path: Path) -> int:
    """Read a NIfTI file to its end and count its NaN and infinite voxels.

    Raises:
        UnreadableVolumeError: the file cannot be read, is truncated or damaged (gzip must find its checksum right, and
            there must be as many voxels as the header promises), or is no NIfTI-1 file.
    """
    try:
        with path.open("rb") as raw:
            compressed = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
            raw.seek(0)
            return _walk(path, gzip.GzipFile(fileobj=raw) if compressed else raw)
    except EOFError as error:
        raise UnreadableVolumeError(path, "it is truncated, its compressed stream has no end") from error
    except (OSError, zlib.error) as error:
        raise UnreadableVolumeError(path, f"it is damaged or may not be read ({error})") from error


def _walk(path: Path, stream: BinaryIO | gzip.GzipFile) -> int:
    header = stream.read(_NIFTI_HEADER_BYTES)
    order = next((order for order in "<>" if header[:4] == struct.pack(f"{order}i", _NIFTI_HEADER_BYTES)), None)
    if order is None or len(header) < _NIFTI_HEADER_BYTES:
        two = header[4:7] in (b"n+2", b"ni2")
        reason = "it is a NIfTI-2 file, which ITK does not know" if two else "it has no NIfTI header"
        raise UnreadableVolumeError(path, reason, mend="Save it as NIfTI-1." if two else "Download or export it again.")
    count, *extents = struct.unpack_from(f"{order}8h", header, 40)
    kind, bits = struct.unpack_from(f"{order}2h", header, 70)
    (offset,) = struct.unpack_from(f"{order}f", header, 108)
    promised = math.prod(max(1, extent) for extent in extents[: max(0, count)]) * bits // 8
    dtype = np.dtype(order + _NIFTI_FLOATS[kind]) if kind in _NIFTI_FLOATS else None
    stream.read(max(0, int(offset) - _NIFTI_HEADER_BYTES))
    missing, not_finite = promised, 0
    while missing > 0 and (chunk := stream.read(min(_CHUNK_BYTES, missing))):
        missing -= len(chunk)
        if dtype is not None and len(chunk) % dtype.itemsize == 0:
            not_finite += int(np.count_nonzero(~np.isfinite(np.frombuffer(chunk, dtype))))
    if missing:
        raise UnreadableVolumeError(path, f"it is truncated, {missing} of {promised} bytes of its voxels are missing")
    # gzip's checksum comes after the last byte
    while stream.read(_CHUNK_BYTES):
        pass
    return not_finite


def _last_words(error: RuntimeError) -> str:
    """The part of a SimpleITK error that says what happened, without its source files."""
    if "orthonormal" in str(error):
        return "its axes are not orthonormal (sheared, or rounded in the header), a geometry that ITK does not read"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("sitk::ERROR: ").rstrip(".") if lines else "SimpleITK gives no reason"


# --- one case -------------------------------------------------------------------------------------------------------


def check_case(
    case: Case,
    *,
    channel_count: int,
    label_values: set[int] | None,
    label_required: bool = False,
    shown_as: Mapping[Path, Path] | None = None,
) -> list[Finding]:
    """Read every file of a case once, voxels included, and say what is wrong with it.

    Args:
        case: the case; channels and label are compared with its first image.
        channel_count: how many images the case must have.
        label_values: the values its label may hold; None leaves them unchecked.
        label_required: a case without a label is an error.
        shown_as: names to show instead of a file's own, for files that have not reached their place.
    """
    check = _CaseCheck(case.identifier, shown_as or {})
    if not case.images:
        check.add("missing_image", f"The case '{case.identifier}' has no image.", "Add it, or remove its label.")
    elif len(case.images) != channel_count:
        check.add(
            "channel_count",
            f"The case '{case.identifier}' has {len(case.images)} image(s), the data set {channel_count} channel(s).",
            "Add what is missing, remove the case, or mend the channel names.",
        )
    reference: tuple[Path, _Grid] | None = None
    for path in case.images:
        grid = check.image(path)
        if grid is not None and reference is not None:
            check.same_grid("channel", (path, grid), reference)
        elif grid is not None:
            reference = path, grid
    if case.label is None:
        if label_required:
            check.add("missing_label", f"The case '{case.identifier}' has no label.", "Add it, or remove its image.")
        return check.findings
    grid = check.label(case.label, label_values)
    if grid is not None and reference is not None:
        check.same_grid("label", (case.label, grid), reference)
    return check.findings


@dataclass(frozen=True)
class _Grid:
    """Geometry of a volume in SimpleITK's order of axes (x, y, z), in mm."""

    size: tuple[float, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, volume: sitk.Image) -> _Grid:
        return cls(volume.GetSize(), volume.GetSpacing(), volume.GetOrigin(), volume.GetDirection())


class _CaseCheck:
    """Collects the findings of one case."""

    def __init__(self, identifier: str, shown_as: Mapping[Path, Path]):
        self.identifier = identifier
        self.shown_as = shown_as
        self.findings: list[Finding] = []

    def add(self, code: str, message: str, mend: str, severity: Severity = "error") -> None:
        self.findings.append(Finding(code, self.identifier, message, mend, severity))

    def show(self, path: Path) -> Path:
        return self.shown_as.get(path, path)

    def image(self, path: Path) -> _Grid | None:
        """Check one channel; None where there is no 3D grid to compare with."""
        volume = self._read(path)
        if volume is None:
            return None
        voxels = sitk.GetArrayViewFromImage(volume)
        # min and max of anything with NaN are NaN, so these two passes find all that is wrong without a copy
        low, high = float(voxels.min()), float(voxels.max())
        if not math.isfinite(low) or not math.isfinite(high):
            self.add("not_finite", f"{self.show(path)} holds voxels that are {_NOT_FINITE}.", _MEND_NOT_FINITE)
        elif low == high:
            message = f"{self.show(path)} is constant, {low:g} in every voxel."
            self.add("constant_image", message, "Remove the case if that is not meant.", "warning")
        return _Grid.of(volume)

    def label(self, path: Path, allowed: set[int] | None) -> _Grid | None:
        """Check a label; None where there is no 3D grid to compare with."""
        volume = self._read(path)
        if volume is None:
            return None
        values = np.unique(sitk.GetArrayViewFromImage(volume)).tolist()
        found = {int(value) for value in values if math.isfinite(value) and value == int(value)}
        unknown = found - (found if allowed is None else allowed)
        if len(found) < len(values):
            fractions = [value for value in values if value not in found]
            self.add(
                "label_not_integer",
                f"The label {self.show(path)} holds values that are no integers: {listed(fractions)}.",
                "Resample labels with nearest neighbours, and save them as integers.",
            )
        if unknown:
            self.add(
                "label_values",
                f"The label {self.show(path)} holds values that dataset.json does not name: {listed(sorted(unknown))} "
                f"(named are {listed(sorted(allowed or ()))}).",
                "Name them, or give those voxels a named value.",
            )
        if values == [0]:
            message = f"The label {self.show(path)} is background everywhere."
            self.add("empty_label", message, "Use the case as unlabelled if that is not meant.", "warning")
        return _Grid.of(volume)

    def same_grid(self, kind: str, one: tuple[Path, _Grid], reference: tuple[Path, _Grid]) -> None:
        """Compare size, spacing (mm), origin (mm) and direction cosines with those of the case's first image."""
        tolerances = {
            "size": 0.0,
            "spacing": TOLERANCE_SPACING_RELATIVE * min(reference[1].spacing),
            "origin": TOLERANCE_MM,
            "direction": TOLERANCE_DIRECTION,
        }
        units = {"size": "voxels", "spacing": "mm", "origin": "mm", "direction": "(cosines)"}
        for name, tolerance in tolerances.items():
            values, expected = getattr(one[1], name), getattr(reference[1], name)
            if all(abs(a - b) <= tolerance for a, b in zip(values, expected, strict=True)):
                continue
            allowed = f"; {tolerance:.2g} is tolerated" if tolerance else ""
            self.add(
                f"{kind}_{name}",
                f"The {kind} {self.show(one[0])} has the {name} {_numbers(values)} {units[name]}, but its image "
                f"{self.show(reference[0])} has {_numbers(expected)}{allowed}: their voxels do not correspond.",
                "Resample it to the image's grid, or export both again.",
            )

    def _read(self, path: Path) -> sitk.Image | None:
        """The volume, None where it is no three-dimensional grid of single numbers."""
        try:
            volume = read_volume(path)
        except UnreadableVolumeError as error:
            self.findings.append(error.as_finding(self.identifier, self.show(path)))
            return None
        if volume.GetDimension() != 3:
            self.add(
                "not_3d",
                f"{self.show(path)} is {volume.GetDimension()}D, {_numbers(volume.GetSize())} voxels; expected is 3D.",
                "Save one volume a file; a 4D image is split only where it has as many channels as are named.",
            )
            return None
        if volume.GetNumberOfComponentsPerPixel() != 1 or "complex" in volume.GetPixelIDTypeAsString():
            message = f"{self.show(path)} holds {volume.GetPixelIDTypeAsString()} instead of one number a voxel."
            self.add("not_scalar", message, "Save each component as a channel of its own.")
            return None
        return volume


# --- a whole data set -----------------------------------------------------------------------------------------------


def verify_dataset(dataset: RawDataset, *, workers: int, progress: Progress | None = None) -> list[Finding]:
    """Check a data set's dataset.json, its listing, and every labelled and unlabelled case.

    Args:
        dataset: the raw data set.
        workers: threads that read files.
        progress: called with (cases done, cases in all) after each case.

    Returns:
        Findings about dataset.json and the listing, then those of the cases in the order of their identifiers.
    """
    findings = list(_check_keys(dataset))
    if any(finding.severity == "error" for finding in findings):
        return findings
    findings += _check_labels(dataset)
    labelled, unlabelled = dataset.labelled_cases(), dataset.unlabelled_cases()
    findings += _check_listing(dataset, labelled, unlabelled)
    # labels that cannot be told apart have been found above; comparing voxels with them would repeat it case by case
    broken = any(finding.code == "label_definition" for finding in findings)
    label_values = None if broken else dataset.label_values

    def check(case: Case) -> list[Finding]:
        return check_case(case, channel_count=len(dataset.channel_names), label_values=label_values)

    for found in in_threads(check, [*labelled, *unlabelled], workers, progress):
        findings += found
    return findings


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, progress: Progress | None = None
) -> list[Result]:
    """``[function(item) for item in items]`` in threads; the first error, or Ctrl-C, cancels what has not begun."""
    results: dict[int, Result] = {}
    with ThreadPoolExecutor(max(1, workers)) as pool:
        futures = {pool.submit(function, item): index for index, item in enumerate(items)}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                results[futures[future]] = future.result()
                if progress is not None:
                    progress(done, len(items))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [results[index] for index in range(len(items))]


def _check_keys(dataset: RawDataset) -> Iterator[Finding]:
    kinds = {"channel_names": dict, "labels": dict, "numTraining": int, "file_ending": str}
    for key in REQUIRED_KEYS:
        if not isinstance(dataset.dataset_json.get(key), kinds[key]):
            message = f"dataset.json of {dataset.name} has no valid '{key}', which nnU-Net needs."
            yield Finding("missing_key", "", message, "Add it, or convert the data set again.")


def _check_labels(dataset: RawDataset) -> Iterator[Finding]:
    labels = dataset.labels
    try:
        values = sorted(values_of_labels(labels))
    except (TypeError, ValueError):
        message = f"dataset.json of {dataset.name} has labels whose values are no integers: {labels}."
        yield Finding("label_definition", "", message, 'Write them as {"background": 0, "liver": 1, ...}.')
        return
    if labels.get("background") not in (0, "0"):
        message = f"dataset.json of {dataset.name} does not give the label 'background' the value 0."
        yield Finding("labels_background", "", message, 'Add "background": 0 to its labels.')
    if values != list(range(len(values))):
        message = f"The labels of {dataset.name} are {listed(values)}; nnU-Net needs 0, 1, 2, ... without a gap."
        yield Finding("labels_not_consecutive", "", message, "Renumber them in dataset.json and in the label files.")
    if "ignore" in labels and labels["ignore"] != values[-1]:
        message = f"The label 'ignore' of {dataset.name} is {labels['ignore']}, but must be the highest ({values[-1]})."
        yield Finding("ignore_not_highest", "", message, "Renumber the labels in dataset.json and in the label files.")
    has_regions = any(isinstance(value, list) and len(value) > 1 for value in labels.values())
    if has_regions and "regions_class_order" not in dataset.dataset_json:
        message = f"dataset.json of {dataset.name} has regions as labels, but no 'regions_class_order'."
        yield Finding("missing_key", "", message, "Add it: the order in which regions are painted over each other.")


def _check_listing(dataset: RawDataset, labelled: list[Case], unlabelled: list[Case]) -> Iterator[Finding]:
    count = len(labelled)
    if "dataset" not in dataset.dataset_json:
        images, labels = dataset.image_files("imagesTr"), dataset.label_files("labelsTr")
        count = len(images)
        for identifier in sorted(images.keys() - labels.keys()):
            message = f"{images[identifier][0]} has no label {identifier}{dataset.file_ending} in labelsTr."
            yield Finding("missing_label", identifier, message, "Add it, or move the image to imagesUn.")
        for identifier in sorted(labels.keys() - images.keys()):
            message = f"{labels[identifier]} has no image {identifier}_0000{dataset.file_ending} in imagesTr."
            yield Finding("missing_image", identifier, message, "Add it, or remove the label.")
    if not labelled and not unlabelled:
        message = f"{dataset.folder} has neither a labelled nor an unlabelled image."
        yield Finding("no_cases", "", message, "Put images into imagesTr (with labelsTr) or imagesUn.")
    if count != dataset.dataset_json["numTraining"]:
        message = f"{dataset.name} has {count} training cases, its dataset.json says numTraining is "
        message += f"{dataset.dataset_json['numTraining']}."
        yield Finding("num_training", "", message, f"Set numTraining to {count}, or add what is missing.")
    yield from _check_names(dataset)
    yield from _check_identifiers(labelled, unlabelled, dataset.test_cases())


def _check_names(dataset: RawDataset) -> Iterator[Finding]:
    """Files that nnU-Net would overlook or cut wrongly, and channels that are missing."""
    ending = dataset.file_ending
    for path in (path for sub in ("imagesTr", "imagesUn", "imagesTs") for path in visible_files(dataset.folder / sub)):
        if path.name.endswith(ending):
            if split_channel(path.name[: -len(ending)])[1] is None:
                message = f"{path} has no channel number before its ending, nnU-Net would take its name for another."
                yield Finding("bad_name", "", message, f"Name it <case>_0000{ending}.")
        elif path.name.endswith(VOLUME_ENDINGS):
            message = f"{path} does not end in {ending}, and would be overlooked."
            twin = path.with_name(split_ending(path.name)[0] + ending)
            if twin.exists():
                message = f"{path} and {twin.name} are the same case twice; only the latter would be used."
            yield Finding("bad_name", "", message, f"Convert it to {ending}, or remove it.")
    for sub in ("imagesTr", "imagesUn", "imagesTs"):
        for identifier, files in dataset.image_files(sub).items():
            numbers = [split_channel(path.name[: -len(ending)])[1] for path in files]
            if numbers != list(range(len(numbers))):
                message = f"The case '{identifier}' in {sub} has the channels {listed(numbers)}."
                yield Finding("channel_numbers", identifier, message, "Number them 0000, 0001, ... without a gap.")


def _check_identifiers(labelled: list[Case], unlabelled: list[Case], test: list[Case]) -> Iterator[Finding]:
    training, pool = ({case.identifier for case in cases} for cases in (labelled, unlabelled))
    for identifier in sorted(training & pool):
        message = f"The case '{identifier}' is both labelled (imagesTr) and unlabelled (imagesUn)."
        yield Finding("duplicate_identifier", identifier, message, "Remove it from imagesUn.")
    for identifier in sorted((training | pool) & {case.identifier for case in test}):
        message = f"The case '{identifier}' is in imagesTs as well as in imagesTr or imagesUn: its test may be no test."
        yield Finding("duplicate_identifier", identifier, message, "Rename or remove one of them.", "warning")
    for folded, times in Counter(identifier.casefold() for identifier in training | pool).items():
        if times > 1:
            same = sorted(identifier for identifier in training | pool if identifier.casefold() == folded)
            message = f"The cases {listed(same)} differ in upper and lower case only, which some file systems ignore."
            yield Finding("duplicate_identifier", same[0], message, "Rename all but one.", "warning")
    for identifier in sorted(training | pool):
        if reason := why_unusable(identifier):
            severity: Severity = "error" if identifier.endswith("_seg") else "warning"
            message = f"The case identifier '{identifier}' is unsafe: {reason}."
            yield Finding("bad_identifier", identifier, message, "Rename its files.", severity)


def listed(values: Iterable[Any], limit: int = 10) -> str:
    """``'1, 2, 3'``; of more than `limit` values the first ones, and how many follow."""
    values = list(values)
    shown = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values[:limit])
    return shown + (f", and {len(values) - limit} more" if len(values) > limit else "")


def _numbers(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:.7g}" for value in values) + ")"
