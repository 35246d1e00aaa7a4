"""Names, numbers and labels of a plain folder that cannot be converted: what is wrong is told, nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from diffseg_nnunet.dataset_conversion.label_names import named_values
from diffseg_nnunet.workspace import Workspace

from .sources import Run, refusal, scan, write


def test_a_missing_folder(run: Run, workspace: Workspace, source: Path) -> None:
    message = refusal(run, workspace, images=source / "nowhere")
    assert f"no folder {source / 'nowhere'}" in message
    assert "images/liver_01.nii.gz" in message


def test_an_empty_folder(run: Run, workspace: Workspace, source: Path) -> None:
    (source / "empty").mkdir()
    (source / "empty/.DS_Store").touch()
    assert "empty is empty" in refusal(run, workspace, images=source / "empty")
    assert "empty is empty" in refusal(run, workspace, labels=source / "empty")


def test_an_archive_and_a_folder_too_high(run: Run, workspace: Workspace, source: Path) -> None:
    archive = Path(shutil.make_archive(str(source / "data"), "zip", source / "images"))
    assert "is an archive; extract it first" in refusal(run, workspace, images=archive)
    message = refusal(run, workspace, images=source)
    assert "holds no image" in message
    assert "subfolders images, labels do" in message


def test_an_image_without_its_label(run: Run, workspace: Workspace, source: Path) -> None:
    (source / "labels/liver_2.nii.gz").unlink()
    message = refusal(run, workspace)
    assert f"1 image(s) in {source / 'images'} have no label: liver_2.nii.gz" in message
    assert "--rest-unlabelled" in message


@pytest.mark.parametrize("rest", [False, True])
def test_a_label_without_its_image(run: Run, workspace: Workspace, source: Path, rest: bool) -> None:
    (source / "images/liver_2.nii.gz").unlink()
    message = refusal(run, workspace, rest_unlabelled=rest)
    assert f"1 label(s) in {source / 'labels'} have no image: liver_2.nii.gz" in message


def test_names_that_do_not_fit_at_all(run: Run, workspace: Workspace, source: Path) -> None:
    for path in list((source / "labels").iterdir()):
        path.rename(path.with_name(path.name.replace("liver", "label")))
    assert "an image and its label must be called the same" in refusal(run, workspace)


def test_one_case_in_two_formats(run: Run, workspace: Workspace, source: Path) -> None:
    write(source / "images/liver_1.nrrd", scan(1))
    assert "one case twice" in refusal(run, workspace)


def test_a_missing_channel(run: Run, workspace: Workspace, tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001", "b_0001"):
        write(tmp_path / f"channels/{name}.nii.gz", scan(1))
    message = refusal(run, workspace, images=tmp_path / "channels", labels=None, label_names=None, modality="T1,T2")
    assert "'b' in" in message
    assert "has the channels 1" in message


@pytest.mark.parametrize("identifier", ["liver 3", "liver(3)", "liver_seg"])
def test_identifiers_that_would_break_later(run: Run, workspace: Workspace, source: Path, identifier: str) -> None:
    write(source / f"images/{identifier}.nii.gz", scan(3))
    message = refusal(run, workspace, rest_unlabelled=True)
    assert f"{identifier}.nii.gz) cannot be a case identifier" in message


def test_all_names_that_would_break_later_are_told(run: Run, workspace: Workspace, source: Path) -> None:
    for name in ("é 1", "é 2", "é 3"):
        for part in ("images", "labels"):
            shutil.copy(source / part / "liver_1.nii.gz", source / part / f"{name}.nii.gz")
    message = refusal(run, workspace)
    assert "'é 1'" in message
    assert "Nor can 2 more: é 2, é 3." in message


@pytest.mark.parametrize("name", ["my liver", "../Liver", "/tmp/Liver", "a__b", ""])
def test_names_that_cannot_be(run: Run, workspace: Workspace, tmp_path: Path, name: str) -> None:
    assert "--name" in refusal(run, workspace, name=name)
    assert not (tmp_path / "Liver").exists()


def test_a_taken_id_and_a_free_one(run: Run, workspace: Workspace) -> None:
    run()
    (workspace.raw / "Dataset006_Other").mkdir()
    message = refusal(run, workspace, name="Another")
    assert "id 5 is taken by" in message
    assert "Dataset005_Liver" in message
    assert "--id 7" in message


def test_an_id_that_another_data_set_left_results_under(run: Run, workspace: Workspace) -> None:
    (workspace.results / "Dataset005_Old").mkdir(parents=True)
    assert "Dataset005_Old" in refusal(run, workspace)
    (workspace.results / "Dataset005_Old").rename(workspace.results / "Dataset005_Liver")
    assert run().folder.name == "Dataset005_Liver"


def test_ids_out_of_range(run: Run, workspace: Workspace) -> None:
    assert "1..999" in refusal(run, workspace, dataset_id=1000)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"background": 0, "liver": 1, "tumour": 1}, "several labels have the value 1"),
        ({"background": 0, "liver": 1.5}, "does not pair a name with a whole number"),
        ({"background": 0, "liver": [1, 2]}, "does not pair a name with a whole number"),
        ({"0": "background", "1": "liver", "2": "liver"}, "two labels are called 'liver'"),
        ({}, "names no label"),
    ],
)
def test_label_names_that_nnunet_cannot_use(
    run: Run, workspace: Workspace, source: Path, content: dict, words: str
) -> None:
    (source / "labels.json").write_text(json.dumps(content))
    message = refusal(run, workspace)
    assert words in message
    assert "labels.json" in message


def test_label_names_of_either_direction() -> None:
    expected = {"background": 0, "liver": 1, "tumour": 2}
    assert named_values({"tumour": 2, "background": 0, "liver": 1}, "x") == expected
    assert named_values({"0": "Background", "2": "tumour", "1": "liver"}, "x") == expected
    assert named_values({"background": "0", "liver": "1", "tumour": "2"}, "x") == expected
    assert named_values({"liver": 1, "tumour": 2}, "x") == expected


def test_label_names_that_are_missing_or_superfluous(run: Run, workspace: Workspace, source: Path) -> None:
    assert "--label-names" in refusal(run, workspace, label_names=None)
    assert "labels.json is missing" in refusal(run, workspace, label_names=source / "no/labels.json")
    assert "--labels" in refusal(run, workspace, labels=None)
