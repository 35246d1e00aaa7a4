"""FLARE's protocols against the official rules as benchmarks/flare_rules.py restates them, sharing no code."""

from __future__ import annotations

import csv
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from diffseg_nnunet.evaluation.folders import evaluate_folders
from diffseg_nnunet.evaluation.protocols import FLARE_NAMES, FLARE_TOLERANCES_MM, PROTOCOLS, find_protocol
from diffseg_nnunet.evaluation.report import write_report
from diffseg_nnunet.evaluation.scoring import OFFICIAL_SCRIPT_CRASHES
from diffseg_nnunet.evaluation.statistics import Evaluation, ScoreRow

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from flare_rules import CRASH, TOLERANCES, Pair, official_scores, random_pairs, real_pairs

SHARED_DATA = Path(os.environ.get("DIFFSEG_TEST_DATA") or Path(__file__).resolve().parents[2] / "../shared/data")
BTCV = SHARED_DATA / "BTCV_3mm" / "RawData" / "Training" / "label"
LABELS = {name: value for value, name in enumerate(FLARE_TOLERANCES_MM, start=1)}
ORGANS = dict(enumerate(FLARE_TOLERANCES_MM, start=1))


def written(pairs: Iterable[Pair], folder: Path) -> tuple[Path, Path]:
    references, predictions = folder / "references", folder / "predictions"
    for pair in pairs:
        pair.write(references, predictions)
    return predictions, references


def rows_of(evaluation: Evaluation) -> dict[tuple[str, str], ScoreRow]:
    return {(row.case, row.structure): row for row in evaluation.rows}


def assert_official(folders: tuple[Path, Path], revision: str) -> Counter[str]:
    """Every score equals the official one; returns how often each rule was met."""
    predictions, references = folders
    evaluation = evaluate_folders(predictions, references, LABELS, protocol=find_protocol("flare22", revision))
    assert not evaluation.failures
    rows = rows_of(evaluation)
    remarked = {(remark.case, remark.structure) for remark in evaluation.remarks}
    met: Counter[str] = Counter()
    for path in sorted(references.iterdir()):
        case = path.name.removesuffix(".nii.gz")
        for organ, scores in official_scores(path, predictions / path.name, revision).items():
            row = rows[case, ORGANS[organ]]
            assert (scores == CRASH) == ((case, ORGANS[organ]) in remarked)
            if scores == CRASH:
                met["crash"] += 1
                assert np.isnan([row.dsc, row.nsd]).all()
                continue
            # Not approximately: the official numbers, to the last bit.
            assert (row.dsc, row.nsd) == scores, (case, organ)
            met["both empty"] += scores == (1.0, 1.0) and row.reference_ml == 0
            met["invented"] += row.reference_ml == 0 < row.prediction_ml
            met["missed"] += row.prediction_ml == 0 < row.reference_ml
            met["low DSC"] += 0 < row.dsc < 0.2 and row.nsd == 0
            met["low DSC with NSD"] += 0 < row.dsc < 0.2 and row.nsd > 0
            met["between"] += 0 < row.nsd < 1
    return met


def test_the_tolerances_are_the_official_ones() -> None:
    assert tuple(FLARE_TOLERANCES_MM.values()) == TOLERANCES
    assert list(PROTOCOLS["flare23"].tolerances_mm.values()) == [*TOLERANCES, 2]


def test_random_cases_score_as_the_revision_of_2024_scores_them(tmp_path: Path) -> None:
    met = assert_official(written(random_pairs(60), tmp_path), "2024")
    for rule in ("crash", "both empty", "invented", "missed", "low DSC", "between"):
        assert met[rule] > 5, met
    assert met["low DSC with NSD"] == 0


def test_random_cases_score_as_the_revision_of_2022_scores_them(tmp_path: Path) -> None:
    met = assert_official(written(random_pairs(30, seed=1), tmp_path), "2022")
    for rule in ("crash", "both empty", "invented", "missed", "low DSC with NSD", "between"):
        assert met[rule] > 5, met


