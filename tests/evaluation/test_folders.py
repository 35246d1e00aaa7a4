"""Folders of label maps: matching, labels, failures, reports, and agreement with nnU-Net."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from rich.console import Console

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.evaluation.folders import Evaluation, evaluate_folders
from diffseg_nnunet.evaluation.labels import read_label_names, scored_structures
from diffseg_nnunet.evaluation.metrics import ABSENT_STRUCTURE_RULES
from diffseg_nnunet.evaluation.protocols import PROTOCOLS, find_protocol
from diffseg_nnunet.evaluation.report import read_report, write_report
from diffseg_nnunet.evaluation.tables import summary_table

LABELS = {"liver": 1, "spleen": 2, "both": (1, 2)}
SPACING_XYZ = (0.5, 1.0, 3.0)


def write_map(path: Path, labels: np.ndarray, spacing: tuple[float, ...] = SPACING_XYZ, origin: float = 0.0) -> None:
    image = SimpleITK.GetImageFromArray(labels)
    image.SetSpacing(spacing)
    image.SetOrigin((origin,) * 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path))


def organs(shift_x: int = 0) -> np.ndarray:
    labels = np.zeros((12, 16, 24), dtype=np.uint8)
    labels[2:8, 3:12, 4 + shift_x : 14 + shift_x] = 1
    labels[8:11, 3:12, 4:12] = 2
    return labels


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three cases: a perfect one, one whose liver is shifted by two voxels along x, one without spleen."""
    prediction, reference = tmp_path / "prediction", tmp_path / "reference"
    without_spleen = np.where(organs() == 2, 0, organs()).astype(np.uint8)
    for case, predicted in (("a", organs()), ("b", organs(2)), ("c", without_spleen)):
        write_map(reference / f"{case}.nii.gz", organs())
        write_map(prediction / f"{case}.nii.gz", predicted)
    return prediction, reference


def scores(evaluation: Evaluation) -> dict[tuple[str, str], Any]:
    return {(row.case, row.structure): row for row in evaluation.rows}


def test_scores_cases_and_structures(folders: tuple[Path, Path]) -> None:
    evaluation = evaluate_folders(*folders, LABELS, workers=2)
    assert not evaluation.failures
    assert [(row.case, row.structure) for row in evaluation.rows] == [(c, s) for c in "abc" for s in LABELS]
    of = scores(evaluation)
    assert (of["a", "liver"].dsc, of["a", "liver"].nsd, of["a", "liver"].hd95_mm) == (1.0, 1.0, 0.0)
    # Two voxels along x, the fastest axis of the file: 1 mm, so the spacing has met the right axis.
    assert of["b", "liver"].hd95_mm == pytest.approx(1.0)
    assert of["b", "liver"].dsc == pytest.approx(0.8)
    assert of["b", "liver"].reference_ml == pytest.approx(6 * 9 * 10 * 1.5 / 1000)
    assert np.isnan(of["c", "spleen"].hd95_mm)
    assert of["c", "both"].dsc == pytest.approx(2 * 540 / (540 + 540 + 216))
    spleen = next(summary for summary in evaluation.structures if summary.structure == "spleen")
    assert (spleen.dsc.mean, spleen.n_undefined_hd95) == (pytest.approx(2 / 3), 1)
    assert evaluation.overall.dsc.mean == pytest.approx(np.mean([mean.dsc for mean in evaluation.case_means]))
    assert evaluation.overall.dsc.n == 3


def test_workers_do_not_change_the_scores(folders: tuple[Path, Path]) -> None:
    steps: list[tuple[int, int]] = []
    alone = evaluate_folders(*folders, LABELS, workers=1, progress=lambda done, total: steps.append((done, total)))
    np.testing.assert_equal(evaluate_folders(*folders, LABELS, workers=3).rows, alone.rows)
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_an_interrupted_run_stops(folders: tuple[Path, Path]) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_folders(*folders, LABELS, workers=1, progress=interrupt)


def test_the_tolerance_reaches_nsd(folders: tuple[Path, Path]) -> None:
    tight, loose = (evaluate_folders(*folders, LABELS, workers=1, tolerance_mm=mm) for mm in (0.9, 1.1))
    assert scores(tight)["b", "liver"].nsd < scores(loose)["b", "liver"].nsd == 1.0


