"""Broken data: refused with what is wrong, where, and what mends it; nothing is left half-written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Source
    from tests.conftest import CommandLine, Finished

Break = Callable[["Source"], None]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SHAPE = (10, 9, 8)
ZEROS, ONES = np.zeros(SHAPE, np.uint8), np.ones(SHAPE, np.float32)
WITH_NAN = np.where(np.arange(ONES.size).reshape(SHAPE) == 100, np.nan, ONES)
TWO_VOLUMES = np.stack([ONES, ONES])
RESAMPLE = "Resample it to the image's grid"

BROKEN_CASES: dict[str, tuple[Break, tuple[str, ...]]] = {
    "size": (
        lambda s: s.write(s.broken_label, ZEROS[:, :, 1:]),
        ("b.nii.gz has the size (7, 9, 10) voxels", "has (8, 9, 10)", RESAMPLE),
    ),
    "spacing": (
        lambda s: s.write(s.broken_label, ZEROS, Spacing=(2, 2, 2.5)),
        ("b.nii.gz has the spacing (2, 2, 2.5) mm", "has (2, 2, 2)", RESAMPLE),
    ),
    "origin": (
        lambda s: s.write(s.broken_label, ZEROS, Origin=(0, 0, 30)),
        ("b.nii.gz has the origin (0, 0, 30) mm", RESAMPLE),
    ),
    "direction": (
        lambda s: s.write(s.broken_label, ZEROS, Direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1)),
        ("b.nii.gz has the direction (-1, 0, 0", RESAMPLE),
    ),
    "label_values": (
        lambda s: s.write(s.broken_label, ZEROS + 7),
        ("b.nii.gz holds values that have no name: 7 (named are 0, 1)", "Name them"),
    ),
    "fractions": (
        lambda s: s.write(s.broken_label, ONES / 2),
        ("b.nii.gz holds values that are no integers: 0.5", "nearest neighbours"),
    ),
    "truncated_image": (lambda s: truncate(s.broken_image), ("truncated", "again")),
    "truncated_label": (lambda s: truncate(s.broken_label), ("b.nii.gz", "truncated", "again")),
    "nan": (lambda s: s.write(s.broken_image, WITH_NAN), ("1 of its voxels are NaN or infinite", "Replace them")),
    "constant": (
        lambda s: s.write(s.broken_image, ONES * -7),
        ("is constant, -7 in every voxel", "nothing can be learnt from it", "remove it"),
    ),
    "2d": (lambda s: s.write(s.broken_image, ONES[0]), ("is 2D", "expected is 3D", "Save one volume a file")),
    "4d": (
        lambda s: s.write(s.broken_image, np.stack([ONES, ONES])),
        ("is 4D", "expected is 3D", "Save one volume a file"),
    ),
}


def convert(diffseg: CommandLine, source: Source, *options: object, dataset_id: int = 5, name: str = "B") -> Finished:
    return diffseg(
        *("convert", "folder", "--images", source.images, "--labels", source.labels),
        *("--label-names", source.names, "--modality", "CT", "--id", dataset_id, "--name", name, *options),
    )


def assert_listed(verified: Finished, *words: object) -> None:
    """The error is in the table; a wide terminal does not wrap it."""
    verified.refused("Dataset005_B has", "error(s)", "listed above")
    for word in words:
        assert str(word) in verified.out


def assert_nothing_written(diffseg: CommandLine) -> None:
    written = [path for path in diffseg.folder.rglob("*") if not path.is_relative_to(diffseg.folder / "source")]
    assert [path for path in written if path.is_file() or path.name.startswith((".partial-", "Dataset"))] == []


@pytest.mark.parametrize("kind", BROKEN_CASES)
def test_convert_refuses_a_broken_case(kind: str, diffseg: CommandLine, source: Source) -> None:
    damage, words = BROKEN_CASES[kind]
    damage(source)
    convert(diffseg, source).refused("no data set was written", source.images.parent, "- b: ", *words)
    assert_nothing_written(diffseg)


@pytest.mark.parametrize("kind", BROKEN_CASES)
def test_verify_finds_a_broken_case(kind: str, diffseg: CommandLine, source: Source) -> None:
    damage, words = BROKEN_CASES[kind]
    damage(source)
    raw = diffseg.folder / "diffseg_workspace" / "nnUNet_raw" / "Dataset005_B"
    source.as_raw_data_set(raw)
    assert_listed(diffseg("verify", 5, COLUMNS=1000), raw, *words)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("labels", ("imagesTr/b_0000.nii.gz has no label b.nii.gz in labelsTr", "move the image to imagesUn")),
        ("images", ("labelsTr/b.nii.gz has no image b_0000.nii.gz in imagesTr", "remove the label")),
    ],
)
def test_verify_finds_half_a_case(missing: str, words: tuple[str, ...], diffseg: CommandLine, source: Source) -> None:
    (getattr(source, missing) / "b.nii.gz").unlink()
    source.as_raw_data_set(diffseg.folder / "diffseg_workspace" / "nnUNet_raw" / "Dataset005_B")
    assert_listed(diffseg("verify", 5, COLUMNS=1000), *words)


def test_convert_refuses_half_a_case(diffseg: CommandLine, source: Source) -> None:
    source.broken_label.unlink()
    convert(diffseg, source).refused("1 image(s) in", "have no label: b.nii.gz", "--rest-unlabelled")
    assert_nothing_written(diffseg)
    shutil.copy(source.labels / "a.nii.gz", source.labels / "d.nii.gz")
    convert(diffseg, source).refused("1 label(s) in", "have no image: d.nii.gz", "Add or rename the images")
    assert_nothing_written(diffseg)


def test_convert_refuses_a_source_that_is_none(diffseg: CommandLine, source: Source) -> None:
    shutil.rmtree(source.images)
    convert(diffseg, source).refused(f"There is no folder {source.images}", "Expected is")
    source.images.mkdir()
    convert(diffseg, source).refused(f"The folder {source.images} is empty", "Expected is")
    (source.images / "notes.txt").write_text("no image")
    convert(diffseg, source).refused(f"{source.images} holds no image", "Expected is")
    diffseg("convert", "msd", source.images, "--id", 5).refused(source.images)
    diffseg("convert", "msd", source.images / "gone", "--id", 5).refused(source.images / "gone")
    assert_nothing_written(diffseg)


def test_convert_refuses_label_names_that_are_none(diffseg: CommandLine, source: Source) -> None:
    source.names.write_text('{"background": 0, "organ": }')
    convert(diffseg, source).refused(f"{source.names} is not valid JSON", "line 1", "Mend that line")
    source.names.unlink()
    convert(diffseg, source).refused(f"{source.names} is missing")
    assert_nothing_written(diffseg)


@pytest.mark.parametrize("name", ["two words", "../outside", "a__b", "", "ä"])
def test_convert_refuses_a_name(name: str, diffseg: CommandLine, source: Source) -> None:
    convert(diffseg, source, name=name).refused(f"'{name}' cannot be the name of a data set", "--name")
    assert_nothing_written(diffseg)


def test_convert_refuses_a_taken_id(diffseg: CommandLine, source: Source) -> None:
    convert(diffseg, source).ok()
    convert(diffseg, source, name="Other").refused("The data set id 5 is taken by", "Dataset005_B", "--id 6")
    raw = diffseg.folder / "diffseg_workspace" / "nnUNet_raw"
    assert [path.name for path in raw.iterdir()] == ["Dataset005_B"]
    assert convert(diffseg, source, dataset_id=1000).code == 2
