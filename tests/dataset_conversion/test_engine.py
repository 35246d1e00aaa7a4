"""The engine: what it writes, mends, leaves out, refuses and tells, with a converter such as a third party writes."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import SimpleITK as sitk

from diffseg_nnunet.dataset_conversion.converter import TreeConverter
from diffseg_nnunet.dataset_conversion.core import ConversionRefusedError, ConversionReport, convert
from diffseg_nnunet.dataset_conversion.description import ConversionPlan, SplitScheme
from diffseg_nnunet.dataset_conversion.layouts import Layout, Part
from diffseg_nnunet.dataset_conversion.preview import preview
from diffseg_nnunet.dataset_conversion.repair import renumbered
from diffseg_nnunet.dataset_conversion.sources import VolumeFile
from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.raw_dataset import RawDataset
from diffseg_nnunet.verification import UnreadableVolumeError, Volume, of_severity, verify_dataset
from diffseg_nnunet.workspace import Workspace

if TYPE_CHECKING:
    from diffseg_nnunet.dataset_conversion.sources import Read

SIZE = (5, 6, 7)


class LiverConverter(TreeConverter):
    """What a third party writes: all of it is description."""

    format_name = "livers"
    title = "Livers of one clinic"
    expects = """\
livers/
    scans/p01.nii.gz
    masks/p01.nii.gz
    more/p77.nii.gz      unlabelled; may be missing"""
    licence = "CC0"
    dataset_name = "Livers"
    labels = {"liver": 6, "tumour": 9}  # noqa: RUF012
    layouts = (
        Layout(
            "the clinic's folders",
            (
                Part("training", ("scans/{case}",), "masks/{case}", "liver_{case}"),
                Part("unlabelled", ("more/{case}",), None, "liver_{case}", optional=True),
            ),
            case=r"p\d\d",
        ),
    )

    def splits(self, plan: ConversionPlan) -> tuple[SplitScheme, ...]:
        train, val = ("liver_p01", "liver_p02"), ("liver_p03",)
        return (SplitScheme("2/1", ({"train": train, "val": val},), "the clinic"),)


def scan(seed: int) -> sitk.Image:
    image = sitk.GetImageFromArray(np.random.default_rng(seed).normal(40, 100, SIZE).astype(np.float32))
    image.SetSpacing((0.75, 0.8, 2.5))
    image.SetOrigin((-120.0, 33.0, 512.5))
    return image


def mask(image: sitk.Image, dtype: type = np.uint8, values: tuple[int, int] = (6, 9)) -> sitk.Image:
    voxels = np.zeros(SIZE, dtype)
    voxels[1:3], voxels[3:4] = values
    label = sitk.GetImageFromArray(voxels)
    label.CopyInformation(image)
    return label


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three labelled cases, and one without a label."""
    folder = tmp_path / "livers"
    for sub in ("scans", "masks", "more"):
        (folder / sub).mkdir(parents=True)
    for number in (1, 2, 3):
        sitk.WriteImage(scan(number), folder / f"scans/p0{number}.nii.gz")
        sitk.WriteImage(mask(scan(number)), folder / f"masks/p0{number}.nii.gz")
    sitk.WriteImage(scan(77), folder / "more/p77.nii.gz")
    return folder


def run(plan: ConversionPlan, workspace: Workspace, **changes: object) -> ConversionReport:
    return convert(plan, **{"dataset_id": 3, "workspace": workspace, "workers": 2, **changes})


def plan_of(source: Path) -> ConversionPlan:
    return LiverConverter().plan(source)


def voxels(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(path))


# --- what is written and told -----------------------------------------------------------------------------------------


def test_a_converter_that_is_all_description(source: Path, workspace: Workspace) -> None:
    report = run(plan_of(source), workspace, record={"format": "livers"})
    assert report.folder.name == "Dataset003_Livers"
    assert report.cases == {"training": 3, "unlabelled": 1, "test": 0}
    assert report.files == {"linked": 4, "encoded": 3}
    assert (report.findings, report.exit_code) == ((), 0)
    dataset = RawDataset.open(report.folder)
    assert dataset.labels == {"background": 0, "liver": 1, "tumour": 2}
    assert dataset.dataset_json["licence"] == "CC0"
    written = voxels(report.folder / "labelsTr/liver_p01.nii.gz")
    np.testing.assert_array_equal(written, voxels_of(mask(scan(1), values=(1, 2))))
    assert verify_dataset(dataset, workers=1) == []