def test_endings_may_differ(folders: tuple[Path, Path]) -> None:
    prediction, reference = folders
    (prediction / "b.nii.gz").unlink()
    write_map(prediction / "b.nrrd", organs())
    (prediction / "plans.json").write_text("{}")
    assert scores(evaluate_folders(prediction, reference, LABELS, workers=1))["b", "liver"].dsc == 1.0


def test_float_label_maps_are_read(folders: tuple[Path, Path]) -> None:
    write_map(folders[0] / "b.nii.gz", organs().astype(np.float64))
    evaluation = evaluate_folders(*folders, LABELS, workers=1, cases=["b"])
    assert scores(evaluation)["b", "liver"].dsc == 1.0


def damaged(folder: Path, how: str) -> None:
    path = folder / "b.nii.gz"
    match how:
        case "unreadable":
            path.write_bytes(b"not an image")
        case "cut":
            path.write_bytes(path.read_bytes()[:-40])
        case "cut before compression":
            path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
        case "cut uncompressed":
            path.unlink()
            write_map(path.with_name("b.nii"), organs())
            whole = path.with_name("b.nii").read_bytes()
            path.with_name("b.nii").write_bytes(whole[:-100])
        case "size":
            write_map(path, organs()[:-1])
        case "spacing":
            write_map(path, organs(), spacing=(0.5, 1.0, 3.01))
        case "origin":
            write_map(path, organs(), origin=0.5)
        case "unknown":
            write_map(path, np.where(organs() == 2, 4, organs()).astype(np.uint8))
        case "huge":
            write_map(path, np.where(organs() == 2, np.int32(2**30), organs()))
        case "negative":
            write_map(path, organs().astype(np.int16) - 1)
        case "fraction":
            write_map(path, organs() * np.float32(0.5))
        case "nan":
            # SimpleITK reads NaN as 0 from NIfTI, so a file of another kind shows what becomes of it.
            path.unlink()
            write_map(path.with_name("b.mha"), np.where(organs() == 2, np.nan, organs()).astype(np.float32))
        case "flat":
            write_map(path, organs()[4], spacing=(0.5, 1.0))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("unreadable", "b.nii.gz cannot be read"),
        ("cut", "b.nii.gz cannot be read: it is truncated"),
        ("cut before compression", "b.nii.gz cannot be read: it is truncated, 1 of 4608 bytes"),
        ("cut uncompressed", "b.nii cannot be read: it is truncated, 100 of 4608 bytes"),
        ("size", r"size \(24, 16, 11\), its reference \(24, 16, 12\)"),
        ("spacing", r"spacing \(0.5, 1, 3.01\)"),
        ("origin", r"origin \(0.5, 0.5, 0.5\)"),
        ("unknown", "unknown labels: 4"),
        ("huge", "unknown labels: 1073741824"),
        ("negative", "unknown labels: -1"),
        ("fraction", "not whole numbers"),
        ("nan", "not whole numbers"),
        ("flat", "not a 3D label map"),
    ],
)
def test_a_bad_case_is_set_aside(folders: tuple[Path, Path], how: str, reason: str) -> None:
    damaged(folders[0], how)
    evaluation = evaluate_folders(*folders, LABELS, workers=2)
    (failure,) = evaluation.failures
    assert failure.case == "b"
    assert re.search(reason, failure.reason)
    assert str(folders[0]) not in failure.reason
    assert {row.case for row in evaluation.rows} == {"a", "c"}
    assert evaluation.overall.dsc.n == 2


