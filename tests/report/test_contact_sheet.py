"""Contact sheets: the slice that is chosen, its orientation, and pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.image import imread

from diffseg_nnunet.raw_dataset import Case
from diffseg_nnunet.report.contact_sheet import case_tile, contact_sheet, page_paths, spread_evenly
from diffseg_nnunet.verification import CaseRecord, check_case

LABELS = {"organ": (1,), "ignore": (2,)}


def tile_of(folder: Path, voxels: np.ndarray, label: np.ndarray | None, spacing: tuple[float, ...], code: str = "LPS"):
    """The tile of a volume that is given in LPS, (z, y, x), and stored as `code` says."""
    images = []
    for name, array in (("a_0000", voxels), ("a", label)):
        if array is None:
            continue
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(spacing[::-1])
        images.append(sitk.DICOMOrient(image, code))
        sitk.WriteImage(images[-1], str(folder / f"{name}.nrrd"))
    record = check_case(Case("a", (folder / "a_0000.nrrd",), None), channel_count=1, label_values=None).record
    return case_tile(record, images[0], images[1] if label is not None else None, LABELS)


@pytest.mark.parametrize("code", ["LPS", "RAS", "PIR", "SAL"])
def test_the_slice_with_most_label_with_anterior_up(tmp_path: Path, code: str) -> None:
    voxels = np.random.default_rng(0).normal(size=(6, 7, 8)).astype(np.float32)
    label = np.zeros(voxels.shape, np.uint8)
    label[2, :2, :2], label[4, 1:4, 1:5], label[5] = 1, 1, 2
    tile = tile_of(tmp_path, voxels, label, (2.0, 1.0, 1.5), code)
    np.testing.assert_array_equal(tile.pixels, voxels[4])
    np.testing.assert_array_equal(tile.label, label[4])
    assert (tile.axis, tile.spacing_mm) == (0, (2.0, 1.0, 1.5))


@pytest.mark.parametrize(
    ("size", "spacing", "axis"), [((9, 4, 8), (1.0, 5.0, 1.0), 1), ((9, 8, 1), (1, 1, 1), 2), ((4, 8, 8), (5, 1, 1), 0)]
)
def test_thick_slices_are_shown_as_they_were_taken(tmp_path: Path, size: tuple, spacing: tuple, axis: int) -> None:
    voxels = np.arange(np.prod(size), dtype=np.int16).reshape(size)
    tile = tile_of(tmp_path, voxels, None, spacing)
    assert (tile.axis, tile.label) == (axis, None)
    np.testing.assert_array_equal(tile.pixels, np.take(voxels, size[axis] // 2, axis))


def test_a_page_is_drawn(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).normal(size=(6, 7, 8)).astype(np.float32)
    tile = tile_of(tmp_path, voxels, (voxels > 0).astype(np.uint8), (1, 1, 1))
    contact_sheet(tmp_path / "one.png", [tile], {}, "$x^2$ without labels")
    contact_sheet(tmp_path / "many.png", [tile] * 5, LABELS, "five")
    one, many = imread(tmp_path / "one.png"), imread(tmp_path / "many.png")
    assert many.shape[1] >= one.shape[1]
    saturation = many[..., :3].max(axis=-1) - many[..., :3].min(axis=-1)
    assert (saturation > 0.1).mean() > 0.02, "no label is drawn"


def test_cases_are_chosen_evenly_and_pages_are_numbered(tmp_path: Path) -> None:
    records: list[CaseRecord] = list(range(100))  # type: ignore[arg-type]
    assert spread_evenly(records, 5) == [0, 25, 50, 74, 99]
    assert spread_evenly(records, 100) == records
    assert page_paths(Path("a/s.png"), 3) == [Path("a/s.png"), Path("a/s-2.png"), Path("a/s-3.png")]
