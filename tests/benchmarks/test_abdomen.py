"""No training case is a held-out one, and the splits are the same on every machine."""

from __future__ import annotations

import abdomen


def test_training_and_held_out_cases_are_disjoint():
    assert not set(abdomen.TRAINING) & set(abdomen.HELD_OUT)
    assert (len(abdomen.TRAINING), len(abdomen.HELD_OUT)) == (14, 10)


def test_openkbp_draw_does_not_depend_on_the_order():
    cases = [f"okbp_{number:03d}" for number in range(200)]
    drawn = abdomen.openkbp_held_out(cases)
    assert drawn == abdomen.openkbp_held_out(cases[::-1])
    assert len(set(drawn)) == abdomen.HELD_OUT_OPENKBP


def test_splits_name_training_cases_only_and_every_one_of_them():
    folds = abdomen.splits()
    named = {case for fold in folds for part in fold.values() for case in part}
    assert named == {f"btcv{number}" for number in abdomen.TRAINING}
    assert all(not set(fold["train"]) & set(fold["val"]) for fold in folds)
    assert [len(fold["train"]) for fold in folds] == [12] + [abdomen.FEW_CASES] * abdomen.FEW_FOLDS
    assert all("btcv0023" not in fold["train"] for fold in folds[1:])


def test_every_organ_has_a_value():
    assert list(abdomen.LABELS.values()) == list(range(14))
    assert abdomen.LABELS["left_kidney"] == 3
