"""Pictures of denoising: rows of slices, all grey ones of a row in the window of its first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diffseg_nnunet.atomic import write_file
from diffseg_nnunet.report.style import plain_style

_PERCENTILES = (0.5, 99.5)
_INCHES = 2.2
_DOTS_PER_INCH = 110


@dataclass(frozen=True)
class Panel:
    """A titled slice: (h, w) is drawn grey, (h, w, 3) in colours, each component over its own range."""

    title: str
    pixels: NDArray[np.floating]


@plain_style()
def denoising_png(path: Path | str, rows: Sequence[Sequence[Panel]], title: str = "") -> None:
    """Write a PNG of rows of panels, whole or not at all.

    Args:
        path: the file.
        rows: panels; grey ones share the window of the first of their row.
        title: text above.
    """
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(_INCHES * columns, (_INCHES + 0.2) * len(rows) + 0.3), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, axes_of_row in zip(rows, grid, strict=True):
        window = np.percentile(row[0].pixels, _PERCENTILES)
        for axes in axes_of_row:
            axes.set_axis_off()
        for axes, panel in zip(axes_of_row, row, strict=False):
            if panel.pixels.ndim == 3:
                axes.imshow(_colours(panel.pixels), interpolation="nearest")
            else:
                axes.imshow(panel.pixels, cmap="gray", vmin=window[0], vmax=window[1], interpolation="nearest")
            axes.set_title(panel.title, fontsize=7, parse_math=False)
    figure.suptitle(title, fontsize=9, parse_math=False)
    canvas = FigureCanvasAgg(figure)
    write_file(path, lambda temporary: canvas.print_figure(temporary, format="png", dpi=_DOTS_PER_INCH))


def _colours(pixels: NDArray[np.floating]) -> NDArray[np.floating]:
    low = pixels.min(axis=(0, 1), keepdims=True)
    span = np.maximum(np.ptp(pixels, axis=(0, 1), keepdims=True), 1e-6)
    return (pixels - low) / span
