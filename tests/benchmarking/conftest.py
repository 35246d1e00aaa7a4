"""Evaluations made of given scores, and data sets made of names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from diffseg_nnunet.evaluation.statistics import (
    CaseFailure,
    Evaluation,
    ScoreRow,
    case_means,
    summarise_all,
    summarise_structure,
)
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.workspace import Workspace

Scores = Mapping[str, Mapping[str, float]]
"""Case -> structure -> DSC."""


def evaluation(scores: Scores, failures: Sequence[str] = ()) -> Evaluation:
    """As an evaluation gives it; NSD and HD95 follow from the DSC, so that they can be checked by it."""
    rows = [
        ScoreRow(case, structure, dsc, dsc / 2, 10 * (1 - dsc), 1.0, 1.0, dsc, 1.0, 0.0, 0.0)
        for case, of_case in scores.items()
        for structure, dsc in of_case.items()
    ]
    names = list(dict.fromkeys(row.structure for row in rows))
    return Evaluation(
        tuple(rows),
        tuple(summarise_structure(name, rows) for name in names),
        case_means(rows),
        summarise_all(rows),
        {"protocol": {"name": "plain", "revision": None}, "structures": names},
        tuple(CaseFailure(case, "unreadable") for case in failures),
    )


@pytest.fixture
def named_dataset(tmp_path: Path) -> Callable[..., Project]:
    """A data set of empty files: nothing that looks at names alone reads them."""

    def make(cases: Sequence[str], **entries: object) -> Project:
        workspace = Workspace.locate(tmp_path / "workspace")
        folder = workspace.raw / "Dataset007_Named"
        for name in (*(f"imagesTr/{case}_0000" for case in cases), *(f"labelsTr/{case}" for case in cases)):
            path = folder / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}
        (folder / "dataset.json").write_text(json.dumps({**content, **entries}))
        return Project(workspace, folder.name)

    return make
