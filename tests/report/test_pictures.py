"""Pictures are whole files of the right layout, and choose slices, windows and colours as they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image as mpl_image

from diffseg_nnunet.report.pictures import foreground_centre, intensity_window, overlay_png, structure_colours

LABELS = {"liver": 1, "spleen_$left": 2, "both": (3, 4), "ignore": 9}


@pytest.fixture
def scan() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    reference = np.zeros((12, 40, 50), dtype=np.uint8)
    reference[3:9, 10:20, 10:30] = 1
    reference[4:8, 22:30, 10:30] = 4
    prediction = np.roll(reference, 2, axis=2)
    image = generator.normal(-500, 200, reference.shape).astype(np.float32) + 500 * (reference > 0)
    return image, reference, prediction


def test_writes_a_picture_and_nothing_else(tmp_path: Path, scan: tuple[np.ndarray, ...]) -> None:
    path = tmp_path / "new" / "case.png"
    overlay_png(path, *scan, LABELS, (5.0, 0.8, 0.8), "case_$1 of a_b")
    pixels = mpl_image.imread(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["case.png"]
    assert pixels.ndim == 3
    assert min(pixels.shape[:2]) > 300
    # The structures are drawn in colour, and only in the two columns of overlays.
    coloured = np.ptp(pixels[..., :3], axis=-1) > 0.2
    rows = slice(0, int(0.9 * len(coloured)))  # below is the legend
    first, second, third = (part[rows].sum() for part in np.array_split(coloured, 3, axis=1))
    assert first == 0
    assert second > 500
    assert third > 500


def test_pyplot_is_left_alone() -> None:
    code = "import sys, diffseg_nnunet.report.pictures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_slice_gives_one_row(tmp_path: Path, scan: tuple[np.ndarray, ...]) -> None:
    overlay_png(tmp_path / "volume.png", *scan, LABELS, (1.0, 1.0, 1.0), "volume")
    overlay_png(tmp_path / "slice.png", *(array[5:6] for array in scan), LABELS, (1.0, 1.0, 1.0), "slice")
    volume, single = (mpl_image.imread(tmp_path / f"{name}.png") for name in ("volume", "slice"))
    assert len(single) < 0.8 * len(volume)
    assert single.shape[1] == volume.shape[1]


def test_thick_slices_are_drawn_taller(tmp_path: Path, scan: tuple[np.ndarray, ...]) -> None:
    for name, thickness in (("thin", 1.0), ("thick", 4.0)):
        overlay_png(tmp_path / f"{name}.png", *scan, LABELS, (thickness, 1.0, 1.0), name)
    thin, thick = (mpl_image.imread(tmp_path / f"{name}.png") for name in ("thin", "thick"))
    assert len(thick) > len(thin)


@pytest.mark.parametrize("empty", ["reference", "both"])
def test_empty_label_maps_are_drawn(tmp_path: Path, scan: tuple[np.ndarray, ...], empty: str) -> None:
    image, reference, prediction = scan
    nothing = np.zeros_like(reference)
    overlay_png(tmp_path / "a.png", image, nothing, nothing if empty == "both" else prediction, LABELS, (1, 1, 1), "a")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_shapes_and_spacing_are_checked(tmp_path: Path, scan: tuple[np.ndarray, ...]) -> None:
    image, reference, prediction = scan
    with pytest.raises(ValueError, match="one shape"):
        overlay_png(tmp_path / "a.png", image, reference[1:], prediction, LABELS, (1, 1, 1), "a")
    with pytest.raises(ValueError, match="three positive"):
        overlay_png(tmp_path / "a.png", image, reference, prediction, LABELS, (1, 1, 0), "a")
    assert not list(tmp_path.iterdir())


def test_the_window_follows_the_modality() -> None:
    ct = np.linspace(-1000, 1000, 101)
    mr = np.linspace(0, 1000, 1001)
    assert intensity_window(ct) == (-160.0, 240.0)
    assert intensity_window(mr) == pytest.approx((5.0, 995.0))
    assert intensity_window(mr, is_ct=True) == (-160.0, 240.0)
    assert intensity_window(ct, is_ct=False) == pytest.approx((-990.0, 990.0))
    assert intensity_window(np.full(3, 7)) == (7.0, 8.0)
    assert intensity_window(np.array([np.nan, np.inf])) == (0.0, 1.0)


def test_the_centre_meets_foreground_on_every_slice() -> None:
    ring = np.zeros((5, 9, 9), dtype=bool)
    ring[2, 1:8, 1:8] = True
    ring[2, 2:7, 2:7] = False
    z, y, x = foreground_centre(ring)
    assert (z, y, x) == (2, 4, 4)
    assert ring[z].any()
    assert ring[:, y].any()
    assert ring[:, :, x].any()
    assert foreground_centre(np.zeros((4, 6, 8), dtype=bool)) == (2, 3, 4)


@pytest.mark.parametrize("n", [1, 9, 10, 18, 19, 40])
def test_colours_differ_and_none_is_grey(n: int) -> None:
    colours = structure_colours({f"organ {index}": (index + 1,) for index in range(n)})
    assert len(set(colours.values())) == n
    assert all(np.ptp(colour) > 0.1 for colour in colours.values())
