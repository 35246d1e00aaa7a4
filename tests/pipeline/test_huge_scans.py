"""A scan that memory does not suffice for is set aside, and the others are done."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffseg_nnunet.coordinates.body import AxisRange
from diffseg_nnunet.pipeline import coordinates
from diffseg_nnunet.pipeline.reporter import Silent
from diffseg_nnunet.raw_dataset import Case


def test_a_huge_scan_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case(name, (tmp_path / f"{name}.nii.gz",), None) for name in ("a", "huge", "z")]
    for case in cases:
        case.images[0].touch()

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