@pytest.mark.parametrize("protocol", ["plain", "flare22"])
def test_a_spacing_that_is_none_is_set_aside(tmp_path: Path, protocol: str) -> None:
    header = b"ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementSpacing = 1e-300 1 1\nElementType = MET_UCHAR\n"
    for folder in ("prediction", "reference"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.mha").write_bytes(header + b"ElementDataFile = LOCAL\n" + bytes([1] * 8))
    evaluation = evaluate_folders(
        tmp_path / "prediction", tmp_path / "reference", {"liver": 1}, protocol=find_protocol(protocol)
    )
    (failure,) = evaluation.failures
    assert "a.mha has the spacing (1e-300, 1, 1) mm" in failure.reason


def test_geometry_may_differ_by_rounding(folders: tuple[Path, Path]) -> None:
    write_map(folders[0] / "b.nii.gz", organs(), spacing=(0.5, 1.0, 3.0005), origin=0.0005)
    assert not evaluate_folders(*folders, LABELS, workers=1).failures


def test_a_folder_of_failures_still_reports(folders: tuple[Path, Path], tmp_path: Path) -> None:
    damaged(folders[0], "unreadable")
    evaluation = evaluate_folders(*folders, LABELS, workers=1, cases=["b"])
    assert (len(evaluation.failures), evaluation.rows, evaluation.overall.dsc.n) == (1, (), 0)
    content = json.loads(write_report(evaluation, tmp_path / "out")["scores.json"].read_text())
    assert content["overall"]["dsc"]["mean"] is None
    assert (tmp_path / "out" / "scores.csv").read_text().startswith("case,structure,dsc")
    summary_table(evaluation)


def test_missing_files_are_named(folders: tuple[Path, Path]) -> None:
    prediction, reference = folders
    (prediction / "a.nii.gz").unlink()
    (reference / "c.nii.gz").unlink()
    with pytest.raises(BadInputError, match=r"1 predictions? .*a\.nii\.gz.*1 references? .*c\.nii\.gz"):
        evaluate_folders(prediction, reference, LABELS, workers=1)
    assert len(evaluate_folders(prediction, reference, LABELS, workers=1, cases=["b"]).case_means) == 1
    with pytest.raises(BadInputError, match=r"a\.nii\.gz"):
        evaluate_folders(prediction, reference, LABELS, workers=1, cases=["a", "b"])
    with pytest.raises(BadInputError, match="nowhere"):
        evaluate_folders(prediction, reference, LABELS, workers=1, cases=["nowhere"])


def test_many_missing_files_are_counted(folders: tuple[Path, Path]) -> None:
    for index in range(15):
        write_map(folders[1] / f"more_{index:02d}.nii.gz", organs())
    with pytest.raises(BadInputError, match=r"15 predictions .*more_09\.nii\.gz and 5 more"):
        evaluate_folders(*folders, LABELS, workers=1)


def test_two_files_of_one_case_are_refused(folders: tuple[Path, Path]) -> None:
    write_map(folders[0] / "a.mha", organs())
    with pytest.raises(BadInputError, match=r"a\.mha, a\.nii\.gz"):
        evaluate_folders(*folders, LABELS, workers=1)


def test_wrong_settings_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match="no folder"):
        evaluate_folders(tmp_path / "missing", folders[1], LABELS, workers=1)
    with pytest.raises(BadInputError, match="no label map"):
        evaluate_folders(tmp_path / "empty", folders[1], LABELS, workers=1)
    with pytest.raises(BadInputError, match="below 0"):
        evaluate_folders(*folders, LABELS, workers=1, tolerance_mm=-1)
    with pytest.raises(BadInputError, match="0 workers"):
        evaluate_folders(*folders, LABELS, workers=0)
    with pytest.raises(BadInputError, match="No case"):
        evaluate_folders(*folders, LABELS, workers=1, cases=[])
    with pytest.raises(BadInputError, match="no structure"):
        evaluate_folders(*folders, {"background": 0, "ignore": 3}, workers=1)


def test_ignored_voxels_are_left_out(folders: tuple[Path, Path]) -> None:
    ignored = organs()
    ignored[organs() == 2] = 3
    write_map(folders[1] / "c.nii.gz", ignored)
    of = scores(evaluate_folders(*folders, {**LABELS, "ignore": 3}, workers=1, cases=["c"]))
    assert set(of) == {("c", name) for name in LABELS}
    assert of["c", "both"].dsc == 1.0


def test_the_report_holds_everything(folders: tuple[Path, Path], tmp_path: Path) -> None:
    damaged(folders[0], "unknown")
    evaluation = evaluate_folders(*folders, LABELS, workers=1, tolerance_mm=2.0, seed=5)
    paths = write_report(evaluation, tmp_path / "new" / "report")
    assert sorted(paths) == sorted(path.name for path in (tmp_path / "new" / "report").iterdir())
    text = paths["scores.json"].read_text()
    assert "NaN" not in text
    assert str(tmp_path) not in text
    content = json.loads(text)
    assert content["settings"]["tolerance_mm"] == 2.0
    assert content["settings"]["absent_structures"] == ABSENT_STRUCTURE_RULES
    assert content["settings"]["labels"] == {"liver": 1, "spleen": 2, "both": [1, 2]}
    assert content["settings"]["interval"]["seed"] == 5
    assert content["failures"][0]["case"] == "b"
    undefined = [row for row in content["rows"] if row["hd95_mm"] is None]
    assert [(row["case"], row["structure"]) for row in undefined] == [("c", "spleen")]


