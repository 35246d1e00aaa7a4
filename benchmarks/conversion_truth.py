"""Every voxel, every label name and the place of voxels after conversion, against the downloads themselves.

Usage: python benchmarks/conversion_truth.py DATA WORKSPACE [--cases N]

DATA holds BTCV_3mm, Task04_Hippocampus and OpenKBP. Each is converted by its command, then compared with nibabel and
SimpleITK alone: the script shares no code with the converters, and knows names and label values from the data sets'
own tables. BTCV is converted once more with some of its labels, so that they are renumbered. Images are compared voxel
by voxel, labels structure by structure, by name. For 100 random voxels a case, SimpleITK's position in the source is
compared with the one that nibabel's affine gives in the written file.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from results import diffseg, table, write_section

ENDING, SEED, VOXELS_A_CASE, TOLERANCE_MM = ".nii.gz", 20261, 100, 1e-3
BTCV_VALUES = {
    "background": 0,
    "spleen": 1,
    "right_kidney": 2,
    "left_kidney": 3,
    "gallbladder": 4,
    "esophagus": 5,
    "liver": 6,
    "stomach": 7,
    "aorta": 8,
    "inferior_vena_cava": 9,
    "portal_and_splenic_veins": 10,
    "pancreas": 11,
    "right_adrenal_gland": 12,
    "left_adrenal_gland": 13,
}
SOME_ORGANS = ("spleen", "left_kidney", "liver", "aorta", "left_adrenal_gland")
FOLDERS = {"training": ("imagesTr", "labelsTr"), "unlabelled": ("imagesUn", None), "test": ("imagesTs", "labelsTs")}


@dataclass(frozen=True)
class Pair:
    """A case as it lies in the download."""

    identifier: str
    role: str
    image: Path
    label: Path | None


@dataclass(frozen=True)
class Converted:
    """A download, the command that converts it, and what it should become.

    Attributes:
        title: for the report.
        command: of `diffseg convert`, without id and workspace.
        number: id of the data set.
        values: structure -> value in the download's labels, background included.
        pairs: all its cases.
        kept: the structures that are kept, the others being background.
    """

    title: str
    command: tuple[object, ...]
    number: int
    values: dict[str, int]
    pairs: tuple[Pair, ...]
    kept: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """What one case has different; 0 everywhere where the conversion is true.

    Attributes:
        voxels: voxels of the image that were compared.
        image: those that differ.
        label: voxels of the label that have another structure.
        grid: files whose size differs, or whose image and label do not lie on one grid.
        place: largest distance (mm) between a voxel's place in the source and in the written file.
        anew: files that were encoded anew; the others are the download's own bytes, linked or copied.
    """

    voxels: int
    image: int
    label: int
    grid: int
    place: float
    anew: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("workspace", type=Path, help="made and filled here; data sets that are there are not converted")
    parser.add_argument("--cases", type=int, help="compare the first N cases of each only, and write no section")
    options = parser.parse_args()
    rows, true = [], True
    downloads = (btcv(options.data), btcv(options.data, SOME_ORGANS), hippocampus(options.data), openkbp(options.data))
    for download in downloads:
        folder = _convert(download, options.workspace)
        stray = strays(folder, download.pairs)
        names = written_values(folder).keys()
        true &= names == {"background", *download.kept}
        differences = [compare(folder, pair, download.values) for pair in download.pairs[: options.cases]]
        rows.append(_row(download, differences, stray))
        true &= not stray and all(is_true(difference) for difference in differences)
    report = _report(rows, true)
    print(report)
    if options.cases is None:
        write_section("conversion-truth", report)


def btcv(data: Path, organs: tuple[str, ...] = ()) -> Converted:
    """BTCV's 24 cases, with all labels or with these."""
    folder = data / "BTCV_3mm" / "RawData" / "Training"
    numbers = sorted(path.name[3:7] for path in (folder / "img").glob(f"img*{ENDING}"))
    pairs = (
        Pair(f"btcv_{n}", "training", folder / f"img/img{n}{ENDING}", folder / f"label/label{n}{ENDING}")
        for n in numbers
    )
    command: tuple[object, ...] = ("btcv", data / "BTCV_3mm")
    if organs:
        command = (*command, "--labels", ",".join(organs), "--name", "BTCVSome")
        return Converted(f"BTCV (3 mm), {len(organs)} organs", command, 34, BTCV_VALUES, tuple(pairs), organs)
    return Converted("BTCV (3 mm)", command, 31, BTCV_VALUES, tuple(pairs), structures(BTCV_VALUES))


