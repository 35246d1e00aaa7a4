"""WORD in its public trees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffseg_nnunet.errors import BadInputError

from .trees import SIZE, Convert, Tree, certain, plan, refusal

WORD_NAMES = (
    "liver spleen left_kidney right_kidney stomach gallbladder esophagus pancreas duodenum colon intestine "
    "adrenal_glands rectum bladder left_femur right_femur"
)
WORD_LABELS = {name: value for value, name in enumerate(WORD_NAMES.split(), start=1)}


def word(tree: Tree) -> dict[str, tuple]:
    truth = {}
    for role, case in (("Tr", "word_0002"), ("Tr", "word_0003"), ("Val", "word_0001"), ("Ts", "word_0014")):
        label = tree.label(f"labels{role}/{case}.nii.gz", case, WORD_LABELS)
        truth[case] = (tree.image(f"images{role}/{case}.nii.gz", case), label)
    return truth


def test_word(tmp_path: Path, convert: Convert) -> None:
    tree = Tree(tmp_path / "WORD-V0.1.0")
    truth = word(tree)
    made = plan("word", tree.root)
    written = convert(made)
    for case in ("word_0001", "word_0002", "word_0003"):
        written.check("Tr", case, tree, *truth[case])
    written.check("Ts", "word_0014", tree, *truth["word_0014"])
    assert made.splits[0].folds == ({"train": ("word_0002", "word_0003"), "val": ("word_0001",)},)
    assert made.splits[0].name == "official-part"
    assert certain(tree.root) == {"word": 1.0}
    # one level too high, and one too low
    assert len(plan("word", tmp_path).cases) == len(plan("word", tree.root / "imagesTr").cases) == 4


def test_word_half_downloaded(tmp_path: Path, convert: Convert) -> None:
    tree = Tree(tmp_path / "WORD")
    word(tree)
    (tree.root / "labelsTr/word_0002.nii.gz").unlink()
    assert "1 file(s) have no label" in refusal("word", tree.root)
    tree.write("labelsTr/word_0002.nii.gz", "word_0002", np.full(SIZE, 17, np.uint8))
    with pytest.raises(BadInputError, match="17"):
        convert(plan("word", tree.root))
    tree.label("labelsTr/word_0002.nii.gz", "word_0002", WORD_LABELS)
    tree.image("imagesVal/word_0002.nii.gz", "word_0002")
    tree.label("labelsVal/word_0002.nii.gz", "word_0002", WORD_LABELS)
    with pytest.raises(BadInputError, match="Two cases are called 'word_0002'"):
        convert(plan("word", tree.root))
    assert "does not look like WORD" in refusal("word", _elsewhere(tmp_path))


def _elsewhere(folder: Path) -> Path:
    (folder / "elsewhere/deep/deeper/deepest").mkdir(parents=True)
    (folder / "elsewhere/deep/deeper/deepest/notes.txt").touch()
    return folder / "elsewhere/deep/deeper/deepest"
