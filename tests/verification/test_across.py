"""What records say against a data set: implausible values, copies, orientations, outliers, labels nobody has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from diffseg_nnunet.verification import CaseRecord, ChannelRecord, Finding, LabelRecord, check_records
from diffseg_nnunet.verification.robust import OUTLIER_Z, robust_z
from diffseg_nnunet.verification.summary import summarise

LPS = (1.0, 0, 0, 0, 1, 0, 0, 0, 1)
LAS = (1.0, 0, 0, 0, -1, 0, 0, 0, 1)
LABELS = {"background": 0, "liver": 1, "tumour": 2}


def channel(minimum: float = -1024, maximum: float = 1800, digest: str = "a", **changes: Any) -> ChannelRecord:
    values = {"mean": -300.0, "percentile_00_5": -1020.0, "median": -500.0, "percentile_99_5": 600.0, **changes}
    return ChannelRecord("16-bit signed integer", minimum, maximum, whole_numbers=True, digest=digest, **values)


def record(case: str = "a", role: str = "unlabelled", **changes: Any) -> CaseRecord:
    channels = changes.pop("channels", (channel(digest=case),))
    plain = CaseRecord(case, role, (90, 512, 512), (3.0, 0.8, 0.8), (0.0, 0, 0), LPS, "LPS", True, channels, None)
    return replace(plain, **changes)


def labelled(case: str, volumes_ml: dict[int, float], digest: str = "", **changes: Any) -> CaseRecord:
    return record(case, "training", label=LabelRecord("8-bit unsigned integer", volumes_ml, digest or case), **changes)


def check(*records: CaseRecord, names: tuple[str, ...] = ("CT",)) -> list[Finding]:
    return check_records(records, names, LABELS)


def only(found: list[Finding], code: str, severity: str = "warning") -> str:
    assert [(finding.code, finding.severity) for finding in found] == [(code, severity)]
    assert found[0].mend
    return found[0].message


def test_sound_records() -> None:
    assert check(labelled("a", {1: 10.0, 2: 3.0}), record("b"), record("c", "test")) == []


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("hu_offset", {"minimum": 0, "maximum": 3071}),
        ("hu_offset", {"minimum": 899, "maximum": 1299, "percentile_99_5": 1290}),  # a window, plus 1024
        ("hu_8bit", {"minimum": 0, "maximum": 255}),
        ("hu_huge", {"minimum": -32768}),
        ("hu_huge", {"maximum": 65535.0}),
    ],
)
def test_numbers_that_are_no_hounsfield_units(code: str, changes: dict[str, float]) -> None:
    odd = record(channels=(channel(**changes),))
    assert "named CT" in only(check(odd), code)
    assert check(odd, names=("T1",)) == []


@pytest.mark.parametrize(
    ("minimum", "maximum"), [(-1024, 3071), (-2048, 3968), (-1000, 2976), (-125, 275), (-3024, 1500), (-80, 2500)]
)
def test_ranges_that_cts_have(minimum: float, maximum: float) -> None:
    assert check(record(channels=(channel(minimum, maximum),))) == []


def test_a_window_is_worth_a_note() -> None:
    clipped = record("a", channels=(channel(-125, 275, "a", percentile_00_5=-125, percentile_99_5=275),))
    message = only(check(clipped, record("b")), "hu_window", "note")
    assert "1 of 2 CTs (channel 0) end sharply within -125 to 275 HU" in message


@pytest.mark.parametrize(
    ("code", "size", "spacing"),
    [
        ("implausible_spacing", (90, 512, 512), (3.0, 0.01, 0.01)),
        ("implausible_spacing", (90, 512, 512), (25.0, 2.0, 2.0)),
        ("anisotropy", (20, 512, 512), (10.0, 0.4, 0.4)),
        ("lost_spacing", (90, 512, 512), (1.0, 1.0, 1.0)),
    ],
)
def test_implausible_spacings(code: str, size: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    assert "'a'" in only(check(record(size=size, spacing_mm=spacing)), code)


@pytest.mark.parametrize(
    ("size", "spacing", "name"),
    [
        ((1, 512, 512), (999.0, 0.7, 0.7), "CT"),
        ((182, 218, 182), (1.0, 1.0, 1.0), "CT"),
        ((512, 512, 90), (1.0, 1.0, 1.0), "T1"),
    ],
)
def test_plausible_spacings(size: tuple[int, ...], spacing: tuple[float, ...], name: str) -> None:
    assert check(record(size=size, spacing_mm=spacing), names=(name,)) == []


@pytest.mark.parametrize(
    ("first", "second", "severity", "words"),
    [
        ("training", "training", "warning", "Where a split parts them"),
        ("training", "unlabelled", "warning", "is pretrained without the unlabelled copy"),
        ("training", "test", "error", "trained on says nothing"),
        ("unlabelled", "test", "warning", "would see a test image"),
    ],
)
def test_copies(first: str, second: str, severity: str, words: str) -> None:
    copies = [record("a", first), record("b", second, channels=record("a").channels), record("c")]
    message = only(check(*copies), "duplicate_case", severity)
    assert "a (images" in message
    assert words in message


def test_copies_with_other_labels_and_what_is_no_copy() -> None:
    twin = labelled("b", {1: 1.0, 2: 1.0}, channels=record("a").channels)
    assert "Their labels differ" in only(check(labelled("a", {1: 1.0, 2: 1.0}), twin), "duplicate_case")
    same_label = [labelled(case, {1: 1.0, 2: 1.0}, digest="same") for case in "ab"]
    assert check(*same_label) == []
    empty = channel(0, 0, "empty")
    two_channels = [record(case, channels=(channel(digest=case), empty)) for case in "ab"]
    assert check(*two_channels, names=("T1", "FLAIR")) == []
    assert check(*(record(case, channels=(empty,)) for case in "ab")) == []


def test_mixed_orientations_are_listed() -> None:
    turned = record("c", direction=LAS, orientation="LAS")
    message = only(check(record("a"), record("b"), turned), "mixed_orientations")
    assert "2 LPS, 1 LAS; not LPS are c." in message
    assert "left and right exchanged" in message
    assert "mirror" in only(check(turned), "mirrored_axes", "note")
    assert check(record("a"), record("b", orientation="oblique")) == []


def test_a_spacing_unlike_the_others() -> None:
    alike = [record(f"c{number}", spacing_mm=(3.0, 0.7 + number / 100, 0.7 + number / 100)) for number in range(9)]
    message = only(check(*alike, record("odd", spacing_mm=(3.0, 4.0, 4.0))), "spacing_outlier", "note")
    assert "'odd' is far from the others' along y and x" in message


def test_a_label_that_nobody_has() -> None:
    assert "'tumour' (2) occurs in none of 2" in only(
        check(labelled("a", {1: 3.0}), labelled("b", {})), "label_never_occurs"
    )
    region = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    assert check_records([labelled("a", {1: 3.0, 2: 1.0})], ["CT"], region) == []


@given(st.lists(st.floats(0.01, 1e4), min_size=8, max_size=30), st.floats(0.01, 100))
def test_robust_z_is_that_of_scipy_and_has_no_unit(values: list[float], unit: float) -> None:
    logarithms = np.log(values)
    spread = max(stats.median_abs_deviation(logarithms, scale="normal"), 0.1)
    expected = (logarithms - np.median(logarithms)) / spread
    np.testing.assert_allclose(robust_z(values), expected, rtol=2e-4, atol=1e-9)
    np.testing.assert_allclose(robust_z([value * unit for value in values]), robust_z(values), rtol=1e-6, atol=1e-6)
    assert not robust_z(values[:7]).any()
    assert OUTLIER_Z == 3.5


def test_a_summary() -> None:
    cases = [labelled(f"c{number}", {1: 100.0 + number, 2: 5.0} if number else {1: 100.0}) for number in range(9)]
    records = [*cases, labelled("big", {1: 900.0, 2: 5.0}), record("u", size=(1, 512, 512), orientation="RAS")]
    summary = summarise(records, ["CT"], {**LABELS, "both": [1, 2], "nobody": 3})
    assert summary.cases == {"training": 10, "unlabelled": 1, "test": 0}
    assert summary.orientations == {"LPS": 10, "RAS": 1}
    assert summary.size_outliers == {"u": ["z"]}
    assert (summary.size["z"].lowest, summary.size["z"].median, summary.size["z"].highest) == (1, 90, 90)
    liver, tumour, both, nobody = summary.labels
    assert (liver.cases, liver.outliers, liver.volume_ml.median) == (10, (("big", 900.0),), 104.5)
    assert (tumour.cases, tumour.outliers) == (9, ())
    assert (both.values, both.volume_ml.highest) == ((1, 2), 905.0)
    assert (nobody.cases, nobody.volume_ml) == (0, None)
    assert summary.channels[0].minimum.median == -1024
    assert "3.5 robust" in summary.to_json()["outlier_rule"]
