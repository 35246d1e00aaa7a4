"""The refiner is used for the structures whose validation cases gain, beyond chance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffseg_nnunet.evaluation.statistics import Evaluation, ScoreRow, case_means, summarise_all
from diffseg_nnunet.inference.merging import merged_labels
from diffseg_nnunet.pipeline.refiner_selection import chosen, compare


def evaluation(scores: dict[str, list[float]], first_case: int = 0) -> Evaluation:
    rows = tuple(
        ScoreRow(f"case_{first_case + index}", structure, dsc, dsc, 1.0, 1.0, 1.0)
        for structure, values in scores.items()
        for index, dsc in enumerate(values)
    )
    return Evaluation(rows, (), case_means(rows), summarise_all(rows), {}, ())


def test_structures_that_gain_in_all_folds_are_refined() -> None:
    before = [
        evaluation({"liver": [0.9, 0.8], "vein": [0.5, 0.6], "spleen": [0.7, 0.7]}),
        evaluation({"liver": [0.85], "vein": [0.55], "spleen": [0.7]}, first_case=2),
    ]
    after = [
        evaluation({"liver": [0.92, 0.79], "vein": [0.55, 0.64], "spleen": [0.6, 0.6]}),
        evaluation({"liver": [0.85], "vein": [0.61], "spleen": [0.6]}, first_case=2),
    ]
    comparisons = compare(before, after)
    assert [each.structure for each in comparisons] == ["liver", "vein", "spleen", "mean over structures"]
    vein = comparisons[1]
    assert vein.cases == 3
    assert vein.gain == pytest.approx(0.05)
    assert vein.gain_low == pytest.approx(0.04)
    assert str(vein) == "vein: DSC 0.5500, refined 0.6000, +0.0500 [+0.0400, +0.0600]: refined"
    # the liver's mean gains too, but not beyond chance
    assert comparisons[0].gain > 0
    assert not comparisons[0].helps
    assert chosen(comparisons, overlapping=False) == ("vein",)
    assert chosen(comparisons, overlapping=True) == ()
    assert chosen(compare(before, [evaluation({"liver": [1.0, 1.0], "vein": [1.0, 1.0], "spleen": [1.0, 1.0]})]), True)


def test_one_case_says_nothing() -> None:
    comparisons = compare([evaluation({"liver": [0.5]})], [evaluation({"liver": [0.9]})])
    assert comparisons[0].gain_low is None
    assert chosen(comparisons, overlapping=False) == ()
    assert math.isclose(comparisons[0].gain, 0.4)


def test_chosen_structures_come_from_the_refined_map() -> None:
    plain = np.array([0, 1, 2, 1, 2, 3, 0])
    refined = np.array([2, 0, 2, 2, 3, 1, 3])
    # 2 wherever either says so; what else the refined map says is not taken over
    assert merged_labels(plain, refined, [2]).tolist() == [2, 1, 2, 2, 3, 3, 0]
    assert merged_labels(plain, refined, [1, 2, 3]).tolist() == refined.tolist()
    assert merged_labels(plain, refined, []).tolist() == plain.tolist()
