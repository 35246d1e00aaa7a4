"""``diffseg convert``: commands made of converters, third parties' included; dry runs, archives, recognition, codes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Source
    from tests.conftest import CommandLine, Finished

# all that a third party writes, and its entry points
MODULE = """
from diffseg_nnunet.dataset_conversion.converter import Option, TreeConverter
from diffseg_nnunet.dataset_conversion.layouts import Layout, Part


class Clinic(TreeConverter):
    format_name = "clinic"
    title = "scans [of] one clinic"
    expects = "images/a.nii.gz\\nlabels/a.nii.gz"
    licence = "CC0"
    dataset_name = "Clinic"
    labels = {"organ": 1}
    layouts = (Layout("the clinic's folders", (Part("training", ("images/{case}",), "labels/{case}"),)),)
    options = (Option("prefix", "Put before each name.", many=True), Option("shout", "In capitals.", bool))

    def adapted(self, plan, found, *, prefix, shout):
        return plan if not (prefix or shout) else type(plan)(**{**vars(plan), "notes": (f"{prefix} {shout}",)})


class Twin(Clinic):
    format_name = "twin"


class Greedy(Clinic):
    format_name = "greedy"
    options = (Option("cases", "Taken."),)
"""
BROKEN = "raise RuntimeError('built for another Python')\n"


def third_party(diffseg: CommandLine, *names: str) -> dict[str, str]:
    """A package with these converters, as pip would install it; the variable that makes it known."""
    site = diffseg.folder / "site"
    (site / "clinic-1.0.dist-info").mkdir(parents=True)
    (site / "clinic_data.py").write_text(MODULE)
    (site / "clinic_broken.py").write_text(BROKEN)
    values = {"broken": "clinic_broken:Broken"}
    lines = [f"{name} = {values.get(name, f'clinic_data:{name.capitalize()}')}" for name in names]
    (site / "clinic-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: clinic\nVersion: 1.0\n")
    (site / "clinic-1.0.dist-info/entry_points.txt").write_text("\n".join(["[diffseg_nnunet.converters]", *lines, ""]))
    return {"PYTHONPATH": str(site), "COLUMNS": "200"}


def written(diffseg: CommandLine) -> list[str]:
    raw = diffseg.folder / "diffseg_workspace/nnUNet_raw"
    return sorted(path.name for path in raw.iterdir()) if raw.is_dir() else []


def content(diffseg: CommandLine, name: str) -> dict:
    return json.loads((diffseg.folder / f"diffseg_workspace/nnUNet_raw/{name}/conversion.json").read_text())


def folder_format(diffseg: CommandLine, source: Source, *options: object) -> Finished:
    labels = ("--labels", source.labels, "--label-names", source.names)
    common = ("--modality", "CT", "--id", 5, "--name", "B")
    return diffseg("convert", "folder", "--images", source.images, *labels, *common, *options, COLUMNS=200)


# --- third parties ----------------------------------------------------------------------------------------------------


def test_a_third_partys_converter_by_its_entry_point_alone(diffseg: CommandLine, source: Source) -> None:
    known = third_party(diffseg, "clinic", "broken")
    listing = diffseg("convert", "--list", **known).ok().out
    assert "clinic: scans [of] one clinic\n  licence: CC0\n    images/a.nii.gz\n    labels/a.nii.gz" in listing
    assert "Warning: broken cannot be used: RuntimeError: built for another Python" in listing
    shown = diffseg("convert", "clinic", "--help", **known).ok().out
    for words in ("Scans [of] one clinic.", "Licence of the data: CC0", "labels/a.nii.gz", "--prefix", "--shout"):
        assert words in shown
    done = diffseg("convert", "clinic", "source", "--id", 5, "--prefix", "x", "--prefix", "y", "--shout", **known).ok()
    assert "('x', 'y') True" in done.out
    assert content(diffseg, "Dataset005_Clinic")["options"] == {"prefix": ["x", "y"], "shout": True}


def test_help_names_the_formats_and_what_each_is(diffseg: CommandLine) -> None:
    shown = diffseg("convert", "--help", **third_party(diffseg, "clinic", "broken")).ok().out
    lines = {line.split()[1]: " ".join(line.split()[2:-1]) for line in shown.splitlines() if line.startswith("│ ")}
    assert {"auto", "folder", "msd"} < lines.keys()
    assert lines["clinic"] == "scans [of] one clinic"
    assert lines["broken"] == "cannot be used: RuntimeError: built for another Python"


def test_a_format_that_there_is_not(diffseg: CommandLine) -> None:
    diffseg("convert", "clinik", "x", "--id", 5, **third_party(diffseg, "clinic")).refused(
        "Unknown converter 'clinik'", "clinic, "
    )


def test_an_option_that_all_formats_have(diffseg: CommandLine) -> None:
    finished = diffseg("convert", "greedy", "--help", **third_party(diffseg, "greedy"))
    assert finished.code == 1
    assert "'greedy' has the option --cases, which every format has" in finished.err


# --- what is chosen and told ------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(diffseg: CommandLine, source: Source) -> None:
    before = sorted(diffseg.folder.rglob("*"))
    out = folder_format(diffseg, source, "--dry-run", "--splits", "n=1").ok().out
    assert sorted(diffseg.folder.rglob("*")) == before
    for words in ("Dataset005_B would be written", "3 training", "6 linked", "0.0 MiB", "organ", "splits: n=1, 1 fold"):
        assert words in out


def test_labels_cases_and_splits(diffseg: CommandLine, source: Source) -> None:
    source.names.write_text('{"background": 0, "vessel": 1, "organ": 2}')
    rng = np.random.default_rng(1)
    for path in source.labels.iterdir():
        source.write(path, rng.integers(0, 3, (10, 9, 8)).astype(np.uint8))
    (diffseg.folder / "cases.txt").write_text("a\nc\n")
    chosen = ("--keep-labels", "organ", "--cases", "@cases.txt", "--splits", "5-fold")
    out = folder_format(diffseg, source, *chosen).ok().out
    assert "2 training case(s); files: 2 linked, 2 encoded" in out
    assert "splits: 5-fold, 2 fold(s) (nnU-Net's rule" in out
    told = content(diffseg, "Dataset005_B")
    assert told["selection"] == {"labels": ["organ"], "cases": ["a", "c"], "splits": "5-fold"}
    assert [(row["source_name"], row["value"]) for row in told["labels"]] == [
        ("background", 0),
        ("vessel", 0),
        ("organ", 1),
    ]
    assert (diffseg.folder / "diffseg_workspace/nnUNet_preprocessed/Dataset005_B/splits_final.json").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--keep-labels", "organs"), ("no label organs", "Did you mean 'organ'", "There are: organ")),
        (("--cases", "a,z"), ("no case z", "There are: a, b, c")),
        (("--splits", "18/12"), ("'18/12' is no split of B", "5-fold")),
        (("--splits", "n=3"), ("3 training case(s): too few",)),
    ],
)
def test_choices_that_there_are_not(
    diffseg: CommandLine, source: Source, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    folder_format(diffseg, source, *options).refused(*words)
    assert written(diffseg) == []


def test_exit_codes_and_reports(diffseg: CommandLine, source: Source) -> None:
    path = source.labels / "b.nii.gz"
    source.write(path, np.ones((10, 9, 8), np.float32))
    path.touch()
    refused = folder_format(diffseg, source, "--no-repair", "--report", "why").refused("whole numbers as 32-bit float")
    assert "--no-repair" in refused.err
    assert written(diffseg) == []
    told = json.loads((diffseg.folder / "why/conversion.json").read_text())
    assert (told["refused"], told["format"]) == (True, "folder")
    with (diffseg.folder / "why/conversion.csv").open() as stream:
        assert [row["code"] for row in csv.DictReader(stream)] == ["label_float"]
    mended = folder_format(diffseg, source)
    assert mended.code == 1
    assert "label_float" in mended.out
    assert "next: diffseg run 5" in mended.out


def test_a_report_that_cannot_be_written_is_seen_first(diffseg: CommandLine, source: Source) -> None:
    (diffseg.folder / "why").touch()
    folder_format(diffseg, source, "--report", "why/not").refused("--report why/not cannot be a folder")
    assert written(diffseg) == []


def test_bad_cases_are_skipped_on_request(diffseg: CommandLine, source: Source) -> None:
    source.broken_image.write_bytes(b"x")
    folder_format(diffseg, source).refused("--skip-bad")
    finished = folder_format(diffseg, source, "--skip-bad")
    assert finished.code == 1
    assert "1 case(s) with errors were left out: b" in finished.out
    assert content(diffseg, "Dataset005_B")["skipped"] == ["b"]


# --- archives ---------------------------------------------------------------------------------------------------------


def test_an_archive(diffseg: CommandLine, source: Source) -> None:
    known = third_party(diffseg, "clinic")
    archive = Path(shutil.make_archive(str(diffseg.folder / "scans"), "zip", diffseg.folder, "source"))
    shutil.rmtree(source.images.parent)
    convert = ("convert", "clinic", archive, "--id", 5)
    diffseg(*convert, **known).refused("is an archive (0.00 GiB unpacked); extract it first", "--extract")
    dry = diffseg(*convert, "--extract", "--dry-run", **known).ok()
    assert "nothing was unpacked" in dry.out
    assert not (diffseg.folder / "scans").exists()
    diffseg(*convert, "--extract", **known).ok()
    assert written(diffseg) == ["Dataset005_Clinic"]
    assert (diffseg.folder / "scans/source/images/a.nii.gz").is_file()
    assert content(diffseg, "Dataset005_Clinic")["source"] == "source"


def test_archives_within_a_folder_are_named(diffseg: CommandLine) -> None:
    (diffseg.folder / "download/Abdomen").mkdir(parents=True)
    (diffseg.folder / "download/Abdomen/RawData.zip").touch()
    for form in ("btcv", "auto"):
        diffseg("convert", form, "download", "--id", 5).refused("It holds archives: Abdomen/RawData.zip", "Extract")


# --- recognition ------------------------------------------------------------------------------------------------------


def test_auto_asks_then_converts(diffseg: CommandLine, source: Source) -> None:
    known = third_party(diffseg, "clinic", "broken")
    finished = diffseg("convert", "auto", "source", "--id", 5, "--splits", "n=1", **known)
    finished.refused("format 'clinic'", "Run `diffseg convert clinic source --id 5 --splits n=1`, or add --yes")
    # nothing is written, so that nothing needs to be agreed to
    assert "3 training" in diffseg("convert", "auto", "source", "--id", 5, "--dry-run", **known).ok().out
    assert "clinic: 3 image(s) are named as in the clinic's folders (certainty 0.9)" in finished.out
    assert "the format 'broken' could not be asked: RuntimeError: built for another Python" in finished.out
    assert written(diffseg) == []
    diffseg("convert", "auto", "source", "--id", 5, "--yes", **known).ok()
    assert written(diffseg) == ["Dataset005_Clinic"]
    assert content(diffseg, "Dataset005_Clinic")["format"] == "clinic"


def test_auto_refuses_what_two_formats_recognise_equally(diffseg: CommandLine, source: Source) -> None:
    known = third_party(diffseg, "clinic", "twin")
    diffseg("convert", "auto", "source", "--id", 5, "--yes", **known).refused("equally like 'clinic' and 'twin'")
    assert written(diffseg) == []


def test_auto_recognises_nothing_in_nothing(diffseg: CommandLine) -> None:
    (diffseg.folder / "empty").mkdir()
    diffseg("convert", "auto", "empty", "--id", 5).refused("No format recognises empty", "--list")
    diffseg("convert", "auto", "gone", "--id", 5).refused("There is no folder gone")
