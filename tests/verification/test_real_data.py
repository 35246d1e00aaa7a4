"""No error and no false alarm on real scans, nor on the phantom; and what is really odd in them is told."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from diffseg_nnunet.phantom import LABELS, write_phantom
from diffseg_nnunet.raw_dataset import RawDataset
from diffseg_nnunet.verification import DatasetExamination, examine_dataset

SHARED_DATA = Path(os.environ.get("DIFFSEG_TEST_DATA") or Path(__file__).resolve().parents[2] / "../shared/data")
CASES = 10


def raw(
    folder: Path, channel: str, labels: dict[str, int], cases: Sequence[tuple[Path, Path | None]]
) -> DatasetExamination:
    """Link images and labels (None: unlabelled) as a raw data set, and examine it."""
    for name in ("imagesTr", "labelsTr", "imagesUn"):
        (folder / name).mkdir(parents=True)
    for number, (image, label) in enumerate(cases):
        (folder / ("imagesUn" if label is None else "imagesTr") / f"c{number}_0000.nii.gz").symlink_to(image.resolve())
        if label is not None:
            (folder / "labelsTr" / f"c{number}.nii.gz").symlink_to(label.resolve())
    content = {
        "channel_names": {"0": channel},
        "labels": labels,
        "numTraining": sum(label is not None for _, label in cases),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return examine_dataset(RawDataset.open(folder), workers=2)


def shared(name: str) -> Path:
    if not (SHARED_DATA / name).is_dir():
        pytest.skip(f"{SHARED_DATA / name} is not there")
    return SHARED_DATA / name


def codes(examination: DatasetExamination) -> set[tuple[str, str]]:
    return {(finding.code, finding.severity) for finding in examination.findings}


def test_btcv(tmp_path: Path) -> None:
    source = shared("BTCV_3mm") / "RawData/Training"
    images = sorted((source / "img").glob("*.nii.gz"))[:CASES]
    cases = [(image, source / "label" / image.name.replace("img", "label")) for image in images]
    labels = {"background": 0, **{f"organ_{value}": value for value in range(1, 14)}}
    examination = raw(tmp_path / "Dataset001_BTCV", "CT", labels, cases)
    assert codes(examination) == {("hu_window", "note")}
    assert {record.orientation for record in examination.records} == {"LPS"}
    assert {record.spacing_mm for record in examination.records} == {(3.0, 3.0, 3.0)}
    livers = [record.label.volumes_ml[6] for record in examination.records]
    assert 800 < min(livers) < max(livers) < 3500


def test_hippocampus(tmp_path: Path) -> None:
    source = shared("Task04_Hippocampus")
    names = [path.name for path in sorted((source / "imagesTr").glob("hip*.nii.gz"))[:CASES]]
    if (source / "labelsTr/hippocampus_243.nii.gz").is_file():
        names.append("hippocampus_243.nii.gz")
    cases = [(source / "imagesTr" / name, source / "labelsTr" / name) for name in names]
    labels = {"background": 0, "anterior": 1, "posterior": 2}
    examination = raw(tmp_path / "Dataset002_Hippocampus", "MRI", labels, cases)
    assert codes(examination) - {("label_float", "warning")} == set()
    assert [finding.case for finding in examination.findings] == [f"c{CASES}"] * (len(names) > CASES)


def test_openkbp_and_a_ct_of_full_resolution(tmp_path: Path) -> None:
    source = shared("OpenKBP")
    images = sorted((source / "images").glob("*.nii.gz"))[: 2 * CASES]
    cases = [(image, label if (label := source / "labels" / image.name).is_file() else None) for image in images]
    cases += [(path, None) for path in sorted((SHARED_DATA / "CT_fullres").glob("*.nii.gz"))]
    labels = json.loads((source / "labels.json").read_text())
    examination = raw(tmp_path / "Dataset003_OpenKBP", "CT", labels, cases)
    assert codes(examination) <= {("spacing_outlier", "note")}
    assert len(examination.records) == len(cases)


def test_the_phantom(tmp_path: Path) -> None:
    write_phantom(tmp_path / "phantom", labelled=CASES, unlabelled=0, test=0)
    images = sorted((tmp_path / "phantom/images").iterdir())
    cases = [(image, tmp_path / "phantom/labels" / image.name) for image in images]
    assert codes(raw(tmp_path / "Dataset004_Phantom", "CT", LABELS, cases)) == set()
