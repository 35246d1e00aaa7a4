"""Files of a plain folder that cannot be converted: what is wrong is told, nothing is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from diffseg_nnunet.workspace import Workspace

from .sources import Run, organs, refusal, scan, write


def test_different_size(run: Run, workspace: Workspace, source: Path) -> None:
    write(source / "labels/liver_2.nii.gz", organs()[:-1], 2)
    message = refusal(run, workspace)
    assert f"The label {source / 'labels/liver_2.nii.gz'} has the size (9, 8, 6) voxels" in message
    assert "1 problem(s) in 1 case(s)" in message
    assert "(9, 8, 7)" in message


@pytest.mark.parametrize("name", ["Spacing", "Origin", "Direction"])
def test_different_geometry(run: Run, workspace: Workspace, source: Path, name: str) -> None:
    path = source / "labels/liver_2.nii.gz"
    label = sitk.ReadImage(str(path))
    values = list(getattr(label, f"Get{name}")())
    changed = [-value for value in values] if name == "Direction" else [values[0] + 2.0, *values[1:]]
    getattr(label, f"Set{name}")(changed)
    sitk.WriteImage(label, str(path))
    message = refusal(run, workspace)
    assert f"{path} has the {name.lower()}" in message
    assert f"{changed[0]:.4f}"[:5] in message
    assert f"{values[0]:.4f}"[:5] in message


def test_label_values_that_have_no_name(run: Run, workspace: Workspace, source: Path) -> None:
    (source / "labels.json").write_text('{"background": 0, "liver": 1}')
    message = refusal(run, workspace)
    assert message.count("that have no name: 2 (named are 0, 1)") == 2


def test_labels_that_are_no_integers(run: Run, workspace: Workspace, source: Path) -> None:
    write(source / "labels/liver_1.nii.gz", organs(np.float32) * 0.5, 1)
    assert "liver_1.nii.gz holds values that are no integers: 0.5" in refusal(run, workspace)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_a_truncated_file(run: Run, workspace: Workspace, source: Path, ending: str) -> None:
    path = source / f"images/liver_1{ending}"
    volume = sitk.ReadImage(str(source / "images/liver_1.nii.gz"))
    (source / "images/liver_1.nii.gz").unlink()
    sitk.WriteImage(volume, str(path))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"{path} cannot be used: " in refusal(run, workspace)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha"])
def test_nan_in_an_image(run: Run, workspace: Workspace, source: Path, ending: str) -> None:
    (source / "images/liver_1.nii.gz").unlink()
    voxels = scan(1)
    voxels[0, 0, 0] = np.nan
    path = write(source / f"images/liver_1{ending}", voxels, 1)
    message = refusal(run, workspace)
    assert str(path) in message
    assert "NaN" in message


@pytest.mark.parametrize("size", [(8, 9), (3, 7, 8, 9)])
def test_a_file_that_is_not_3d(run: Run, workspace: Workspace, source: Path, size: tuple[int, ...]) -> None:
    volume = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=size), isVector=False)
    sitk.WriteImage(volume, str(source / "images/liver_1.nii.gz"))
    message = refusal(run, workspace)
    assert f"{source / 'images/liver_1.nii.gz'} is {len(size)}D" in message


def test_a_4d_file_with_another_number_of_channels(run: Run, workspace: Workspace, source: Path) -> None:
    message = refusal(run, workspace, modality="T1,T2,FLAIR")
    assert "expected is 4D with 3 channels" in message


def test_many_problems_are_counted(run: Run, workspace: Workspace, source: Path) -> None:
    for number in range(1, 16):
        write(source / f"images/liver_{number}.nii.gz", scan(number), number)
        write(source / f"labels/liver_{number}.nii.gz", organs() + 5, number)
    message = refusal(run, workspace)
    assert message.startswith("15 problem(s) in 15 case(s)")
    assert message.count("\n- liver_") == 10
    assert "- and 5 more" in message


def test_a_link_that_leads_nowhere(run: Run, workspace: Workspace, source: Path) -> None:
    (source / "images/liver_1.nii.gz").unlink()
    (source / "images/liver_1.nii.gz").symlink_to(source / "not_fetched")
    assert "liver_1.nii.gz cannot be used: the link leads nowhere" in refusal(run, workspace)


def test_an_interruption_publishes_nothing_and_is_gone_on_with(run: Run, workspace: Workspace) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=interrupt)
    assert [path.name for path in workspace.raw.iterdir()] == [".converting-Dataset005"]
    assert run().notes[0].startswith("Went on with an interrupted conversion")
    assert [path.name for path in workspace.raw.iterdir()] == ["Dataset005_Liver"]
