"""A conversion that is killed goes on where it was; what others left is discarded; two never mix."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from diffseg_nnunet.dataset_conversion.core import convert
from diffseg_nnunet.dataset_conversion.description import ConversionPlan, SourceCase
from diffseg_nnunet.dataset_conversion.sources import VolumeFile
from diffseg_nnunet.dataset_conversion.staging import exclusive
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import RawDataset
from diffseg_nnunet.verification import of_severity, verify_dataset
from diffseg_nnunet.workspace import Workspace

CASES = 6
STAGED = ".converting-Dataset001"
# each source notes that it was read, and waits where it is told to
SCRIPT = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
from diffseg_nnunet.dataset_conversion.core import convert
from diffseg_nnunet.dataset_conversion.description import ConversionPlan, SourceCase
from diffseg_nnunet.dataset_conversion.sources import VolumeFile
from diffseg_nnunet.workspace import Workspace

folder, wait_from = Path(sys.argv[1]), int(sys.argv[2])

@dataclass(frozen=True)
class Noted:
    path: Path
    @property
    def files(self):
        return (self.path,)
    def read(self, read):
        number = int(self.path.name[:1])
        if number >= wait_from:
            time.sleep(600)
        with (folder / "read.txt").open("a") as stream:
            stream.write(f"{number}\\n")
        return VolumeFile(self.path).read(read)

cases = tuple(
    SourceCase(path.name[:1], (Noted(path),), None, "unlabelled") for path in sorted((folder / "source").iterdir())
)
plan = ConversionPlan("Pool", {0: "CT"}, {"background": 0}, cases)
workspace = Workspace(folder / "raw", folder / "preprocessed", folder / "results")
print(convert(plan, dataset_id=1, workspace=workspace, workers=1).notes)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(CASES):
        voxels = np.random.default_rng(number).normal(size=(4, 5, 6)).astype(np.float32)
        sitk.WriteImage(sitk.GetImageFromArray(voxels), folder / f"{number}.nii.gz")
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "raw", tmp_path / "preprocessed", tmp_path / "results")


def plan_of(source: Path) -> ConversionPlan:
    cases = tuple(
        SourceCase(path.name[:1], (VolumeFile(path),), None, "unlabelled") for path in sorted(source.iterdir())
    )
    return ConversionPlan("Pool", {0: "CT"}, {"background": 0}, cases)


def journal(workspace: Workspace) -> Path:
    return workspace.raw / STAGED / "journal.jsonl"


def interrupted(source: Path, workspace: Workspace, after: int) -> None:
    """Leave what a conversion leaves that is interrupted after some cases."""

    def stop(done: int, total: int) -> None:
        if done >= after:  # the thread may be ahead of its reports
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan_of(source), dataset_id=1, workspace=workspace, workers=1, progress=stop)


def finished_cases(workspace: Workspace) -> list[str]:
    return [json.loads(line)["case"] for line in journal(workspace).read_text().splitlines()[1:]]


def test_killed_and_gone_on_with(tmp_path: Path, source: Path, workspace: Workspace) -> None:
    command = [sys.executable, "-P", "-c", SCRIPT, str(tmp_path)]  # the checkout is not the package
    killed = subprocess.Popen([*command, "3"])
    deadline = time.monotonic() + 60
    while not journal(workspace).is_file() or len(journal(workspace).read_text().splitlines()) < 4:
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert [path for path in workspace.raw.iterdir() if not path.name.startswith(".")] == []
    finished = subprocess.run([*command, "99"], capture_output=True, text=True, check=True)
    assert "3 of 6 case(s) were finished" in finished.stdout
    assert (tmp_path / "read.txt").read_text().split() == list("012345")
    (folder,) = workspace.raw.iterdir()
    assert folder.name == "Dataset001_Pool"
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "conversion.csv",
        "conversion.json",
        "dataset.json",
    ]
    assert of_severity(verify_dataset(RawDataset.open(folder), workers=1), "error") == []


def test_another_source_discards_what_was_staged(source: Path, workspace: Workspace) -> None:
    interrupted(source, workspace, after=2)
    path = source / "0.nii.gz"
    changed = sitk.ReadImage(path) + 1
    path.unlink()
    sitk.WriteImage(changed, path)
    report = convert(plan_of(source), dataset_id=1, workspace=workspace, workers=1)
    assert report.notes == ()
    written = sitk.GetArrayFromImage(sitk.ReadImage(report.folder / "imagesUn/0_0000.nii.gz"))
    np.testing.assert_array_equal(written, sitk.GetArrayFromImage(changed))


def test_other_settings_discard_what_was_staged(source: Path, workspace: Workspace) -> None:
    interrupted(source, workspace, after=2)
    report = convert(plan_of(source), dataset_id=1, workspace=workspace, workers=1, copy=True)
    assert (report.notes, report.files) == ((), {"copied": CASES})


def test_half_a_line_and_a_lost_file_are_done_again(source: Path, workspace: Workspace) -> None:
    interrupted(source, workspace, after=3)
    first, *_ = finished_cases(workspace)
    with journal(workspace).open("a") as stream:
        stream.write('{"case": "5", "fi')
    lost = workspace.raw / STAGED / f"data/imagesUn/{first}_0000.nii.gz"
    lost.unlink()
    lost.write_bytes(b"")
    original = (source / f"{first}.nii.gz").read_bytes()
    done = len(finished_cases_of_whole_lines(workspace)) - 1
    report = convert(plan_of(source), dataset_id=1, workspace=workspace, workers=1)
    assert f"{done} of {CASES} case(s) were finished" in report.notes[0]
    assert of_severity(verify_dataset(RawDataset.open(report.folder), workers=1), "error") == []
    assert (source / f"{first}.nii.gz").read_bytes() == original


def finished_cases_of_whole_lines(workspace: Workspace) -> list[str]:
    whole = journal(workspace).read_text().splitlines()[1:-1]
    return [json.loads(line)["case"] for line in whole]


def test_a_journal_survives_two_kills(source: Path, workspace: Workspace) -> None:
    interrupted(source, workspace, after=1)
    with journal(workspace).open("a") as stream:
        stream.write('{"case": "5", "fi')
    interrupted(source, workspace, after=3)
    assert len(finished_cases(workspace)) >= 3
    report = convert(plan_of(source), dataset_id=1, workspace=workspace, workers=1)
    assert report.cases["unlabelled"] == CASES


@pytest.mark.parametrize("content", ["", "no json\n", '{"signature": "another"}\n', "[1, 2]\n"])
def test_a_staging_folder_of_something_else(source: Path, workspace: Workspace, content: str) -> None:
    journal(workspace).parent.mkdir(parents=True)
    journal(workspace).write_text(content)
    (journal(workspace).parent / "data/imagesUn").mkdir(parents=True)
    (journal(workspace).parent / "data/imagesUn/stray_0000.nii.gz").write_bytes(b"stray")
    report = convert(plan_of(source), dataset_id=1, workspace=workspace, workers=1)
    assert len(list((report.folder / "imagesUn").iterdir())) == CASES
    assert [path.name for path in workspace.raw.iterdir()] == ["Dataset001_Pool"]


def test_two_conversions_of_one_id_do_not_mix(source: Path, workspace: Workspace) -> None:
    with (
        exclusive(workspace.raw / "Dataset001_Other"),
        pytest.raises(BadInputError, match="Another process is converting"),
    ):
        convert(plan_of(source), dataset_id=1, workspace=workspace, workers=1)
    assert list(workspace.raw.iterdir()) == []
    convert(plan_of(source), dataset_id=1, workspace=workspace, workers=1)


def test_what_a_kill_left_of_a_taken_id_is_cleaned(source: Path, workspace: Workspace) -> None:
    """As after a kill between publishing and cleaning."""
    convert(plan_of(source), dataset_id=1, workspace=workspace, workers=1)
    journal(workspace).parent.mkdir()
    with pytest.raises(BadInputError, match="is taken by"):
        convert(plan_of(source), dataset_id=1, workspace=workspace, workers=1)
    assert [path.name for path in workspace.raw.iterdir()] == ["Dataset001_Pool"]
