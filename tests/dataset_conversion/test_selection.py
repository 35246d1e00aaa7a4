"""What users choose: labels and their numbers, cases, splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffseg_nnunet.dataset_conversion.description import ConversionPlan, SourceCase, SplitScheme
from diffseg_nnunet.dataset_conversion.selection import (
    choose_splits,
    label_table,
    names_given,
    prepared,
    select_cases,
    select_labels,
)
from diffseg_nnunet.dataset_conversion.sources import VolumeFile
from diffseg_nnunet.errors import BadInputError

NAMES = ("liver", "spleen", "aorta", "pancreas", "stomach")


def case(number: int, role: str = "training", **changes: object) -> SourceCase:
    label = None if role == "unlabelled" else VolumeFile(Path(f"label_{number}.nii.gz"))
    return SourceCase(f"case_{number:02d}", (VolumeFile(Path(f"{number}.nii.gz")),), label, role, **changes)


def plan(count: int = 4, source_labels: Mapping[str, int] | None = None, **changes: object) -> ConversionPlan:
    labels = {"background": 0, **{name: value for value, name in enumerate(NAMES, start=1)}}
    cases = tuple(case(number) for number in range(count))
    return replace(ConversionPlan("Abdomen", {0: "CT"}, labels, cases, source_labels), **changes)


# --- labels -----------------------------------------------------------------------------------------------------------


@given(
    values=st.lists(st.integers(1, 300), min_size=len(NAMES), max_size=len(NAMES), unique=True),
    kept=st.sets(st.sampled_from(NAMES), min_size=1),
    ignored=st.booleans(),
)
def test_a_subset_keeps_the_meaning_of_every_voxel(values: list[int], kept: set[str], ignored: bool) -> None:
    """Whatever value a voxel has in the source, it gets the number of its name if that is kept, else background."""
    source = {"background": 0, **dict(zip(NAMES, values, strict=True)), **({"ignore": 999} if ignored else {})}
    whole = plan(source_labels=source)
    if ignored:
        whole = replace(whole, labels={**whole.labels, "ignore": len(NAMES) + 1})
    chosen = select_labels(whole, kept)
    mapping = chosen.values(chosen.cases[0])
    assert set(mapping) == set(source.values())
    for name, value in source.items():
        expected = chosen.labels[name] if name in kept or name == "ignore" else 0
        assert mapping[value] == expected
    assert sorted(chosen.labels.values()) == list(range(len(chosen.labels)))
    assert [name for name in chosen.labels if name in NAMES] == [name for name in NAMES if name in kept]
    assert ("ignore" in chosen.labels) == ignored
    if ignored:
        assert max(chosen.labels, key=chosen.labels.__getitem__) == "ignore"
    assert select_labels(chosen, kept) == chosen


def test_values_of_a_plan_without_own_source_values_stay_known() -> None:
    chosen = select_labels(plan(), ["spleen"])
    assert chosen.labels == {"background": 0, "spleen": 1}
    assert chosen.values(chosen.cases[0]) == {0: 0, 1: 0, 2: 1, 3: 0, 4: 0, 5: 0}


def test_a_case_with_values_of_its_own_keeps_them() -> None:
    mixed = plan(cases=(case(0), case(1, source_labels={"spleen": 9, "liver": 4})))
    chosen = select_labels(mixed, ["spleen"])
    assert chosen.values(chosen.cases[1]) == {0: 0, 9: 1, 4: 0}


def test_ignore_stays_only_where_it_is_needed() -> None:
    partial = case(1, unannotated=("aorta", "liver"))
    whole = plan(cases=(case(0), partial))
    whole = replace(whole, labels={**whole.labels, "ignore": 6}, source_labels=whole.labels)
    with_liver = select_labels(whole, ["liver", "spleen"])
    assert with_liver.labels == {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
    assert with_liver.values(with_liver.cases[1])[0] == 3
    assert with_liver.cases[1].unannotated == ("liver",)
    without = select_labels(whole, ["spleen"])
    assert without.labels == {"background": 0, "spleen": 1}
    assert without.values(without.cases[1])[0] == 0


def test_labels_that_there_are_not() -> None:
    with pytest.raises(BadInputError, match=r"no label livre\. Did you mean 'liver'\? There are: liver, spleen, aorta"):
        select_labels(plan(), ["livre", "spleen"])
    with pytest.raises(BadInputError, match="No label would be left"):
        select_labels(plan(), ["background"])


def test_the_table_of_labels() -> None:
    chosen = select_labels(plan(1, source_labels={"background": 0, "liver": 6, "spleen": 1}), ["liver"])
    assert label_table(chosen) == [
        (0, "background", 0, "background"),
        (1, "spleen", 0, "background"),
        (6, "liver", 1, "liver"),
    ]
    assert label_table(plan(cases=(case(0, "unlabelled"),))) == []


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    assert names_given("liver, spleen,,liver ", "--labels") == ("liver", "spleen")
    (tmp_path / "cases.txt").write_text("case_01\ncase_02, case_03\n\n")
    assert names_given(f"@{tmp_path / 'cases.txt'}", "--cases") == ("case_01", "case_02", "case_03")
    with pytest.raises(BadInputError, match="--cases names nothing"):
        names_given(" ,", "--cases")
    with pytest.raises(BadInputError, match=r"--cases .*none\.txt cannot be read"):
        names_given(f"@{tmp_path / 'none.txt'}", "--cases")


# --- cases and splits -------------------------------------------------------------------------------------------------


def scheme(name: str, train: str, val: str) -> SplitScheme:
    return SplitScheme(name, ({"train": tuple(train.split()), "val": tuple(val.split())},), "somebody")


def test_cases() -> None:
    whole = plan(splits=(scheme("a", "case_00", "case_01"), scheme("b", "case_00", "case_03")))
    chosen = select_cases(whole, ["case_03", "case_00"])
    assert [each.identifier for each in chosen.cases] == ["case_00", "case_03"]
    assert [each.name for each in chosen.splits] == ["b"]
    assert "left out were dropped: a" in chosen.notes[0]
    with pytest.raises(BadInputError, match=r"no case case_9\. Did you mean 'case_0"):
        select_cases(whole, ["case_9"])


def test_a_published_scheme_comes_first() -> None:
    whole = plan(splits=(scheme("a", "case_00", "case_01"), scheme("b", "case_00 case_02", "case_03")))
    assert [each.name for each in choose_splits(whole, "b").splits] == ["b", "a"]
    few = choose_splits(whole, "b:n=1").splits[0]
    assert all(len(fold["train"]) == 1 and fold["val"] == ("case_03",) for fold in few.folds)
    with pytest.raises(BadInputError, match=r"'c' is no split of Abdomen. Choose a, b, 5-fold"):
        choose_splits(whole, "c")


@pytest.mark.parametrize("count", [2, 3, 5, 11])
def test_five_folds_are_nnunets(count: int) -> None:
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    chosen = choose_splits(plan(count), "5-fold").splits[0]
    expected = generate_crossval_split([f"case_{number:02d}" for number in range(count)], n_splits=min(5, count))
    assert chosen.name == "5-fold"
    assert [{part: list(cases) for part, cases in fold.items()} for fold in chosen.folds] == [
        {part: [str(name) for name in names] for part, names in fold.items()} for fold in expected
    ]


def test_a_few_label_list_takes_the_first_cases() -> None:
    mixed = plan(cases=(case(3), case(1), case(0, "unlabelled"), case(2)))
    (few, *_) = choose_splits(mixed, "n=1").splits
    assert few.folds == ({"train": ("case_01",), "val": ("case_02", "case_03")},)
    assert "the first 1 training case(s) by identifier train, the other 2 validate" in few.source


@pytest.mark.parametrize(("name", "count"), [("n=0", 4), ("n=4", 4), ("n=9", 4), ("5-fold", 1), ("5-fold", 0)])
def test_too_few_cases_for_a_split(name: str, count: int) -> None:
    with pytest.raises(BadInputError, match=rf"There are {count} training case\(s\): too few for the splits '{name}'"):
        choose_splits(plan(count), name)


def test_all_choices_together() -> None:
    chosen = prepared(plan(), labels=["aorta"], cases=["case_00", "case_02", "case_03"], splits="n=2")
    assert chosen.labels == {"background": 0, "aorta": 1}
    assert chosen.splits[0].folds == ({"train": ("case_00", "case_02"), "val": ("case_03",)},)
    assert prepared(plan()) == plan()
