"""Fingerprints no plan can be made from are refused in words."""

from __future__ import annotations

from typing import Any

import pytest

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.planning.fingerprint import check_fingerprint

GOOD: dict[str, Any] = {"spacings": [[2.5, 0.8, 0.8]] * 2, "shapes_after_crop": [[90, 512, 512]] * 2}


def test_a_good_one_passes() -> None:
    check_fingerprint(GOOD, "Dataset001_Good")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spacings": [], "shapes_after_crop": []}, r"Dataset001_Bad has 0 spacing\(s\).*nothing to plan from"),
        ({"spacings": [[1.0, 1.0, 1.0]]}, r"1 spacing\(s\) and 2 shape\(s\)"),
        (
            {"spacings": [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]},
            r"1 case\(s\).*spacing that is not positive, e.g. 0 × 1 × 1 mm",
        ),
        ({"spacings": [[1.0, -1.0, 1.0]] * 2}, r"2 case\(s\).*1 × -1 × 1 mm.*diffseg verify"),
        ({"spacings": [[1.0, float("nan"), 1.0]] * 2}, "nan"),
        ({"shapes_after_crop": [[90, 0, 5]] * 2}, r"shape that is not positive, e.g. 90 × 0 × 5 voxels"),
    ],
)
def test_a_bad_one_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        check_fingerprint(GOOD | changes, "Dataset001_Bad")