def test_the_tables_have_a_row_per_score_and_per_structure(folders: tuple[Path, Path], tmp_path: Path) -> None:
    evaluation = evaluate_folders(*folders, LABELS, workers=1)
    paths = write_report(evaluation, tmp_path)
    rows = list(csv.DictReader(paths["scores.csv"].open()))
    assert len(rows) == 9
    assert rows[7]["case"] == "c"
    assert rows[7]["hd95_mm"] == ""
    assert float(rows[3]["dsc"]) == pytest.approx(0.8)
    summaries = list(csv.DictReader(paths["summary.csv"].open()))
    assert [row["structure"] for row in summaries] == list(LABELS)
    assert float(summaries[0]["dsc_mean"]) == pytest.approx((1 + 0.8 + 1) / 3)
    assert float(summaries[0]["dsc_ci_low"]) <= float(summaries[0]["dsc_mean"]) <= float(summaries[0]["dsc_ci_high"])
    assert summaries[1]["n_undefined_hd95"] == "1"
    write_report(evaluation, tmp_path)  # a second report replaces the first


def test_the_columns_of_earlier_versions_are_where_they_were(folders: tuple[Path, Path], tmp_path: Path) -> None:
    paths = write_report(evaluate_folders(*folders, LABELS), tmp_path)
    header = paths["scores.csv"].read_text().splitlines()[0]
    assert header.startswith("case,structure,dsc,nsd,hd95_mm,reference_ml,prediction_ml,iou,assd_mm,volume_error_ml,")
    header = paths["summary.csv"].read_text().splitlines()[0].split(",")
    assert header[:2] == ["structure", "dsc_mean"]
    assert header[12:16] == ["hd95_mm_n", "n_undefined_hd95", "n_both_empty", "iou_mean"]


def test_a_report_is_read_as_it_was_written(folders: tuple[Path, Path], tmp_path: Path) -> None:
    evaluation = evaluate_folders(*folders, LABELS, worst=2)
    write_report(evaluation, tmp_path)
    np.testing.assert_equal(asdict(read_report(tmp_path)), asdict(evaluation))


def test_a_report_of_an_earlier_version_is_read(folders: tuple[Path, Path], tmp_path: Path) -> None:
    path = write_report(evaluate_folders(*folders, LABELS), tmp_path)["scores.json"]
    content = json.loads(path.read_text())
    new = ("iou", "assd_mm", "volume_error_ml", "volume_error_relative")
    for part in (*content["rows"], *content["structures"], *content["case_means"], content["overall"]):
        for key in new:
            del part[key]
    for key in ("worst_cases", "remarks", "official"):
        del content[key]
    for key in ("protocol", "structures", "unmatched", "prediction_labels"):
        del content["settings"][key]
    path.write_text(json.dumps(content))
    evaluation = read_report(tmp_path)
    assert np.isnan(evaluation.rows[0].iou)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary_table(evaluation))
    assert "NSD at 1 mm" in console.export_text()


def test_the_worst_cases_are_named_with_their_worst_structure(folders: tuple[Path, Path]) -> None:
    evaluation = evaluate_folders(*folders, {"liver": 1, "spleen": 2}, worst=2)
    assert [(worst.case, worst.structure) for worst in evaluation.worst_cases] == [("c", "spleen"), ("b", "liver")]
    assert evaluation.worst_cases[0].dsc == pytest.approx(0.5)
    assert evaluation.worst_cases[0].structure_dsc == 0.0


