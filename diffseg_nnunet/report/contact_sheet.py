"""A contact sheet: one slice of every case, with its labels, to see at a glance what a data set is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diffseg_nnunet.atomic import write_file
from diffseg_nnunet.evaluation.labels import Labels, scored_structures
from diffseg_nnunet.report.pictures import (
    CT_BELOW,
    CT_WINDOW_HU,
    add_texts,
    draw_image,
    draw_labels,
    structure_colours,
)
from diffseg_nnunet.report.style import plain_style
from diffseg_nnunet.verification import CaseRecord

TILES_A_PAGE = 48
# nnU-Net's ANISO_THRESHOLD: from there on, it takes slices for what they are
_ANISOTROPIC = 3.0
_WIDTH_TO_HEIGHT = 4 / 3
_INCHES = 1.7
_DOTS_PER_INCH = 110


@dataclass(frozen=True)
class Tile:
    """One slice of a case.

    Attributes:
        title: shown above it.
        pixels: intensities (rows, columns).
        label: label values of the same shape, or None.
        axis: across which array axis of the LPS-oriented volume it was cut.
        spacing_mm: of that volume, (z, y, x).
        window: intensities shown black and white.
    """

    title: str
    pixels: NDArray[np.number]
    label: NDArray[np.integer] | None
    axis: int
    spacing_mm: tuple[float, float, float]
    window: tuple[float, float]


def case_tile(record: CaseRecord, image: sitk.Image, label: sitk.Image | None, labels: Labels) -> Tile:
    """The slice with the most labelled voxels, the middle one without a label, as the patient is looked at.

    Axial slices are seen from the feet: anterior is up, the patient's left on the right. Where slices are at least
    three times as thick as their pixels, or there is one only, they are shown as they were taken; the head is up then.

    Args:
        record: of the case; its first channel's intensities give the window.
        image: the first channel.
        label: on the same grid; left out where its size is another.
        labels: name -> value or values of the structures.
    """
    image = sitk.DICOMOrient(image, "LPS")
    voxels = sitk.GetArrayViewFromImage(image)
    spacing = image.GetSpacing()[::-1]
    axis = _slice_axis(voxels.shape, spacing)
    index, drawn = voxels.shape[axis] // 2, None
    if (
        label is not None
        and (values := sitk.GetArrayViewFromImage(sitk.DICOMOrient(label, "LPS"))).shape == voxels.shape
    ):
        structures = [value for of_structure in scored_structures(labels).values() for value in of_structure]
        counts = [np.count_nonzero(np.isin(plane, structures)) for plane in np.moveaxis(values, axis, 0)]
        index = int(np.argmax(counts)) if any(counts) else index
        drawn = np.take(values, index, axis)
    channel = record.channels[0]
    low, high = channel.percentile_00_5, channel.percentile_99_5
    window = CT_WINDOW_HU if channel.minimum < CT_BELOW else (low, high if high > low else low + 1)
    return Tile(record.case, np.take(voxels, index, axis), drawn, axis, spacing, window)


@plain_style()
def contact_sheet(path: Path | str, tiles: Sequence[Tile], labels: Labels, title: str) -> None:
    """Write one page of one to `TILES_A_PAGE` tiles as PNG, whole or not at all.

    The colour of a structure depends on the labels alone, so that it is the same on all pages.
    """
    structures = scored_structures(labels)
    colours = structure_colours(structures)
    columns = math.ceil(math.sqrt(len(tiles) * _WIDTH_TO_HEIGHT))
    rows = math.ceil(len(tiles) / columns)
    size = (max(columns, 3) * _INCHES, rows * _INCHES + 0.9)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    drawn: set[str] = set()
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, tile in itertools.zip_longest(grid, tiles):
        if tile is None:
            axes.set_axis_off()
            continue
        draw_image(axes, tile.pixels, tile.window, tile.axis, tile.spacing_mm)
        if tile.label is not None:
            drawn |= draw_labels(axes, tile.label, structures, colours, tile.axis, tile.spacing_mm)
        axes.set_title(tile.title, fontsize=6, parse_math=False)
    add_texts(figure, title, {name: colour for name, colour in colours.items() if name in drawn})
    canvas = FigureCanvasAgg(figure)
    write_file(path, lambda temporary: canvas.print_figure(temporary, format="png", dpi=_DOTS_PER_INCH))


def spread_evenly(records: Sequence[CaseRecord], most: int) -> list[CaseRecord]:
    """At most so many of the records, evenly over their order, the first and the last among them."""
    if len(records) <= most:
        return list(records)
    return [records[index] for index in np.linspace(0, len(records) - 1, most).round().astype(int)]


def page_paths(path: Path, pages: int) -> list[Path]:
    """``sheet.png``, ``sheet-2.png``, ..."""
    return [path if page == 0 else path.with_stem(f"{path.stem}-{page + 1}") for page in range(pages)]


def _slice_axis(shape: Sequence[int], spacing: Sequence[float]) -> int:
    """The array axis across which the slices were taken, as far as that can be seen; else the patient's axis."""
    if 1 in shape:
        return list(shape).index(1)
    return int(np.argmax(spacing)) if max(spacing) / min(spacing) >= _ANISOTROPIC else 0
