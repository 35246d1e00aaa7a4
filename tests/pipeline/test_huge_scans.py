"""A scan that memory does not suffice for is set aside, and the others are done."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffseg_nnunet.coordinates.body import AxisRange
from diffseg_nnunet.inference.case_by_case import Steps, in_turn
from diffseg_nnunet.pipeline import coordinates
from diffseg_nnunet.pipeline.reporter import Silent
from diffseg_nnunet.raw_dataset import Case


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    found = [Case(name, (tmp_path / f"{name}.nii.gz",), None) for name in ("a", "huge", "z")]
    for case in found:
        case.images[0].touch()
    return found


@pytest.mark.parametrize("overlap", [False, True])
def test_a_huge_scan_is_not_segmented(cases: list[Case], overlap: bool) -> None:
    predicted = []

    def predict(case: Case) -> Case:
        if case.identifier == "huge":
            np.empty(1 << 60, np.float32)  # more than any machine has
        return case

    steps = Steps(lambda case: case, predict, lambda case, _: predicted.append(case.identifier))
    failed = in_turn(cases, steps, overlap)
    assert [(case.case, "the memory does not suffice" in case.reason) for case in failed] == [("huge", True)]
    assert predicted == ["a", "z"]


def test_a_huge_scan_is_set_aside(tmp_path: Path, cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    def predict(_model: Any, case: Case, _path: Path) -> dict[str, AxisRange]:
        if case.identifier == "huge":
            np.empty(1 << 60, np.float32)  # more than any machine has
        return {"superior": AxisRange(0.0, 50.0, 100.0, 100.0, 1.0, 2.0)}

    monkeypatch.setattr(coordinates, "_predict", predict)
    output, record = tmp_path / "maps", {"cases": {}}
    output.mkdir()
    failed = coordinates._predict_missing(SimpleNamespace(reporter=Silent()), None, cases, output, record)
    assert [(case.case, "not enough memory" in case.reason) for case in failed] == [("huge", True)]
    assert sorted(record["cases"]) == ["a", "z"]