def test_predictions_of_another_numbering_are_matched_by_name(folders: tuple[Path, Path]) -> None:
    prediction, reference = folders
    table = np.array([0, 7, 3], dtype=np.uint8)
    for case in "abc":
        image = SimpleITK.ReadImage(str(prediction / f"{case}.nii.gz"))
        write_map(prediction / f"{case}.nii.gz", table[SimpleITK.GetArrayFromImage(image)])
    names = {"Spleen": 3, "LIVER": 7, "heart": 9}
    evaluation = evaluate_folders(prediction, reference, {"liver": 1, "spleen": 2}, prediction_labels=names)
    assert not evaluation.failures
    of = scores(evaluation)
    assert (of["a", "liver"].dsc, of["b", "liver"].dsc, of["c", "spleen"].dsc) == (1.0, pytest.approx(0.8), 0.0)
    settings = evaluation.settings
    assert settings["unmatched"] == {"reference": [], "prediction": ["heart"], "protocol": []}
    assert settings["structures"]["liver"] == {"reference": [1], "prediction": [7], "tolerance_mm": 1.0}
    # On either side only its own labels are known.
    (failure, *_) = evaluate_folders(reference, reference, {"liver": 1, "spleen": 2}, prediction_labels=names).failures
    assert "unknown labels: 1, 2" in failure.reason


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_report_states_its_protocol(folders: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    protocol = find_protocol(name)
    evaluation = evaluate_folders(*folders, {"liver": 1, "spleen": 2}, protocol=protocol)
    content = json.loads(write_report(evaluation, tmp_path)["scores.json"].read_text())
    assert content["settings"]["protocol"]["rules"] == list(protocol.rules())
    assert content["settings"]["absent_structures"] == protocol.absent_structure_rules()
    assert [row["structure"] for row in content["rows"][:2]] == sorted(
        ("liver", "spleen"), key=list(content["settings"]["structures"]).index
    )
    assert set(protocol.structures) == {
        *content["settings"]["unmatched"]["protocol"],
        *(content["settings"]["structures"] if protocol.structures else ()),
    }
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary_table(evaluation))
    text = " ".join(console.export_text().split())
    for rule in protocol.rules():
        assert rule in text


def test_the_table_shows_means_intervals_and_rules(folders: tuple[Path, Path]) -> None:
    labels = {"[odd] name": 1, "spleen": 2}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary_table(evaluate_folders(*folders, labels, workers=1)))
    text = console.export_text()
    for expected in ("[odd] name", "0.933 [0.800, 1.000]", "NSD at 1 mm", "mean over structures", "95%", "no HD95"):
        assert expected in text


def test_dsc_equals_nnunet(tmp_path: Path) -> None:
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    generator = np.random.default_rng(4)
    for side in ("prediction", "reference"):
        write_map(tmp_path / side / "x.nii.gz", generator.integers(0, 5, (6, 9, 10)).astype(np.uint8))
    files = [str(tmp_path / side / "x.nii.gz") for side in ("reference", "prediction")]
    regions = [1, 2, (1, 2, 3)]
    theirs = compute_metrics(*files, SimpleITKIO(), regions, ignore_label=4)["metrics"]
    labels = {"one": 1, "two": 2, "region": (1, 2, 3), "ignore": 4}
    evaluation = evaluate_folders(tmp_path / "prediction", tmp_path / "reference", labels, workers=1)
    assert [row.dsc for row in evaluation.rows] == pytest.approx([theirs[region]["Dice"] for region in regions])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"liver": 1, "spleen": 3}, {"liver": 1, "spleen": 3}),
        ({"background": 0, "liver": 1}, {"liver": 1}),
        ({"0": "background", "1": "liver", "2": "spleen"}, {"liver": 1, "spleen": 2}),
        (
            {"channel_names": {"0": "CT"}, "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}},
            {"whole": (1, 2), "core": 2, "ignore": 3},
        ),
        ({"labels": {"0": "background", "1": "liver"}, "numTraining": 3}, {"liver": 1}),
    ],
)
def test_labels_are_read_by_name(tmp_path: Path, content: dict, expected: dict) -> None:
    (tmp_path / "labels.json").write_text(json.dumps(content))
    labels = read_label_names(tmp_path / "labels.json")
    assert labels == expected
    assert "ignore" not in scored_structures(labels)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"liver": "one"}',
        '{"liver": -1}',
        '{"liver": 1.5}',
        '{"liver": true}',
        '{"liver": false}',
        '{"liver": []}',
        '{"liver": [0, 1]}',
        '{"1": "kidney", "2": "kidney"}',
        '{"background": 0}',
        '{"liver": 1, "ignore": [2, 3]}',
        '{"channel_names": {"0": "CT"}}',
        pytest.param("[" * 100_000, id="nested"),
    ],
)
def test_bad_labels_are_refused_with_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(BadInputError, match=r"labels\.json"):
        read_label_names(tmp_path / "labels.json")


def test_a_missing_file_of_labels_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"labels\.json"):
        read_label_names(tmp_path / "labels.json")