def hippocampus(data: Path) -> Converted:
    """The Decathlon's hippocampus, by its own dataset.json."""
    folder = data / "Task04_Hippocampus"
    content = json.loads((folder / "dataset.json").read_text())
    pairs = [
        Pair(
            Path(entry["image"]).name.removesuffix(ENDING), "training", folder / entry["image"], folder / entry["label"]
        )
        for entry in content["training"]
    ]
    tests = [folder / name for name in content.get("test", []) if (folder / name).is_file()]
    pairs += [Pair(path.name.removesuffix(ENDING), "test", path, None) for path in tests]
    values = {name: int(value) for value, name in content["labels"].items()}
    return Converted("MSD Task04 Hippocampus", ("msd", folder), 32, values, tuple(pairs), structures(values))


def openkbp(data: Path) -> Converted:
    """OpenKBP: images with and without labels in plain folders."""
    folder = data / "OpenKBP"
    pairs = []
    for image in sorted((folder / "images").glob(f"*{ENDING}")):
        label = folder / "labels" / image.name
        role = "training" if label.is_file() else "unlabelled"
        pairs.append(Pair(image.name.removesuffix(ENDING), role, image, label if label.is_file() else None))
    where = ("--images", folder / "images", "--labels", folder / "labels", "--label-names", folder / "labels.json")
    command = ("folder", *where, "--modality", "CT", "--rest-unlabelled", "--name", "OpenKBP")
    values = json.loads((folder / "labels.json").read_text())
    return Converted("OpenKBP", command, 33, values, tuple(pairs), structures(values))


def structures(values: Mapping[str, int]) -> tuple[str, ...]:
    """All names but the background's."""
    return tuple(name for name, value in values.items() if value)


def written_values(folder: Path) -> dict[str, int]:
    """Structure -> value in the written labels, by their dataset.json."""
    return json.loads((folder / "dataset.json").read_text())["labels"]


def strays(folder: Path, pairs: Iterable[Pair]) -> list[str]:
    """Files that should be there and are not, or the reverse."""
    expected = set()
    for pair in pairs:
        images, labels = FOLDERS[pair.role]
        expected.add(f"{images}/{pair.identifier}_0000{ENDING}")
        if pair.label is not None:
            expected.add(f"{labels}/{pair.identifier}{ENDING}")
    names = [name for pair in FOLDERS.values() for name in pair if name]
    there = {f"{name}/{path.name}" for name in names if (folder / name).is_dir() for path in (folder / name).iterdir()}
    return sorted(expected ^ there)


def compare(folder: Path, pair: Pair, values: dict[str, int]) -> Difference:
    """One written case against its source.

    Args:
        folder: the written data set.
        pair: the source.
        values: structure -> value in the source's label.
    """
    images, labels = FOLDERS[pair.role]
    source, written = nib.load(pair.image), nib.load(folder / images / f"{pair.identifier}_0000{ENDING}")
    if source.shape != written.shape:
        return Difference(int(np.prod(source.shape)), int(np.prod(source.shape)), 0, 1, float("inf"), 1)
    before, after = (np.asanyarray(volume.dataobj) for volume in (source, written))
    wrong, grid = 0, 0
    anew = int(not filecmp.cmp(pair.image, written.get_filename(), shallow=False))
    if pair.label is not None:
        path = folder / labels / f"{pair.identifier}{ENDING}"
        wrong = other_structures(pair.label, path, values, written_values(folder))
        anew += int(not filecmp.cmp(pair.label, path, shallow=False))
        grid = int(not np.allclose(nib.load(path).affine, written.affine, atol=TOLERANCE_MM))
    place = displacement(pair.image, written, pair.identifier)
    return Difference(before.size, int((before != after).sum()), wrong, grid, place, anew)