@pytest.mark.skipif(not BTCV.is_dir(), reason=f"no BTCV_3mm in {SHARED_DATA} (DIFFSEG_TEST_DATA)")
def test_real_labels_score_officially(tmp_path: Path) -> None:
    paths = {path.name.removesuffix(".nii.gz"): path for path in sorted(BTCV.glob("*.nii.gz"))[:4]}
    met = assert_official(written(real_pairs(paths), tmp_path), "2024")
    assert met["between"] > 20


def one_slice(tmp_path: Path, *, predicted: bool) -> tuple[Path, Path]:
    """An aorta on one slice of the reference, and a liver."""
    gt = np.zeros((8, 9, 10), np.uint8)
    gt[2:5, 2:5, 4], gt[2:5, 6:8, 2:8] = 5, 1
    seg = gt if predicted else np.where(gt == 5, 0, gt).astype(np.uint8)
    return written([Pair("a", gt, seg, (1.0, 1.0, 2.0))], tmp_path)


def test_what_stops_the_official_script_is_reported(tmp_path: Path) -> None:
    folders = one_slice(tmp_path, predicted=True)
    evaluation = evaluate_folders(*folders, LABELS, protocol=find_protocol("flare22"))
    (remark,) = evaluation.remarks
    assert (remark.case, remark.structure, remark.text) == ("a", "aorta", OFFICIAL_SCRIPT_CRASHES)
    aorta = rows_of(evaluation)["a", "aorta"]
    assert np.isnan([aorta.dsc, aorta.nsd, aorta.iou, aorta.hd95_mm, aorta.assd_mm]).all()
    assert aorta.reference_ml == pytest.approx(0.018)
    assert evaluation.overall.dsc.mean == 1.0  # of the other twelve
    clean = evaluate_folders(*folders, LABELS, protocol=find_protocol("flare-clean"))
    assert not clean.remarks
    assert rows_of(clean)["a", "aorta"].dsc == 1.0


@pytest.mark.parametrize(("revision", "crashes"), [("2024", False), ("2022", True)])
def test_a_missed_structure_of_one_slice(tmp_path: Path, revision: str, crashes: bool) -> None:
    folders = one_slice(tmp_path, predicted=False)
    evaluation = evaluate_folders(*folders, LABELS, protocol=find_protocol("flare22", revision))
    assert bool(evaluation.remarks) == crashes
    np.testing.assert_equal(rows_of(evaluation)["a", "aorta"].dsc, np.nan if crashes else 0.0)


def tube(length: int) -> np.ndarray:
    """An aorta, IVC, esophagus and spleen along the file's third axis, from slice 2."""
    labels = np.zeros((12, 12, 14), np.uint8)
    for place, value in enumerate((5, 6, 10, 3)):
        labels[1 + 2 * place : 3 + 2 * place, 2:8, 2 : 2 + length] = value
    return labels


def test_tubes_count_within_the_slices_of_the_reference_but_the_last(tmp_path: Path) -> None:
    reference, longer = tube(5), tube(9)
    wrong_last = reference.copy()
    wrong_last[:, :, 6] = 0
    spacing = (1.0, 1.0, 10.0)
    pairs = (Pair("longer", reference, longer, spacing), Pair("wrong_last", reference, wrong_last, spacing))
    folders = written(pairs, tmp_path)
    official = rows_of(evaluate_folders(*folders, LABELS, protocol=find_protocol("flare22")))
    clean = rows_of(evaluate_folders(*folders, LABELS, protocol=find_protocol("flare-clean")))
    for organ in ("aorta", "inferior vena cava", "esophagus"):
        assert official["longer", organ].dsc == clean["longer", organ].dsc == 1.0
        assert official["longer", organ].nsd == clean["longer", organ].nsd == 1.0
        assert official["longer", organ].volume_error_relative == pytest.approx(0.8)
        assert official["wrong_last", organ].dsc == 1.0
        assert clean["wrong_last", organ].dsc == pytest.approx(8 / 9)
    for rows, digits in ((official, 4), (clean, 12)):
        assert rows["longer", "spleen"].dsc == pytest.approx(10 / 14, abs=10**-digits)
    assert official["longer", "spleen"].dsc == 0.7143


