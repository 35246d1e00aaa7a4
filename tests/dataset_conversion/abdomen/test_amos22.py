"""AMOS22 in its public layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from diffseg_nnunet.workspace import Workspace

from .trees import (
    amos22,
    convert,
    count,
    notes,
    plan,
    refusal,
)


@pytest.mark.parametrize(
    ("modality", "name", "channel", "training", "validation", "test"),
    [
        (None, "AMOS22CT", "CT", ("0001", "0410"), ("0008", "0409"), ("0002", "0500")),
        ("mr", "AMOS22MR", "MR", ("0507",), ("0555",), ("0571",)),
        (
            "both",
            "AMOS22",
            "either_CT_or_MR",
            ("0001", "0410", "0507"),
            ("0008", "0409", "0555"),
            ("0002", "0500", "0571"),
        ),
    ],
)
def test_amos22(
    tmp_path: Path,
    workspace: Workspace,
    modality: str | None,
    name: str,
    channel: str,
    training: tuple[str, ...],
    validation: tuple[str, ...],
    test: tuple[str, ...],
) -> None:
    tree = amos22(tmp_path / "amos22")
    folder = convert("amos22", tree.root, workspace, modality=modality)
    assert folder.name == f"Dataset001_{name}"
    assert json.loads((folder / "dataset.json").read_text())["channel_names"] == {"0": channel}
    for part, numbers in (("Tr", training), ("Va", validation), ("Ts", test)):
        for number in numbers:
            label = None if part == "Ts" else f"labels{part}/amos_{number}"
            target = "Ts" if part == "Ts" else "Tr"
            tree.check(folder, target, f"amos_{number}", f"images{part}/amos_{number}", label)
    assert count(folder, "imagesTr") == len(training) + len(validation)
    assert count(folder, "imagesTs") == len(test)
    official = plan("amos22", tree.root, modality=modality).splits[0]
    assert official.name == "official"
    assert official.folds[0] == {
        "train": tuple(f"amos_{number}" for number in training),
        "val": tuple(f"amos_{number}" for number in validation),
    }


def test_amos22_half_a_download_and_wrong_options(tmp_path: Path) -> None:
    tree = amos22(tmp_path / "amos22")
    for gone in ("imagesVa", "labelsVa", "imagesTs"):
        shutil.rmtree(tree.root / gone)
    said = notes("amos22", tree.root)
    assert "6 image(s) that" in said
    assert "dataset.json lists are not there: amos_0002.nii.gz" in said
    assert [scheme.name for scheme in plan("amos22", tree.root / "labelsTr").splits] == ["2-fold"]
    assert "Choose CT, MR or both" in refusal("amos22", tree.root, modality="PET")
    (tree.root / "imagesTr/amos_0507.nii.gz").unlink()
    (tree.root / "labelsTr/amos_0507.nii.gz").unlink()
    assert "has no labelled MR" in refusal("amos22", tree.root, modality="MR")
    shutil.rmtree(tree.root / "labelsTr")
    assert "2 file(s) have no label" in refusal("amos22", tree.root)


def test_amos22_with_other_labels(tmp_path: Path) -> None:
    tree = amos22(tmp_path / "amos22")
    content = json.loads((tree.root / "dataset.json").read_text())
    content["labels"] = {"0": "background", "1": "liver"}
    (tree.root / "dataset.json").write_text(json.dumps(content))
    assert "has other labels than AMOS22: spleen" in refusal("amos22", tree.root)