def other_structures(source: Path, written: Path, before: dict[str, int], after: dict[str, int]) -> int:
    """Voxels that are one structure in the source and another one, by name, in the written label.

    Structures that the written data set does not name should be background there.
    """
    old, new = (np.asanyarray(nib.load(path).dataobj) for path in (source, written))
    if old.shape != new.shape:
        return old.size
    differing = ~np.isin(old, list(before.values()))
    for name, value in before.items():
        differing |= (old == value) & (new != after.get(name, after["background"]))
    return int(differing.sum())


def displacement(source: Path, written: nib.Nifti1Image, identifier: str) -> float:
    """The largest distance (mm) of a voxel from where it was, over random voxels; infinite where a value differs."""
    original = sitk.ReadImage(str(source))
    voxels = np.asanyarray(written.dataobj)
    rng = np.random.default_rng([SEED, *identifier.encode()])
    largest = 0.0
    for index in rng.integers(0, voxels.shape, (VOXELS_A_CASE, 3)).tolist():
        if original.GetPixel(*index) != voxels[tuple(index)]:
            return float("inf")
        # SimpleITK's x and y run to the left and the back, nibabel's to the right and the front
        here = (written.affine @ [*index, 1])[:3] * [-1, -1, 1]
        there = original.TransformIndexToPhysicalPoint(index)
        largest = max(largest, float(np.linalg.norm(here - np.asarray(there))))
    return largest


def is_true(difference: Difference) -> bool:
    """Whether nothing differs."""
    return not (difference.image or difference.label or difference.grid) and difference.place < TOLERANCE_MM


def _convert(download: Converted, workspace: Path) -> Path:
    pattern = f"nnUNet_raw/Dataset{download.number:03d}_*"
    if not any(workspace.glob(pattern)):
        try:
            diffseg("convert", *download.command, "--id", download.number, "--workspace", workspace)
        except subprocess.CalledProcessError as error:
            # 1 may also mean: converted, and something is worth a look; the command has said what
            if error.returncode != 1 or not any(workspace.glob(pattern)):
                raise
    return next(workspace.glob(pattern))


def _row(download: Converted, differences: list[Difference], stray: list[str]) -> tuple[object, ...]:
    labels = sum(pair.label is not None for pair in download.pairs[: len(differences)])
    return (
        download.title,
        download.command[0],
        f"{len(differences)} ({labels})",
        f"{sum(difference.voxels for difference in differences):,}",
        sum(difference.image for difference in differences),
        sum(difference.label for difference in differences),
        sum(difference.grid for difference in differences),
        len(stray),
        sum(difference.anew for difference in differences),
        f"{max(difference.place for difference in differences):.1e}",
    )


def _report(rows: list[tuple[object, ...]], true: bool) -> str:
    header = (
        "data set",
        "format",
        "cases (with labels)",
        "voxels",
        "image voxels that differ",
        "label voxels of another structure",
        "labels off their image's grid",
        "files missing or too many",
        "files encoded anew",
        f"largest displacement of {VOXELS_A_CASE} voxels a case, mm",
    )
    return (
        "## Conversion, checked against the downloads\n\nScript: `benchmarks/conversion_truth.py`, nibabel and "
        "SimpleITK alone; structures are compared by name, positions between SimpleITK (source) and nibabel (written). "
        "Files that are not encoded anew are the download's own, so that for these the names, the pairs and the label "
        f"values are what is tested. Everything as it was, positions to {TOLERANCE_MM} mm: "
        f"**{'yes' if true else 'no'}**.\n\n{table(header, rows)}"
    )


if __name__ == "__main__":
    main()
