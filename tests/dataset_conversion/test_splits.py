"""Published divisions as they were published, and what holds for every division."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import KFold, train_test_split

from diffseg_nnunet.dataset_conversion import splits
from diffseg_nnunet.dataset_conversion.description import ConversionPlan, SourceCase, SplitScheme
from diffseg_nnunet.dataset_conversion.sources import VolumeFile
from diffseg_nnunet.errors import BadInputError

BTCV = [f"{number:04d}" for number in [*range(1, 11), *range(21, 41)]]
# TransUNet's lists_Synapse/test_vol.txt, MONAI's datalists, and the two cross-validations, as in their publications
SYNAPSE_TEST = "0001 0002 0003 0004 0008 0022 0025 0029 0032 0035 0036 0038"
SYNAPSE_TRAINING = "0005 0006 0007 0009 0010 0021 0023 0024 0026 0027 0028 0030 0031 0033 0034 0037 0039 0040"
MONAI_TRAINING = """0001 0002 0003 0004 0005 0006 0007 0008 0009 0010
    0021 0022 0023 0024 0025 0026 0027 0028 0029 0030 0031 0032 0033 0034"""
MONAI_VALIDATION = "0035 0036 0037 0038 0039 0040"
MONAI_FOLDS = """0035 0036 0037 0038 0039 0040
    0029 0030 0031 0032 0033 0034
    0023 0024 0025 0026 0027 0028
    0007 0008 0009 0010 0021 0022
    0001 0002 0003 0004 0005 0006"""


def published() -> dict[str, SplitScheme]:
    return {scheme.name: scheme for scheme in splits.btcv(lambda number: f"{number:04d}")}


def test_the_order_begins_with_what_13_organ_papers_use() -> None:
    assert list(published()) == ["24/6", "18/12", "24/6-6-labels", "monai-5-fold", "nnunet-5-fold", "vox2vec-5-fold"]
    assert all(scheme.source for scheme in published().values())


@pytest.mark.parametrize(
    ("name", "training", "validation"),
    [
        ("18/12", SYNAPSE_TRAINING, SYNAPSE_TEST),
        ("24/6", MONAI_TRAINING, MONAI_VALIDATION),
        ("24/6-6-labels", "0001 0002 0003 0004 0005 0006", MONAI_VALIDATION),
    ],
)
def test_single_divisions_of_btcv(name: str, training: str, validation: str) -> None:
    (fold,) = published()[name].folds
    assert list(fold["train"]) == training.split()
    assert list(fold["val"]) == validation.split()


def test_monai_folds_of_btcv() -> None:
    folds = published()["monai-5-fold"].folds
    assert [list(fold["val"]) for fold in folds] == [line.split() for line in MONAI_FOLDS.splitlines()]
    assert all(sorted((*fold["train"], *fold["val"])) == BTCV for fold in folds)


def test_nnunet_folds_of_btcv_are_those_of_its_rule() -> None:
    parts = KFold(5, shuffle=True, random_state=12345).split(BTCV)
    expected = [([BTCV[i] for i in train], [BTCV[i] for i in val]) for train, val in parts]
    folds = published()["nnunet-5-fold"].folds
    assert [(list(fold["train"]), list(fold["val"])) for fold in folds] == expected
    assert [dict(fold) for fold in splits.k_fold(BTCV)[0].folds] == [dict(fold) for fold in folds]


def test_vox2vec_folds_of_btcv_are_those_of_its_rule() -> None:
    for fold, (train, test) in zip(
        published()["vox2vec-5-fold"].folds, KFold(5, shuffle=True, random_state=42).split(BTCV), strict=True
    ):
        train, stopping = train_test_split([BTCV[i] for i in train], test_size=1, random_state=42)
        assert list(fold["val"]) == [BTCV[i] for i in test]
        assert list(fold["train"]) == sorted(train)
        assert not {*stopping} & splits.cases_of(SplitScheme("", (fold,), ""))


def test_no_published_division_leaks() -> None:
    for scheme in published().values():
        assert splits.cases_of(scheme) <= set(BTCV)
        for fold in scheme.folds:
            assert fold["train"]
            assert fold["val"]
            assert not {*fold["train"]} & {*fold["val"]}


def test_a_division_is_offered_whole_or_not_at_all() -> None:
    there = [case for case in BTCV if case not in ("0033", "0034")]
    offered, lacking = splits.divided(published().values(), there)
    assert [scheme.name for scheme in offered] == ["24/6-6-labels"]
    assert lacking["24/6"] == ["0033", "0034"]
    assert lacking["18/12"] == ["0033", "0034"]


CASES = st.sets(st.text("abcdefgh0123456789_", min_size=1, max_size=6), min_size=2, max_size=25)


@settings(deadline=None, max_examples=30)
@given(cases=CASES, folds=st.integers(2, 8), extra=st.integers(0, 4))
def test_folds_divide_the_cases(cases: set[str], folds: int, extra: int) -> None:
    always = [f"ALWAYS{number}" for number in range(extra)]
    (scheme,) = splits.k_fold(cases, folds, always)
    validation = [case for fold in scheme.folds for case in fold["val"]]
    assert sorted(validation) == sorted(cases)
    assert len(scheme.folds) == min(folds, len(cases))
    for fold in scheme.folds:
        assert {*fold["train"]} == (cases | {*always}) - {*fold["val"]}
        assert len(fold["train"]) == len({*fold["train"]})


@settings(deadline=None, max_examples=30)
@given(cases=CASES, seed=st.integers(0, 5))
def test_few_labels_are_nested_and_never_leak(cases: set[str], seed: int) -> None:
    (scheme,) = splits.k_fold(cases)
    largest = min(len(fold["train"]) for fold in scheme.folds)
    nested = [splits.few_labels(scheme, count, seed=seed) for count in range(1, largest + 1)]
    for count, few in enumerate(nested, start=1):
        for fold, whole in zip(few.folds, scheme.folds, strict=True):
            assert len({*fold["train"]}) == count
            assert {*fold["train"]} <= {*whole["train"]}
            assert fold["val"] == whole["val"]
    for fewer, more in pairwise(nested):
        assert all({*a["train"]} <= {*b["train"]} for a, b in zip(fewer.folds, more.folds, strict=True))


def test_one_division_becomes_several_draws() -> None:
    few = splits.few_labels(published()["24/6"], 6)
    assert len(few.folds) == 5
    assert len({fold["train"] for fold in few.folds}) == 5
    assert {fold["val"] for fold in few.folds} == {tuple(MONAI_VALIDATION.split())}


def test_too_few_cases_make_no_division() -> None:
    assert splits.k_fold(["a"]) == ()
    assert splits.one_fold("official", ["a"], [], "x") == ()
    with pytest.raises(BadInputError, match="25 cases cannot be drawn from the 24 training cases of '24/6'"):
        splits.few_labels(published()["24/6"], 25)


def plan(extra: dict | None = None) -> ConversionPlan:
    file = VolumeFile(Path("x.nii.gz"))
    cases = tuple(SourceCase(case, (file,), file, "training") for case in BTCV)
    return ConversionPlan("X", {0: "CT"}, {}, cases, extra=extra or {}, splits=tuple(published().values()))


def test_a_division_is_chosen_by_name() -> None:
    assert splits.chosen(plan(), None).name == "24/6"
    assert splits.chosen(plan(), "18/12").name == "18/12"
    assert splits.chosen(plan(), "18/12:n=3").name == "18/12:n=3"
    assert splits.chosen(ConversionPlan("X", {}, {}, ()), None) is None
    for wrong in ("17/13", "18/12:n=", "18/12:n=x", ":n=3", ""):
        with pytest.raises(BadInputError, match=r"is no split of X\. Choose 24/6, 18/12, "):
            splits.chosen(plan(), wrong)


def test_labels_that_a_model_made_are_no_few_labels() -> None:
    made = MONAI_TRAINING.split()[:20]
    few = splits.chosen(plan({splits.PSEUDO_LABELLED: {"cases": made}}), "24/6:n=4")
    assert {fold["train"] for fold in few.folds} == {tuple(MONAI_TRAINING.split()[20:])}
