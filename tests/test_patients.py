"""Scans of one patient stay together; without such, folds are nnU-Net's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from diffseg_nnunet.cross_validation import NNUNET_SEED, cross_validation
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.patients import SAME_PATIENT, by_patient, others_of, same_patient

PATIENT_OF_EACH = st.lists(st.integers(0, 6), min_size=2, max_size=20).filter(lambda owners: len(set(owners)) > 1)


def cases_and_groups(owners: list[int]) -> tuple[list[str], list[list[str]]]:
    """Patients with one case are in no group."""
    cases = [f"case_{number:02d}" for number in range(len(owners))]
    groups = [[case for case, owner in zip(cases, owners, strict=True) if owner == each] for each in set(owners)]
    return cases, [group for group in groups if len(group) > 1]


@given(owners=PATIENT_OF_EACH, folds=st.integers(2, 5))
@hypothesis_settings(deadline=None, max_examples=60)
def test_no_patient_is_on_both_sides_and_each_validates_once(owners: list[int], folds: int) -> None:
    cases, groups = cases_and_groups(owners)
    owner_of = dict(zip(cases, owners, strict=True))
    found = cross_validation(cases, folds, groups)
    assert len(found) == min(folds, len(set(owners)))
    assert sorted(case for fold in found for case in fold["val"]) == cases
    for fold in found:
        assert sorted(fold["train"] + fold["val"]) == cases
        assert not {owner_of[case] for case in fold["train"]} & {owner_of[case] for case in fold["val"]}


@given(count=st.integers(2, 30), folds=st.integers(2, 5))
@hypothesis_settings(deadline=None, max_examples=30)
def test_patients_of_one_scan_each_are_divided_as_nnunet_divides_cases(count: int, folds: int) -> None:
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    cases = [f"case_{number:02d}" for number in range(count)]
    stock = generate_crossval_split(cases, seed=NNUNET_SEED, n_splits=min(folds, count))
    stock = [{part: [str(case) for case in members] for part, members in fold.items()} for fold in stock]
    assert cross_validation(cases, folds) == stock
    assert cross_validation(cases, folds, [["case_00", "gone"], ["others"]]) == stock


@given(owners=PATIENT_OF_EACH)
def test_patients_partition_the_cases(owners: list[int]) -> None:
    cases, groups = cases_and_groups(owners)
    patients = by_patient(cases, groups)
    assert sorted(case for patient in patients for case in patient) == cases
    assert len(patients) == len(set(owners))
    assert patients == sorted(patients)
    for patient in patients:
        assert others_of(patient, groups) == set()
        assert others_of(patient[:1], groups) == set(patient[1:])


@pytest.mark.parametrize("entry", ["a, b", [1], ["ab"], [["a", 2]], [["a", "b"], ["b", "c"]], {"a": ["b"]}])
def test_an_entry_that_is_no_list_of_groups(entry: object) -> None:
    with pytest.raises(BadInputError, match=r"'same_patient' in dataset\.json is no list of groups, or names a"):
        same_patient({SAME_PATIENT: entry})


def test_an_entry_and_none() -> None:
    assert same_patient({SAME_PATIENT: [["a", "b"], ["c"]]}) == (("a", "b"), ("c",))
    assert same_patient({}) == ()
