"""``diffseg evaluate``: its report and its table agree, and what cannot be compared is refused or set aside."""

from __future__ import annotations

import csv
import json
import re
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Source
    from tests.conftest import CommandLine, Finished


def evaluate(diffseg: CommandLine, source: Source, *options: object) -> Finished:
    folders = ("--prediction", diffseg.folder / "prediction", "--reference", source.labels)
    return diffseg("evaluate", *folders, "--labels", source.names, "-o", "report", *options)


@pytest.fixture
def predicted(diffseg: CommandLine, source: Source) -> Source:
    """Predictions: the references with some voxels changed, more in each case than in the one before."""
    shutil.copytree(source.labels, diffseg.folder / "prediction")
    rng = np.random.default_rng(1)
    for number, path in enumerate(sorted((diffseg.folder / "prediction").iterdir())):
        reference = np.zeros((10, 9, 8), np.uint8)
        reference[2:8, 2:7, 2:6] = 1
        prediction = np.where(rng.random(reference.shape) < 0.05 * (number + 1), 1 - reference, reference)
        source.write(source.labels / path.name, reference)
        source.write(path, prediction.astype(np.uint8))
    return source


def test_report_and_table_agree(diffseg: CommandLine, predicted: Source) -> None:
    finished = evaluate(diffseg, predicted).ok()
    report = diffseg.folder / "report"
    scores = json.loads((report / "scores.json").read_text())
    with open(report / "scores.csv") as stream:
        rows = list(csv.DictReader(stream))
    with open(report / "summary.csv") as stream:
        (summary,) = csv.DictReader(stream)
    mean = np.mean([float(row["dsc"]) for row in rows])
    assert len(rows) == 3
    assert 0.5 < mean < 1
    assert scores["overall"]["dsc"]["mean"] == pytest.approx(mean)
    assert float(summary["dsc_mean"]) == pytest.approx(mean)
    printed = re.search(r"^ *mean over structures +([\d.]+)", finished.out, re.MULTILINE)
    assert printed is not None
    assert printed[1] == f"{mean:.3f}"
    assert re.search(rf"^ *organ +{mean:.3f} \[", finished.out, re.MULTILINE)


def test_a_bad_case_is_set_aside(diffseg: CommandLine, predicted: Source) -> None:
    path = diffseg.folder / "prediction" / "b.nii.gz"
    path.write_bytes(path.read_bytes()[:-40])
    finished = evaluate(diffseg, predicted)
    assert finished.code == 2
    assert "b was set aside: b.nii.gz cannot be read: it is truncated" in finished.out
    scores = json.loads((diffseg.folder / "report" / "scores.json").read_text())
    assert [row["case"] for row in scores["rows"]] == ["a", "c"]


def test_folders_that_do_not_match(diffseg: CommandLine, predicted: Source) -> None:
    (diffseg.folder / "prediction" / "b.nii.gz").unlink()
    (predicted.labels / "c.nii.gz").unlink()
    evaluate(diffseg, predicted).refused(
        "1 predictions are missing", "b.nii.gz", "1 references are missing", "c.nii.gz", "--cases"
    )
    evaluate(diffseg, predicted, "--prediction", "gone").refused("There is no folder gone")
    (diffseg.folder / "file").touch()
    evaluate(diffseg, predicted, "-o", "file/report").refused("Nothing can be written to", "file is no folder", "-o")
    assert not (diffseg.folder / "report").exists()
    evaluate(diffseg, predicted, "--cases", "a").ok()
    evaluate(diffseg, predicted, "--cases", "a", "b").refused("1 predictions are missing", "b.nii.gz")
    scores = json.loads((diffseg.folder / "report" / "scores.json").read_text())
    assert [row["case"] for row in scores["rows"]] == ["a"]


@pytest.mark.parametrize("content", ["{", "[1, 2]", '{"organ": "one"}', '{"background": 0}', None])
def test_labels_that_cannot_be_read(content: str | None, diffseg: CommandLine, predicted: Source) -> None:
    predicted.names.unlink() if content is None else predicted.names.write_text(content)
    evaluate(diffseg, predicted).refused(predicted.names, "Give a JSON file such as")
    assert not (diffseg.folder / "report").exists()


def test_two_predictions_are_compared(diffseg: CommandLine, predicted: Source) -> None:
    better = diffseg.folder / "better"
    shutil.copytree(predicted.labels, better)
    finished = evaluate(diffseg, predicted, "--prediction", better, "--against", diffseg.folder / "prediction").ok()
    report = diffseg.folder / "report"
    comparison = json.loads((report / "comparison.json").read_text())
    (dsc, *_) = comparison["scores"]
    assert (dsc["structure"], dsc["metric"], dsc["wins"], dsc["losses"]) == ("organ", "dsc", 3, 0)
    means = [
        json.loads((folder / "scores.json").read_text())["overall"]["dsc"]["mean"]
        for folder in (report, report / "against")
    ]
    assert dsc["difference"]["mean"] == pytest.approx(means[0] - means[1])
    assert (report / "comparison.csv").is_file()
    assert re.search(r"organ +DSC +\+0\.\d+ \[", finished.out)
    assert "3/0/0" in finished.out
    evaluate(diffseg, predicted).ok()
    assert not (report / "comparison.json").exists()


def test_protocols_labels_and_tolerances(diffseg: CommandLine, predicted: Source) -> None:
    predicted.names.write_text('{"arota": 1}')
    other = diffseg.folder / "dataset.json"
    other.write_text('{"labels": {"background": 0, "heart": 2, "Aorta": 1}}')
    finished = evaluate(diffseg, predicted, "--prediction-labels", other, "--protocol", "flare22", "--worst", 1).ok()
    report = diffseg.folder / "report"
    protocol = json.loads((report / "scores.json").read_text())["settings"]["protocol"]
    assert (protocol["name"], protocol["revision"]) == ("flare22", "2024")
    assert (report / "official.csv").read_text().startswith("Name,Liver_DSC,RK_DSC")
    for expected in (
        "by flare22, revision 2024",
        "not scored, of the prediction: heart",
        "not scored, of the protocol: liver",
        "worst: c, mean DSC",
    ):
        assert expected in finished.out
    evaluate(diffseg, predicted, "--tolerance", "2", "--tolerance", "Aorta=3").ok()
    structures = json.loads((report / "scores.json").read_text())["settings"]["structures"]
    assert structures["arota"]["tolerance_mm"] == 3.0


def test_what_stops_the_official_script_is_a_warning(diffseg: CommandLine, predicted: Source) -> None:
    predicted.names.write_text('{"aorta": 1}')
    path = predicted.labels / "a.nii.gz"
    reference = np.zeros((10, 9, 8), np.uint8)
    reference[4, 2:7, 2:6] = 1
    predicted.write(path, reference)
    finished = evaluate(diffseg, predicted, "--protocol", "flare22").ok()
    assert "a, aorta: the reference has this structure on one slice only" in finished.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--protocol", "flare19"), "There is no protocol 'flare19'"),
        (("--protocol", "btcv", "--revision", "2022"), "has no revision '2022'"),
        (("--tolerance", "two"), "'two' is no tolerance"),
        (("--tolerance", "-1"), "The tolerance -1 mm is below 0"),
        (("--protocol", "flare22"), "No structure is matched by name"),
        (("--against", "gone"), "There is no folder gone"),
    ],
)
def test_wrong_options(diffseg: CommandLine, predicted: Source, options: tuple[str, ...], message: str) -> None:
    evaluate(diffseg, predicted, *options).refused(message)