def test_clean_always_computes_nsd_and_rounds_nothing(tmp_path: Path) -> None:
    gt, seg = np.zeros((2, 12, 12, 16), np.uint8)
    gt[:, :, 3:5], seg[:, :, 4:15] = 1, 1
    folders = written([Pair("a", gt, seg, (1.0, 1.0, 1.0))], tmp_path)
    liver = {
        name: rows_of(evaluate_folders(*folders, LABELS, protocol=find_protocol(*name)))["a", "liver"]
        for name in (("flare22",), ("flare22", "2022"), ("flare-clean",))
    }
    clean = liver["flare-clean",]
    assert clean.dsc == pytest.approx(2 / 13)
    assert 0.1 < clean.nsd < 1
    assert (liver["flare22",].dsc, liver["flare22",].nsd) == (0.1538, 0.0)
    assert liver["flare22", "2022"].nsd == np.round(clean.nsd, 4) != clean.nsd


def test_values_are_cast_and_unknown_ones_are_background(tmp_path: Path) -> None:
    gt = np.zeros((6, 6, 6), np.float32)
    gt[1:4, 1:4, 1:4] = 1
    seg = gt * 1.7  # 1 after the cast
    seg[4:, 4:, 4:] = 77  # no organ
    seg[0, 0, 0] = 257 + 256  # wraps around to the liver's 1
    for name, labels in (("references", gt), ("predictions", seg.astype(np.float32))):
        (tmp_path / name).mkdir()
        nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), tmp_path / name / "a.nii.gz")
    folders = tmp_path / "predictions", tmp_path / "references"
    liver = rows_of(evaluate_folders(*folders, LABELS, protocol=find_protocol("flare22")))["a", "liver"]
    assert liver.dsc == np.round(2 * 27 / 55, 4)
    (failure,) = evaluate_folders(*folders, LABELS, protocol=find_protocol("flare-clean")).failures
    assert "not whole numbers" in failure.reason


def test_flare23_compares_equal_sizes_only_and_forgets_positions(tmp_path: Path) -> None:
    labels = {**LABELS, "tumour": 14}
    gt = np.zeros((6, 6, 6), np.uint8)
    gt[1:4, 1:4, 1:4] = 14
    for case, seg, affine in (("moved", gt, np.diag([2.0, 2.0, 2.0, 1.0])), ("cut", gt[:-1], np.eye(4))):
        for name, array, its_affine in (("references", gt, np.eye(4)), ("predictions", seg, affine)):
            (tmp_path / name).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, its_affine), tmp_path / name / f"{case}.nii.gz")
    folders = tmp_path / "predictions", tmp_path / "references"
    evaluation = evaluate_folders(*folders, labels, protocol=find_protocol("flare23"))
    assert [failure.case for failure in evaluation.failures] == ["cut"]
    assert rows_of(evaluation)["moved", "lesion"].reference_ml == pytest.approx(0.027)


def test_flare23_means_and_the_official_table(tmp_path: Path) -> None:
    folders = written(random_pairs(7, seed=3), tmp_path / "maps")
    labels = {**LABELS, "lesion": 14}
    evaluation = evaluate_folders(*folders, labels, protocol=find_protocol("flare23"))
    paths = write_report(evaluation, tmp_path / "report")
    table = list(csv.DictReader(paths["official.csv"].open()))
    columns = [*FLARE_NAMES, "Lesion"]
    assert list(table[0]) == ["Name", *(f"{name}_DSC" for name in columns), *(f"{name}_NSD" for name in columns)]
    assert [row["Name"] for row in table] == [f"random_{case:03d}" for case in range(7)]
    means = {
        name: round(np.mean([float(row[name]) for row in table if row[name]]), 4) for name in table[0] if name != "Name"
    }
    assert {name: evaluation.official[name] for name in means} == means
    for measure in ("DSC", "NSD"):
        organs = [means[f"{name}_{measure}"] for name in FLARE_NAMES]
        assert evaluation.official[f"Organ_{measure}"] == round(np.mean(organs), 4)
    assert not evaluate_folders(*folders, LABELS, protocol=find_protocol("flare22")).official
