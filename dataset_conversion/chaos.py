"""CHAOS (Combined Healthy Abdominal Organ Segmentation): CT and MR series as DICOM, masks as one PNG a slice."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.verification import UnreadableVolumeError, listed

from .converter import Converter, Option, Recognition, described
from .description import BACKGROUND, ConversionPlan, Role, SourceCase
from .dicom.index import is_dicom
from .dicom.series import DicomSeries
from .folder import require_folder
from .sources import Read

if TYPE_CHECKING:
    import SimpleITK as sitk

EXPECTED = """\
Train_Sets/CT/1/DICOM_anon/*.dcm                        masks: CT/1/Ground/*.png
Train_Sets/MR/1/T1DUAL/DICOM_anon/{InPhase,OutPhase}/*.dcm     MR/1/T1DUAL/Ground/*.png
Train_Sets/MR/1/T2SPIR/DICOM_anon/*.dcm                        MR/1/T2SPIR/Ground/*.png
Test_Sets/...                                           the same without Ground; may be missing"""
ROLES: dict[str, Role] = {"Train_Sets": "training", "Test_Sets": "test"}
MR_GREYS = {63: 1, 126: 2, 189: 3, 252: 4}
MR_LABELS = ("liver", "right_kidney", "left_kidney", "spleen")


@dataclass(frozen=True)
class Part:
    """One of the three sets that CHAOS consists of.

    Attributes:
        cases: folder of its cases below Train_Sets.
        inner: folder of the part within a case.
        channels: name -> folder of its images within the part.
        labels: their values are 1, 2, ...
        greys: grey value of a mask -> label value.
    """

    cases: str
    inner: str
    channels: dict[str, str]
    labels: tuple[str, ...]
    greys: dict[int, int]


PARTS = {
    "CT": Part("CT", ".", {"CT": "DICOM_anon"}, ("liver",), {1: 1, 255: 1}),
    "T1DUAL": Part(
        "MR",
        "T1DUAL",
        {"T1 in-phase": "DICOM_anon/InPhase", "T1 out-of-phase": "DICOM_anon/OutPhase"},
        MR_LABELS,
        MR_GREYS,
    ),
    "T2SPIR": Part("MR", "T2SPIR", {"T2 SPIR": "DICOM_anon"}, MR_LABELS, MR_GREYS),
}


@dataclass(frozen=True)
class PngMasks:
    """A label map of one PNG a slice, on the grid of a DICOM series.

    CHAOS numbers the images of a series and their masks alike. Where both have the same names, equal names belong
    together; else (``i0000,0000b.dcm``, ``liver_GT_000.png``) the n-th mask belongs to the n-th image, both sorted by
    the numbers in their names. The image's position, not its number, then says which slice that is.

    Attributes:
        masks: the files.
        series: the images.
        greys: (grey value, label value); 0 is background, other greys are refused.
    """

    masks: tuple[Path, ...]
    series: DicomSeries
    greys: tuple[tuple[int, int], ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return self.masks

    def read(self, read: Read) -> sitk.Image:
        import SimpleITK as sitk

        image = read(self.series)
        slices = {plane.path: place for place, plane in enumerate(self.series.stack().planes)}
        columns, rows, count = image.GetSize()
        if not count == len(self.masks) == len(self.series.paths):
            reason = f"there are {len(self.masks)} masks of {len(self.series.paths)} images"
            raise UnreadableVolumeError(self.masks[0].parent, reason, "mask_count")
        label = np.zeros((count, rows, columns), np.uint8)
        for path, mask in self._pairs():
            label[slices[path]] = self._label(mask, (rows, columns))
        painted = sitk.GetImageFromArray(label)
        painted.CopyInformation(image)
        return painted

    def _pairs(self) -> list[tuple[Path, Path]]:
        images, masks = (sorted(paths, key=_numbered) for paths in (self.series.paths, self.masks))
        by_stem = {mask.stem: mask for mask in masks}
        if by_stem.keys() == {image.stem for image in images}:
            return [(image, by_stem[image.stem]) for image in images]
        return list(zip(images, masks, strict=True))

    def _label(self, path: Path, shape: tuple[int, int]) -> np.ndarray:
        greys = _read_grey(path, shape)
        named = {0: 0, **dict(self.greys)}
        if unknown := sorted(set(np.unique(greys).tolist()) - named.keys()):
            known = listed(sorted(named))
            reason = f"it has the grey values {listed(unknown)}; known are {known}"
            raise UnreadableVolumeError(path, reason, "label_values", "Get the published masks, or map them yourself.")
        table = np.zeros(256, np.uint8)
        table[list(named)] = list(named.values())
        return table[greys]


class CHAOSConverter(Converter):
    """CHAOS: liver in CT, liver, kidneys and spleen in MR."""

    format_name = "chaos"
    title = "CHAOS, Combined (CT-MR) Healthy Abdominal Organ Segmentation"
    expects = EXPECTED
    citation = "Kavur et al., CHAOS Challenge, Medical Image Analysis 69:101950 (2021), doi 10.1016/j.media.2020.101950"
    options = (Option("part", "CT, T1DUAL (two channels: in phase, out of phase) or T2SPIR.", required=True),)

    def plan(self, source: Path | None, *, name: str | None = None, part: str | None = None) -> ConversionPlan:
        """List the cases of one part.

        Raises:
            BadInputError: this is no CHAOS download, or `part` is none of its parts.
        """
        source = require_folder(source, EXPECTED)
        if part not in PARTS:
            given = f"--part {part} is unknown" if part else "CHAOS has several parts"
            raise BadInputError(f"{given}.", f"Choose one with --part: {listed(PARTS)}.")
        chosen = PARTS[part]
        cases = [
            case
            for sets in _sets(source)
            for folder in _numbered_folders(sets / chosen.cases)
            if (case := _case(folder, part, chosen, ROLES[sets.name])) is not None
        ]
        if not cases:
            raise BadInputError(f"{source} has no {part} case of {self.title}.", f"Expected is\n{EXPECTED}")
        return ConversionPlan(
            name=name or f"CHAOS_{part}",
            channel_names=dict(enumerate(chosen.channels)),
            labels={BACKGROUND: 0, **{label: value for value, label in enumerate(chosen.labels, start=1)}},
            cases=tuple(cases),
            extra=described(self),
            notes=tuple(_notes(cases)),
        )

    def recognise(self, source: Path) -> Recognition | None:
        for sets in _sets(source):
            for part, chosen in PARTS.items():
                folders = _numbered_folders(sets / chosen.cases)
                if any((folder / chosen.inner / "DICOM_anon").is_dir() for folder in folders):
                    return Recognition(self.format_name, f"{sets.name} has {part} cases", 1.0, {"part": part})
        return None


def _case(folder: Path, part: str, chosen: Part, role: Role) -> SourceCase | None:
    """One case; None where it lacks this part."""
    inner = folder / chosen.inner
    if not inner.is_dir():
        return None
    images = []
    for channel in chosen.channels.values():
        files = tuple(path for path in _visible(inner / channel) if is_dicom(path))
        if not files:
            raise BadInputError(f"{inner / channel} has no DICOM file.", f"Expected is\n{EXPECTED}")
        images.append(DicomSeries(files))
    masks = tuple(path for path in _visible(inner / "Ground") if path.suffix.lower() == ".png")
    if role == "training" and not masks:
        raise BadInputError(f"{inner / 'Ground'} has no mask.", f"Expected is\n{EXPECTED}")
    label = PngMasks(masks, images[0], tuple(chosen.greys.items())) if masks else None
    # test cases of CHAOS continue other numbers than training cases, but nothing warrants that
    prefix = part if role == "training" else f"{part}_test"
    return SourceCase(f"{prefix}_{int(folder.name):03d}", tuple(images), label, role)


def _notes(cases: list[SourceCase]) -> list[str]:
    labels = [case.label for case in cases if case.label is not None]
    by_order = [label for label in labels if {mask.stem for mask in label.masks} != _stems(label.series)]
    if not by_order:
        return []
    return [
        f"In {len(by_order)} case(s) masks and images have different names: they are matched in the order of names."
    ]


def _stems(series: DicomSeries) -> set[str]:
    return {path.stem for path in series.paths}


def _sets(source: Path) -> list[Path]:
    """Train_Sets and Test_Sets: the folder itself, in it, or one level below (CHAOS_Train_Sets/Train_Sets)."""
    if source.name in ROLES:
        return [source]
    near = [source / name for name in ROLES]
    below = [folder / name for folder in sorted(source.iterdir()) if folder.is_dir() for name in ROLES]
    return [folder for folder in (*near, *below) if folder.is_dir()]


def _numbered_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((each for each in folder.iterdir() if each.is_dir() and each.name.isdecimal()), key=_numbered)


def _visible(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_file() and entry.name[:1] != ".")


def _numbered(path: Path) -> tuple[list[int], str]:
    """The numbers in a name: 10 comes after 9, zeros in front or not."""
    return [int(number) for number in re.findall(r"\d+", path.stem)], path.name


def _read_grey(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """A grey PNG, (rows, columns), uint8.

    Raises:
        UnreadableVolumeError: it is damaged, in colour, or of another size: the size is looked at before its pixels.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as png:
            size, mode = png.size[::-1], png.mode
            greys = np.asarray(png.convert("L")) if size == shape and mode in ("1", "L") else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableVolumeError(path, f"it is no PNG that can be read ({error})") from error
    if size != shape:
        raise UnreadableVolumeError(path, f"it has {size} pixels, its image {shape}", "label_size")
    if greys is None:
        raise UnreadableVolumeError(path, f"it is no 8-bit grey image (mode {mode})", "label_values")
    return greys
