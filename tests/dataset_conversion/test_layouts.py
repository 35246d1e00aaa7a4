"""Patterns of paths: what they match, what they ignore, and where a layout is found."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffseg_nnunet.dataset_conversion.layouts import Layout, Part, find, look, match
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import VOLUME_ENDINGS

IDENTIFIERS = st.text("abcXYZ0189-+", min_size=1, max_size=8)
PATTERNS = st.sampled_from(
    ["{case}", "img{case}", "scans/img{case}_0000", "{case}/ct", "{case}/{case}_t1", "a/{case}/b.c/{case}"]
)
LAYOUT = Layout("two folders", (Part("training", ("scans/{case}",), "masks/{case}"),), case=r"p\d+")


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@given(
    pattern=PATTERNS,
    cases=st.dictionaries(IDENTIFIERS, st.sampled_from(VOLUME_ENDINGS), min_size=1, max_size=5),
    rubbish=st.lists(st.sampled_from(["._x.nii.gz", ".hidden/x.nii.gz", "notes.txt", "deep/er/x/y/z.nii.gz"])),
)
def test_a_pattern_finds_what_it_describes_and_nothing_else(
    pattern: str, cases: dict[str, str], rubbish: list[str]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        expected = {
            case: touch(root / (pattern.replace("{case}", case) + ending)) for case, ending in sorted(cases.items())
        }
        for path in rubbish:
            touch(root / path)
        layout = Layout("any", (), case=r"[a-zA-Z0-9+-]+")
        assert list(match(pattern, root, layout).items()) == list(expected.items())


def test_the_case_must_be_the_same_in_all_levels(tmp_path: Path) -> None:
    touch(tmp_path / "a/a_t1.nii.gz")
    touch(tmp_path / "a/b_t1.nii.gz")
    assert list(match("{case}/{case}_t1", tmp_path, Layout("any", ()))) == ["a"]


def test_two_files_of_one_case_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "scans/p1.nii")
    touch(tmp_path / "scans/p1.nii.gz")
    with pytest.raises(BadInputError, match=r"scans/p1\.nii and p1\.nii\.gz are one case twice"):
        look(tmp_path, LAYOUT)


@pytest.mark.parametrize("where", [".", "..", "scans", "../.."])
def test_a_folder_too_high_or_too_low(tmp_path: Path, where: str) -> None:
    root = tmp_path / "download/livers"
    touch(root / "scans/p1.nii.gz")
    touch(root / "masks/p1.nii.gz")
    found = find(root / where, (LAYOUT,))
    assert found is not None
    assert found.root.resolve() == root
    assert found.parts[0].images["p1"][0].resolve() == root / "scans/p1.nii.gz"


def test_links_in_circles_and_to_nowhere_end(tmp_path: Path) -> None:
    touch(tmp_path / "scans/p1.nii.gz")
    (tmp_path / "scans/p2.nii.gz").symlink_to(tmp_path / "scans/p2.nii.gz")
    (tmp_path / "scans/p3.nii.gz").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    found = find(tmp_path, (LAYOUT,))
    assert found is not None
    # they are listed: whoever reads them says what is wrong
    assert list(found.parts[0].images) == ["p1", "p2", "p3"]
    assert list(match("{case}/scans/p1", tmp_path, Layout("any", ()))) == ["loop"]


def test_a_missing_channel_is_none(tmp_path: Path) -> None:
    layout = Layout("two sequences", (Part("training", ("{case}_t1", "{case}_t2")),))
    for name in ("a_t1", "a_t2", "b_t2"):
        touch(tmp_path / f"{name}.nii.gz")
    found = look(tmp_path, layout)
    assert found is not None
    assert found.parts[0].images["b"] == (None, tmp_path / "b_t2.nii.gz")


def test_the_layout_with_the_most_files_is_taken(tmp_path: Path) -> None:
    touch(tmp_path / "scans/p1.nii.gz")
    touch(tmp_path / "masks/p1.nii.gz")
    images_only = Layout("images alone", (Part("unlabelled", ("scans/{case}",)),))
    found = find(tmp_path, (images_only, LAYOUT))
    assert found is not None
    assert found.layout is LAYOUT
    assert find(tmp_path / "masks", (Layout("none", (Part("training", ("x/{case}",)),)),)) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_may_not_be_listed_is_no_empty_one(tmp_path: Path) -> None:
    touch(tmp_path / "scans/p1.nii.gz")
    (tmp_path / "scans").chmod(0)
    try:
        with pytest.raises(PermissionError):
            find(tmp_path, (LAYOUT,))
    finally:
        (tmp_path / "scans").chmod(0o755)
