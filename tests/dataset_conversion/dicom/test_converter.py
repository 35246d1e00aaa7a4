"""Trees of DICOM files: which series become cases, under which names, with which labels."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.uid import generate_uid

from diffseg_nnunet import registry
from diffseg_nnunet.dataset_conversion.dicom.converter import DicomConverter
from diffseg_nnunet.dataset_conversion.dicom.naming import safe
from diffseg_nnunet.dataset_conversion.dicom.structures import parse_rois
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import RawDataset, why_unusable
from diffseg_nnunet.verification import of_severity, verify_dataset
from diffseg_nnunet.workspace import Workspace

from .written import (
    assert_same_volume,
    by_gdcm,
    contours_of,
    rotation,
    stored_values,
    two_organs,
    write_rtstruct,
    write_seg,
    write_series,
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return tmp_path / "Down load"


def plan(tree: Path, **options: object):
    return DicomConverter().plan(tree, **options)


def identifiers(tree: Path, **options: object) -> list[str]:
    return [case.identifier for case in plan(tree, **options).cases]


def refusal(tree: Path, **options: object) -> str:
    with pytest.raises(BadInputError) as caught:
        plan(tree, **options)
    assert caught.value.mend
    return str(caught.value)


def rois_of(paths: list[Path], mask: np.ndarray, *names: str) -> dict[str, list]:
    image = by_gdcm(paths[0].parent)
    return {name: contours_of(mask == value, image) for value, name in enumerate(names, start=1)}


def test_it_is_registered() -> None:
    assert registry.load("converters", "dicom") is DicomConverter


def test_a_tree_end_to_end(tree: Path, workspace: Workspace) -> None:
    """One patient with contours, one with segments, one with neither."""
    mask = two_organs((6, 40, 36))
    stored = stored_values(size=mask.shape)
    folders = [tree / name / "ct" for name in ("a", "b", "c")]
    paths = [
        write_series(
            folder, stored + number, direction=rotation(number), PatientID=f"P{number}", numbers=[3, 0, 5, 1, 4, 2]
        )
        for number, folder in enumerate(folders)
    ]
    write_rtstruct(tree / "a/RS", paths[0], rois_of(paths[0], mask, "Liver", " left-Kidney"))
    write_seg(tree / "b/seg", paths[1], mask, ["LIVER", "Left kidney"])
    made = plan(tree)
    assert made.labels == {"background": 0, "left_kidney": 1, "liver": 2}
    assert any("liver: LIVER (1), Liver (1)" in note for note in made.notes)
    report = made.execute(dataset_id=7, workspace=workspace, workers=2)
    assert report.folder.name == "Dataset007_Down_load"
    assert report.cases == {"training": 2, "unlabelled": 1, "test": 0}
    for number, folder in enumerate(folders):
        sub = "imagesUn" if number == 2 else "imagesTr"
        written = sitk.ReadImage(str(report.folder / sub / f"P{number}_20200102_3_0000.nii.gz"))
        assert_same_volume(written, by_gdcm(folder))
    expected = np.array([0, 2, 1])[mask]
    for number, least in ((0, 0.999), (1, 1)):
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(report.folder / f"labelsTr/P{number}_20200102_3.nii.gz")))
        assert (label == expected).mean() >= least
    assert of_severity(verify_dataset(RawDataset.open(report.folder), workers=2), "error") == []
    content = (report.folder / "dataset.json").read_text()
    assert json.loads(content)["channel_names"] == {"0": "CT"}
    assert "Nobody" not in content


# --- which files and series -----------------------------------------------------------------------------------------


def test_only_image_series_are_taken(tree: Path) -> None:
    stored = stored_values()
    write_series(tree / "ct", stored, SeriesDescription="Portal")
    write_series(tree / "scout", stored[:2], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SeriesDescription="Scout")
    write_series(tree / "mpr", stored, ImageType=["DERIVED", "SECONDARY", "MPR"], SeriesDescription="Sagittal")
    write_series(tree / "one", stored[:1], SeriesDescription="Bolus")
    capture = write_series(tree / "sc", stored[:1], SeriesDescription="Screen", Modality="OT")[0]
    report = write_series(tree / "sr", stored[:1], SeriesDescription="Dose", Modality="SR")[0]
    for path, sop_class in ((capture, "1.2.840.10008.5.1.4.1.1.7"), (report, "1.2.840.10008.5.1.4.1.1.88.67")):
        dataset = dcmread(path)
        dataset.SOPClassUID = sop_class
        dataset.save_as(path)
    made = plan(tree)
    assert len(made.cases) == 1
    (note,) = [note for note in made.notes if note.startswith("Series left out")]
    for words in (
        "1 localizers (Scout)",
        "1 derived images (--derived takes them) (Sagittal)",
        "1 single images (Bolus)",
        "1 secondary captures (Screen)",
        "1 no CT or MR images (SR) (Dose)",
    ):
        assert words in note
    assert len(plan(tree, derived=True).cases) == 2
    assert len(plan(tree, series="^port").cases) == 1
    assert "no series that can be used" in refusal(tree, series="arterial")
    assert "no regular expression" in refusal(tree, series="(")


def test_files_that_are_no_series_are_counted(tree: Path) -> None:
    paths = write_series(tree / "a", stored_values(), name="{:d}")
    (tree / "copy").mkdir()
    (tree / "copy" / "0").write_bytes(paths[0].read_bytes())
    (tree / "readme.txt").write_text("DICM")
    (tree / ".hidden").write_bytes(paths[0].read_bytes())
    (tree / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (tree / "damaged").write_bytes(paths[0].read_bytes()[:200])
    (tree / "a/loop").symlink_to(tree, target_is_directory=True)
    os.mkfifo(tree / "pipe")
    made = plan(tree)
    assert len(made.cases) == 1
    assert len(made.cases[0].files) == 6
    assert made.notes[0] == (
        "Passed over: 1 DICOMDIR, 1 copies of another file, 1 files that are no DICOM, "
        "1 files whose header is damaged, 1 links to folders."
    )


def test_two_series_in_one_folder_are_two_cases(tree: Path) -> None:
    for number in (1, 2):
        write_series(tree, stored_values(number), SeriesNumber=number, name=f"{number}-{{}}")
    made = plan(tree)
    assert sorted(case.identifier for case in made.cases) == ["P_01_20200102_1", "P_01_20200102_2"]
    assert all(len(case.files) == 6 for case in made.cases)


def test_two_modalities_must_be_chosen_from(tree: Path) -> None:
    write_series(tree / "ct", stored_values())
    write_series(tree / "mr", stored_values(), modality="MR")
    assert "1 CT and 1 MR series. Choose one with --modality" in refusal(tree)
    assert plan(tree, modality="mr").channel_names == {0: "MR"}
    assert "--modality PET is unknown" in refusal(tree, modality="PET")


def test_trees_without_images(tree: Path) -> None:
    tree.mkdir()
    (tree / "notes.txt").touch()
    assert "has no CT or MR series; passed over: 1 files that are no DICOM" in refusal(tree)
    assert "There is no folder" in refusal(tree / "nowhere")


@pytest.mark.parametrize(
    ("tags", "suffix"),
    [
        (lambda group: {"AcquisitionNumber": group + 1}, "acq"),
        (lambda group: {"EchoNumbers": group + 1}, "echo"),
        (lambda group: {"TemporalPositionIdentifier": group + 1}, "time"),
        (lambda group: {"ImageType": ["ORIGINAL", "PRIMARY", "IO"[group]]}, "type"),
    ],
)
def test_several_stacks_in_one_series(tree: Path, workspace: Workspace, tags: object, suffix: str) -> None:
    uid = generate_uid()
    stored = [stored_values(group) for group in range(2)]
    for group in range(2):
        write_series(tree, stored[group], series=uid, modality="MR", name=f"{group}-{{}}", **tags(group))
    made = plan(tree)
    assert [case.identifier for case in made.cases] == [f"P_01_20200102_3_{suffix}{number}" for number in (1, 2)]
    assert any("several images a position" in note for note in made.notes)
    report = made.execute(dataset_id=1, workspace=workspace, workers=2)
    voxels = [
        sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted((report.folder / "imagesUn").iterdir())
    ]
    assert len(voxels) == 2
    for of_group, expected in zip(voxels, stored, strict=True):
        np.testing.assert_array_equal(of_group, expected - 1024)


def test_a_series_that_is_no_volume_is_refused_by_the_engine(tree: Path, workspace: Workspace) -> None:
    write_series(tree, stored_values(), positions=np.array([0, 2, 4, 8, 10, 12])[:, None] * [0, 0, 1])
    with pytest.raises(BadInputError, match=r"P_01_20200102_3: .*lacks 1 slice\(s\)"):
        plan(tree).execute(dataset_id=1, workspace=workspace, workers=2)
    assert not list(workspace.raw.iterdir())


# --- names ----------------------------------------------------------------------------------------------------------


def test_identifiers(tree: Path) -> None:
    uids = ["1.2.3.1", "1.2.3.2"]
    for number, uid in enumerate(uids):
        write_series(tree / "x y" / f"s{number}", stored_values(), series=uid, PatientID="../Müller/1")
    assert identifiers(tree) == ["M_ller_1_20200102_3", "M_ller_1_20200102_3_2"]
    assert identifiers(tree, identify="folder") == ["x_y_s0", "x_y_s1"]
    assert identifiers(tree, identify="uid") == uids
    assert "--identify name is unknown. Choose one of patient, folder, uid" in refusal(tree, identify="name")


@pytest.mark.parametrize("text", ["../../etc/passwd", "a b", "-x", "ä", "liver_seg", "P\0x", "C:\\x", "a/b_seg"])
def test_names_become_safe(text: str) -> None:
    assert why_unusable(safe(text) or "case") is None
    assert "/" not in safe(text)


# --- labels ---------------------------------------------------------------------------------------------------------


def labelled(tree: Path, *cases: tuple[str, ...]) -> Path:
    """One patient a case, with contours of these names."""
    mask = two_organs()
    for number, names in enumerate(cases):
        paths = write_series(tree / f"{number}", stored_values(), PatientID=f"P{number}")
        write_rtstruct(tree / f"RS{number}", paths, rois_of(paths, mask, *names))
    return tree


def test_rois_are_chosen_and_ordered(tree: Path, tmp_path: Path) -> None:
    labelled(tree, ("Liver", "couch"), ("HEPAR", "Kidney L"))
    made = plan(tree, rois="liver=hepar;kidney=kidney_l,kidney_r")
    assert made.labels == {"background": 0, "liver": 1, "kidney": 2}
    assert any("Structures that were left out: couch (1)" in note for note in made.notes)
    assert any("liver: HEPAR (1), Liver (1)" in note for note in made.notes)
    assert any("kidney (1 of 2)" in note for note in made.notes)
    (tmp_path / "rois.json").write_text('{"liver": ["hepar"], "kidney": ["kidney_l"]}')
    assert plan(tree, rois=str(tmp_path / "rois.json")).labels == made.labels


def test_structures_that_a_case_lacks_may_be_unannotated(tree: Path) -> None:
    labelled(tree, ("liver", "spleen"), ("liver",))
    assert plan(tree).labels == {"background": 0, "liver": 1, "spleen": 2}
    made = plan(tree, partial=True)
    assert made.labels == {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
    assert {case.identifier: case.unannotated for case in made.cases} == {
        "P0_20200102_3": (),
        "P1_20200102_3": ("spleen",),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("liver=a;spleen=A", "'A' stands for two labels"),
        ("background=a", "is no label with its names"),
        (" ; ", "names no label"),
        ("=a", "is no label"),
    ],
)
def test_rois_that_mean_nothing(text: str, words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        parse_rois(text)


def test_two_readers_must_be_chosen_from(tree: Path, workspace: Workspace) -> None:
    paths = write_series(tree / "ct", stored_values())
    for reader in ("Smith", "Jones"):
        rois = rois_of(paths, two_organs(), "liver")
        write_rtstruct(tree / reader, paths, rois, StructureSetLabel=reader)
    with pytest.raises(BadInputError, match="it draws a structure that"):
        plan(tree).execute(dataset_id=1, workspace=workspace, workers=2)
    assert plan(tree, annotation="jones").cases[0].label.files == (tree / "Jones",)


def test_labels_of_images_that_are_not_there(tree: Path) -> None:
    write_series(tree / "ct", stored_values())
    other = write_series(tree / "other", stored_values())
    write_rtstruct(tree / "RS", other, rois_of(other, two_organs(), "liver"))
    for path in other:
        path.unlink()
    made = plan(tree)
    assert [case.role for case in made.cases] == ["unlabelled"]
    assert made.labels == {"background": 0}
    assert any("1 RTSTRUCT or SEG object(s) were left out" in note for note in made.notes)


def test_a_derived_series_that_was_drawn_on_is_taken(tree: Path) -> None:
    paths = write_series(tree / "ct", stored_values(), ImageType=["DERIVED", "SECONDARY", "AXIAL"])
    write_rtstruct(tree / "RS", paths, rois_of(paths, two_organs(), "liver"))
    assert [case.role for case in plan(tree).cases] == ["training"]


def test_without_a_series_the_frame_of_reference_tells(tree: Path) -> None:
    paths = write_series(tree / "ct", stored_values())
    path = write_rtstruct(tree / "RS", paths, rois_of(paths, two_organs(), "liver"))
    struct = dcmread(path)
    del struct.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence
    struct.save_as(path)
    assert [case.role for case in plan(tree).cases] == ["training"]


def test_a_damaged_object_is_left_out(tree: Path) -> None:
    paths = write_series(tree / "ct", stored_values())
    path = write_rtstruct(tree / "RS", paths, rois_of(paths, two_organs(), "liver"))
    struct = dcmread(path)
    struct.StructureSetROISequence[0].ROINumber = None
    struct.save_as(path)
    made = plan(tree)
    assert made.cases[0].role == "unlabelled"
    assert any("RS was left out: it is no valid label object" in note for note in made.notes)


def test_recognition(tree: Path) -> None:
    write_series(tree / "ct", stored_values())
    assert DicomConverter().recognise(tree).format_name == "dicom"
    assert DicomConverter().recognise(Path(__file__).parent) is None