def voxels_of(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image)


def test_the_report_says_what_was_done(source: Path, workspace: Workspace) -> None:
    sitk.WriteImage(mask(scan(2), np.float32), source / "masks/p02.nii.gz")
    report = run(plan_of(source), workspace, record={"format": "livers", "source": "livers"})
    content = json.loads((report.folder / "conversion.json").read_text())
    assert (content["format"], content["source"], content["name"]) == ("livers", "livers", "Livers")
    assert content["settings"] == {"copy": False, "verify": True, "repair": True, "skip_bad": False}
    assert {"source_value": 9, "source_name": "tumour", "value": 2, "name": "tumour"} in content["labels"]
    assert content["cases"]["unlabelled"] == ["liver_p77"]
    assert content["splits"] == {"name": "2/1", "source": "the clinic", "folds": 1}
    assert content["files"] == {"linked": 4, "encoded": 3}
    with (report.folder / "conversion.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["code"], row["case"], row["severity"]) for row in rows] == [("label_float", "liver_p02", "warning")]
    assert content["findings"] == rows
    assert str(source.parent) not in json.dumps({**content, "findings": None, "notes": None})


def test_a_preview_writes_nothing(source: Path, workspace: Workspace, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    told = preview(plan_of(source), dataset_id=3, workspace=workspace, copy=False)
    assert sorted(tmp_path.rglob("*")) == before
    report = run(plan_of(source), workspace)
    assert (told.folder, told.cases, told.files) == (report.folder, report.cases, report.files)
    masks = sum(path.stat().st_size for path in (source / "masks").iterdir())
    assert told.needed == masks
    with pytest.raises(BadInputError, match="is taken by"):
        preview(plan_of(source), dataset_id=3, workspace=workspace, copy=False)


def test_splits_are_written_and_installed(source: Path, workspace: Workspace) -> None:
    report = run(plan_of(source), workspace)
    expected = [{"train": ["liver_p01", "liver_p02"], "val": ["liver_p03"]}]
    installed = workspace.preprocessed / "Dataset003_Livers/splits_final.json"
    assert json.loads((report.folder / "splits_final.json").read_text()) == expected
    assert json.loads(installed.read_text()) == expected


def test_splits_that_are_there_stay(source: Path, workspace: Workspace) -> None:
    installed = workspace.preprocessed / "Dataset003_Livers/splits_final.json"
    installed.parent.mkdir(parents=True)
    installed.write_text("[]")
    report = run(plan_of(source), workspace)
    assert installed.read_text() == "[]"
    assert "was there already and stays" in report.notes[-1]


def test_what_nobody_looked_for_is_ignored(source: Path, workspace: Workspace) -> None:
    plan = plan_of(source)
    cases = tuple(replace(case, unannotated=("tumour",)) if "p02" in case.identifier else case for case in plan.cases)
    report = run(replace(plan, cases=cases, labels={**plan.labels, "ignore": 3}), workspace)
    assert np.unique(voxels(report.folder / "labelsTr/liver_p01.nii.gz")).tolist() == [0, 1, 2]
    assert np.unique(voxels(report.folder / "labelsTr/liver_p02.nii.gz")).tolist() == [1, 2, 3]


def test_the_converter_of_the_handbook(tmp_path: Path, workspace: Workspace) -> None:
    """CONTRIBUTING.md's example, and the test that stands beside it."""
    handbook = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    converter, test = re.findall(r"```python\n(.*?)```", handbook.split("## A new converter")[1], re.DOTALL)

    def tree(root: Path) -> None:
        for folder in ("train/img", "train/seg"):
            (root / folder).mkdir(parents=True)
        sitk.WriteImage(scan(1), root / "train/img/s001.nii.gz")
        sitk.WriteImage(mask(scan(1), values=(6, 1)), root / "train/seg/s001.nii.gz")

    names = {"tree": tree, "voxels": voxels, "convert": convert, "Workspace": Workspace, "Path": Path, "np": np}
    exec(converter, names)
    exec(test, names)
    names["test_labels_get_their_numbers"](tmp_path)


# --- what is mended ---------------------------------------------------------------------------------------------------


def jittered(source: Path, folder: str, name: str, offset_mm: float) -> Path:
    path = source / folder / name
    image = sitk.ReadImage(path)
    image.SetOrigin([value + offset_mm for value in image.GetOrigin()])
    sitk.WriteImage(image, path)
    return path


def test_a_jittered_label_gets_its_images_header(source: Path, workspace: Workspace) -> None:
    path = jittered(source, "masks", "p02.nii.gz", 5e-4)
    before = path.read_bytes()
    plan = replace(plan_of(source), labels={"background": 0, **{f"s{value}": value for value in range(1, 10)}})
    plan = replace(plan, source_labels=plan.labels)
    report = run(plan, workspace)
    of_cases = [finding for finding in report.findings if finding.case]
    assert [(finding.code, finding.case) for finding in of_cases] == [("label_jitter", "liver_p02")]
    assert report.files == {"linked": 6, "encoded": 1}
    assert report.exit_code == 1
    image = sitk.ReadImage(report.folder / "imagesTr/liver_p02_0000.nii.gz")
    label = sitk.ReadImage(report.folder / "labelsTr/liver_p02.nii.gz")
    assert label.GetOrigin() == image.GetOrigin()
    np.testing.assert_array_equal(voxels_of(label), voxels(path))
    assert path.read_bytes() == before


def test_jittered_channels_get_the_first_ones_header(source: Path, workspace: Workspace) -> None:
    jittered(source, "more", "p77.nii.gz", 0)
    second = source / "more/p78.nii.gz"
    sitk.WriteImage(sitk.ReadImage(source / "more/p77.nii.gz"), second)
    jittered(source, "more", "p78.nii.gz", -9e-4)
    plan = plan_of(source)
    pool = next(case for case in plan.cases if case.identifier == "liver_p77")
    pool = replace(pool, images=(*pool.images, VolumeFile(second)))
    plan = replace(plan, cases=(pool,), channel_names={0: "T1", 1: "T2"}, splits=())
    report = run(plan, workspace)
    assert [finding.code for finding in report.findings] == ["channel_jitter"]
    assert report.files == {"linked": 1, "encoded": 1}
    origins = {
        sitk.ReadImage(report.folder / f"imagesUn/liver_p77_000{channel}.nii.gz").GetOrigin() for channel in (0, 1)
    }
    assert len(origins) == 1


def test_float_labels_become_integers(source: Path, workspace: Workspace) -> None:
    sitk.WriteImage(mask(scan(1), np.float64), source / "masks/p01.nii.gz")
    report = run(plan_of(source), workspace)
    assert [finding.code for finding in report.findings] == ["label_float"]
    label = sitk.ReadImage(report.folder / "labelsTr/liver_p01.nii.gz")
    assert label.GetPixelID() == sitk.sitkUInt8
    np.testing.assert_array_equal(voxels_of(label), voxels_of(mask(scan(1), values=(1, 2))))


def test_nothing_is_mended_where_that_is_not_wanted(source: Path, workspace: Workspace) -> None:
    jittered(source, "masks", "p02.nii.gz", 5e-4)
    sitk.WriteImage(mask(scan(1), np.float32), source / "masks/p01.nii.gz")
    with pytest.raises(ConversionRefusedError, match=r"2 problem.* in 2 case") as refused:
        run(plan_of(source), workspace, repair=False)
    assert sorted(finding.code for finding in refused.value.findings) == ["label_float", "label_jitter"]
    assert list(workspace.raw.iterdir()) == []


def test_renumbering_against_a_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {-3: 0, 0: 1, 5: 2, 70000: 300}
    for dtype in (np.int32, np.float64):
        given = rng.choice(list(values), SIZE).astype(dtype)
        image = renumbered(Volume(tmp_path / "x", sitk.GetImageFromArray(given)), values)
        np.testing.assert_array_equal(voxels_of(image), np.vectorize(values.__getitem__)(given))
        assert image.GetPixelID() == sitk.sitkUInt16
    same = sitk.GetImageFromArray(np.ones(SIZE, np.int16))
    assert renumbered(Volume(tmp_path / "x", same), {0: 0, 1: 1, 2: 5}) is same
    with pytest.raises(UnreadableVolumeError, match=r"values 1, which have no name \(named are 0, 2\)"):
        renumbered(Volume(tmp_path / "x", same), {0: 0, 2: 1})


# --- bad cases --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unreliable:
    """A source whose library fails in a way of its own."""

    path: Path

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self, read: Read) -> sitk.Image:
        raise ValueError("a slice is missing")


def test_bad_cases_are_left_out_on_request(source: Path, workspace: Workspace) -> None:
    path = source / "scans/p03.nii.gz"
    path.write_bytes(path.read_bytes()[:100])
    plan = plan_of(source)
    pool = plan.cases[-1]
    plan = replace(plan, cases=(*plan.cases[:-1], replace(pool, images=(Unreliable(pool.files[0]),))))
    with pytest.raises(ConversionRefusedError, match="--skip-bad"):
        run(plan, workspace)
    assert list(workspace.raw.iterdir()) == []
    report = run(plan, workspace, skip_bad=True)
    assert report.skipped == ("liver_p03", "liver_p77")
    assert "a slice is missing" in report.findings[1].message
    assert report.cases == {"training": 2, "unlabelled": 0, "test": 0}
    assert report.exit_code == 1
    assert RawDataset.open(report.folder).dataset_json["numTraining"] == 2
    assert not (report.folder / "splits_final.json").exists()
    assert "2/1" in report.notes[-1]
    content = json.loads((report.folder / "conversion.json").read_text())
    assert content["skipped"] == ["liver_p03", "liver_p77"]


def test_a_copy_among_the_test_images_is_refused_or_left_out(source: Path, workspace: Workspace) -> None:
    plan = plan_of(source)
    copy = replace(plan.cases[0], identifier="liver_x", role="test")
    plan = replace(plan, cases=(*plan.cases, copy))
    with pytest.raises(ConversionRefusedError, match="2 cases have the same voxels"):
        run(plan, workspace)
    assert list(workspace.raw.iterdir()) == []
    report = run(plan, workspace, skip_bad=True)
    assert len(report.skipped) == 1
    assert sum(report.cases.values()) == 4
    assert not list(report.folder.glob(f"*/{report.skipped[0]}*"))
    assert of_severity(verify_dataset(RawDataset.open(report.folder), workers=1), "error") == []


def test_where_every_case_is_bad_nothing_is_written(source: Path, workspace: Workspace) -> None:
    for path in source.rglob("*.nii.gz"):
        path.write_bytes(b"x")
    with pytest.raises(ConversionRefusedError, match="in 4 case"):
        run(plan_of(source), workspace, skip_bad=True)
    assert list(workspace.raw.iterdir()) == []


# --- without verification ---------------------------------------------------------------------------------------------


def test_without_verification_files_are_linked_unread(source: Path, workspace: Workspace) -> None:
    (source / "scans/p01.nii.gz").write_bytes(b"no volume")
    report = run(plan_of(source), workspace, verify=False)
    assert report.files == {"linked": 4, "encoded": 3}
    assert (report.folder / "imagesTr/liver_p01_0000.nii.gz").read_bytes() == b"no volume"
    np.testing.assert_array_equal(
        voxels(report.folder / "labelsTr/liver_p03.nii.gz"), voxels_of(mask(scan(3), values=(1, 2)))
    )


@pytest.mark.parametrize("kind", ["value", "missing", "circle"])
def test_what_cannot_be_written_unread_is_refused(source: Path, workspace: Workspace, kind: str) -> None:
    plan = plan_of(source)
    if kind == "value":
        sitk.WriteImage(mask(scan(3), values=(6, 7)), source / "masks/p03.nii.gz")
    else:
        (source / "scans/p03.nii.gz").unlink()
    if kind == "circle":
        (source / "scans/p03.nii.gz").symlink_to(source / "scans/p03.nii.gz")
    with pytest.raises(ConversionRefusedError, match="7, which have no name" if kind == "value" else "no such file"):
        run(plan, workspace, verify=False)
    report = run(plan, workspace, verify=False, skip_bad=True)
    assert report.skipped == ("liver_p03",)
    assert not list(report.folder.glob("*/liver_p03*"))


# --- converters that are wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "liver": 2},
        {"liver": 0},
        {},
        {"background": 0, "ignore": 1, "liver": 2},
        {"background": 1, "liver": 2},
    ],
)
def test_a_plan_that_contradicts_itself(source: Path, workspace: Workspace, labels: dict[str, int]) -> None:
    with pytest.raises(StageFailedError, match=r"The converter of 'Livers' is wrong: its label.* Tell its authors"):
        run(replace(plan_of(source), labels=labels), workspace)
    assert not workspace.raw.exists()
