"""The command line itself: help, exit codes, messages, lists of values, doctor."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from diffseg_nnunet.cli.arguments import expand_lists

if TYPE_CHECKING:
    from tests.cli.conftest import Source
    from tests.conftest import CommandLine

COMMANDS = (
    *("doctor", "verify", "dataset", "plan", "preprocess", "pretrain", "sample", "train", "predict", "coordinates"),
    *("labels", "evaluate", "refine", "benchmark", "run", "report", "export", "demo"),
    *("convert msd", "convert folder", "convert auto"),
)
HEAVY = ("torch", "nnunetv2", "monai", "SimpleITK", "pandas", "scipy", "matplotlib")


def test_help_imports_nothing_heavy(diffseg: CommandLine) -> None:
    code = f"""
import sys
from diffseg_nnunet.cli.app import run
code = run(["--help"])
loaded = [name for name in {HEAVY} if name in sys.modules]
sys.exit(code or f"imported: {{loaded}}" if loaded else code)
"""
    finished = diffseg.start_other(sys.executable, "-c", code).wait().ok()
    for command in COMMANDS:
        assert command.split()[0] in finished.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, diffseg: CommandLine) -> None:
    finished = diffseg(*command.split(), "--help", COLUMNS=200).ok()
    assert "--workspace" in finished.out
    assert "Usage: " in finished.out
    assert list(diffseg.folder.iterdir()) == []


def test_version(diffseg: CommandLine) -> None:
    from diffseg_nnunet import __version__

    assert diffseg("--version").ok().out.strip() == f"diffseg_nnunet {__version__}"


def test_doctor_prints_a_table(diffseg: CommandLine) -> None:
    finished = diffseg("doctor", "--workspace", "elsewhere", COLUMNS=200)
    assert finished.code in (0, 2)
    assert (finished.code == 2) == ("problem" in finished.out)
    for name in ("python", "torch", "GPU", "disk", "nnU-Net", "workspace"):
        assert name in finished.out
    assert list(diffseg.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        ("plan 1 --unlabeled 7 8", "plan 1 --unlabeled 7 --unlabeled 8"),
        ("plan 1 --unlabeled 7 8 --spacing 3 2 2", "plan 1 --unlabeled 7 --unlabeled 8 --spacing 3 2 2"),
        ("plan 1 --spacing 3 2 2 --unlabeled 7", "plan 1 --spacing 3 2 2 --unlabeled 7"),
        ("preprocess 1 -c 2d 3d_fullres", "preprocess 1 -c 2d -c 3d_fullres"),
        ("run 1 -c 2d 3d_fullres -f 0 1 2", "run 1 -c 2d -c 3d_fullres -f 0 -f 1 -f 2"),
        ("run 1 --fold 0 all --unlabeled 7 8", "run 1 --fold 0 --fold all --unlabeled 7 --unlabeled 8"),
        ("predict -d 1 -f 0 1 -i in -o out", "predict -d 1 -f 0 -f 1 -i in -o out"),
        ("sample -d 1 --size 32 64 64 -o out", "sample -d 1 --size 32 --size 64 --size 64 -o out"),
        (
            "evaluate --cases a b --tolerance 2 liver=5 -o x",
            "evaluate --cases a --cases b --tolerance 2 --tolerance liver=5 -o x",
        ),
        ("export 1 -f 0 1 --stock x.zip", "export 1 -f 0 -f 1 --stock x.zip"),
        ("run 1 --configuration 2d --configuration 3d_fullres", "run 1 --configuration 2d --configuration 3d_fullres"),
        ("run --help", "run --help"),
        ("run", "run"),
        ("train 1 -f 0 1", "train 1 -f 0 1"),
        ("", ""),
    ],
)
def test_lists_of_values(given: str, expanded: str) -> None:
    assert expand_lists(given.split()) == expanded.split()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("train", 7, "--label-seed", 3), "Give --labels, too"),
        (("benchmark", "few-label", 7, "--id", 8), "7 is one already"),
        (("benchmark", "few-label", 7, "--seeds", -1), "-1 is no seed"),
    ],
)
def test_options_without_effect_are_refused(diffseg: CommandLine, command: tuple, words: str) -> None:
    diffseg(*command).refused(words)
    assert list(diffseg.folder.iterdir()) == []


def test_an_unknown_data_set_creates_nothing(diffseg: CommandLine) -> None:
    diffseg("verify", 7, "--workspace", "mistyped").refused("no data set with id 7", "mistyped", "--workspace")
    diffseg("verify", "Dataset007_Livers").refused("no data set Dataset007_Livers", "diffseg convert")
    diffseg("verify", "Livers").refused("'Livers' is no data set", "DatasetXXX_Name")
    assert list(diffseg.folder.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    ["nonsense", "train", "train one", "train 1 --iterations 0", "run 1 --seed -1", "plan 1 --spacing 1 2"],
)
def test_wrong_usage(wrong: str, diffseg: CommandLine) -> None:
    diffseg(*wrong.split()).refused("Error")
    assert list(diffseg.folder.iterdir()) == []


def test_a_file_where_a_folder_should_be(diffseg: CommandLine) -> None:
    raw = diffseg.folder / "diffseg_workspace" / "nnUNet_raw"
    (raw / "Dataset005_B").mkdir(parents=True)
    (raw.parent / "nnUNet_results").write_text("no folder")
    diffseg("verify", 5).refused("nnUNet_results cannot be used", "Check the path")


def test_a_traceback_only_with_debug(diffseg: CommandLine) -> None:
    (diffseg.folder / "diffseg_workspace" / "nnUNet_raw" / "Dataset005_B").mkdir(parents=True)
    diffseg("verify", 5).refused("dataset.json is missing")
    for arguments in (("--debug", "verify", 5), ("verify", 5, "--debug")):
        finished = diffseg(*arguments)
        assert finished.code == 2
        assert "Traceback" in finished.err
        assert "dataset.json is missing" in finished.err


def test_interrupted_by_ctrl_c(diffseg: CommandLine, source: Source) -> None:
    """It reads its label names from a pipe that nobody fills, so that it is surely still at work."""
    source.names.unlink()
    os.mkfifo(source.names)
    labels = ("--labels", source.labels, "--label-names", source.names, "--modality", "CT", "--name", "B")
    running = diffseg.start("convert", "folder", "--images", source.images, *labels, "--id", 5)
    while (writer := _opened(source.names)) is None:
        assert running.process.poll() is None, running.wait()
        time.sleep(0.01)
    running.process.send_signal(signal.SIGINT)
    finished = running.wait(timeout_s=60)
    os.close(writer)
    assert finished.code == 130
    assert finished.err == "Error: Interrupted.\nRun the same command again to go on.\n"


def _opened(pipe: Path) -> int | None:
    """The pipe, to write into; None while nobody reads from it."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None
