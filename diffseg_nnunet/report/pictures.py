"""Pictures of a case: the image alone, with its reference and with its prediction, on orthogonal slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from diffseg_nnunet.atomic import write_file
from diffseg_nnunet.evaluation.labels import Labels, scored_structures
from diffseg_nnunet.report.style import plain_style

CT_WINDOW_HU = (-160.0, 240.0)
# Nothing but Hounsfield units goes this low: air is -1000, and intensities of other modalities start at 0 or, once
# normalised, at a few units below it.
CT_BELOW = -200.0
PERCENTILES = (0.5, 99.5)
OPACITY = 0.5
AXES = ("z", "y", "x")
_INCHES = 3.2
_DOTS_PER_INCH = 110
_LEGEND_COLUMNS = 6

Colour = tuple[float, float, float]


@plain_style()
def overlay_png(
    path: Path | str,
    image: NDArray[np.number],
    reference: NDArray[np.integer],
    prediction: NDArray[np.integer],
    labels: Labels,
    spacing_mm: Sequence[float],
    title: str,
    *,
    is_ct: bool | None = None,
) -> None:
    """Write a PNG: image, image with reference, image with prediction, side by side, a row per slice.

    The slices go through the centre of the reference's foreground (of the prediction's where the reference is empty),
    one across each axis; axes across which a slice would be a line are left out, so a single 2D slice gives one row.

    Args:
        path: the file, written whole or not at all.
        image: intensities, shape (z, y, x) as SimpleITK gives arrays.
        reference: labels of the same shape.
        prediction: labels of the same shape.
        labels: name to value or values; background and "ignore" are not drawn, later structures cover earlier ones.
        spacing_mm: voxel spacing in mm, in the order (z, y, x).
        title: text above the picture.
        is_ct: show the window -160 to 240 HU, else the percentiles 0.5 to 99.5; None: CT if any voxel is below -200.

    Raises:
        ValueError: the arrays are not 3D or not of one shape, or the spacing is not three positive numbers.
    """
    if image.ndim != 3 or not image.shape == reference.shape == prediction.shape:
        shapes = f"{image.shape}, {reference.shape} and {prediction.shape}"
        raise ValueError(f"Image, reference and prediction must be 3D and of one shape, not {shapes}.")
    if len(spacing_mm) != 3 or min(spacing_mm) <= 0:
        raise ValueError(f"The spacing must be three positive numbers in mm, not {tuple(spacing_mm)}.")
    structures = scored_structures(labels)
    colours = structure_colours(structures)
    slices = _slices(reference, prediction, structures)
    window = intensity_window(image, is_ct)
    figure = Figure(figsize=_size_inches(image.shape, spacing_mm, slices), layout="constrained", facecolor="white")
    grid = figure.subplots(len(slices), 3, squeeze=False)
    drawn: set[str] = set()
    for row, (axis, index) in zip(grid, slices, strict=True):
        for axes, heading, overlay in zip(
            row, ("image", "reference", "prediction"), (None, reference, prediction), strict=True
        ):
            draw_image(axes, np.take(image, index, axis), window, axis, spacing_mm)
            axes.set_title(f"{heading}, {AXES[axis]} = {index}", fontsize=9)
            if overlay is not None:
                drawn |= draw_labels(axes, np.take(overlay, index, axis), structures, colours, axis, spacing_mm)
    add_texts(figure, title, {name: colour for name, colour in colours.items() if name in drawn})
    canvas = FigureCanvasAgg(figure)
    write_file(path, lambda temporary: canvas.print_figure(temporary, format="png", dpi=_DOTS_PER_INCH))


def intensity_window(image: NDArray[np.number], is_ct: bool | None = None) -> tuple[float, float]:
    """Intensities shown black and white; see `overlay_png` for `is_ct`. Voxels that are not finite do not count."""
    finite = image[np.isfinite(image)]
    if finite.size == 0:
        return 0.0, 1.0
    if is_ct is None:
        is_ct = bool(finite.min() < CT_BELOW)
    if is_ct:
        return CT_WINDOW_HU
    low, high = (float(value) for value in np.percentile(finite, PERCENTILES))
    return (low, high) if high > low else (low, low + 1.0)


def foreground_centre(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    """The median position of the foreground along each axis, so that each of these slices meets foreground.

    The middle of the volume if the mask is empty.
    """
    centre = []
    for axis in range(mask.ndim):
        counts = np.count_nonzero(mask, axis=tuple(other for other in range(mask.ndim) if other != axis))
        total = np.cumsum(counts)
        centre.append(int(np.searchsorted(total, total[-1] / 2)) if total[-1] else mask.shape[axis] // 2)
    return tuple(centre)


def structure_colours(structures: Mapping[str, Sequence[int]]) -> dict[str, Colour]:
    """A colour for each name, which depends on the order of the names only."""
    n = len(structures)
    for name in ("tab10", "tab20"):
        # Grey, which both palettes hold, would not stand out from the image.
        picks = [pick for pick in matplotlib.colormaps[name].colors if np.ptp(pick) > 0.1]
        if n <= len(picks):
            break
    else:
        picks = [matplotlib.colormaps["gist_rainbow"](index / (n - 1))[:3] for index in range(n)]
    return dict(zip(structures, picks, strict=False))


def _slices(
    reference: NDArray[np.integer], prediction: NDArray[np.integer], structures: Mapping[str, Sequence[int]]
) -> list[tuple[int, int]]:
    """Axis and index of the slices to show."""
    values = [value for of_structure in structures.values() for value in of_structure]
    foreground = np.isin(reference, values)
    centre = foreground_centre(foreground if foreground.any() else np.isin(prediction, values))
    shape = reference.shape
    across = [axis for axis in range(3) if min(shape[:axis] + shape[axis + 1 :]) > 1]
    return [(axis, centre[axis]) for axis in across or [0]]


def _plane(axis: int) -> tuple[int, int]:
    """The axes that run down and across the slice."""
    down, across = (other for other in range(3) if other != axis)
    return down, across


def _size_inches(
    shape: Sequence[int], spacing_mm: Sequence[float], slices: Sequence[tuple[int, int]]
) -> tuple[float, float]:
    heights = []
    for axis, _ in slices:
        down, across = _plane(axis)
        ratio = (shape[down] * spacing_mm[down]) / (shape[across] * spacing_mm[across])
        heights.append(_INCHES * min(2.0, max(0.3, ratio)) + 0.3)
    return 3 * _INCHES, sum(heights) + 0.9


def draw_image(
    axes: Axes, pixels: NDArray[np.number], window: tuple[float, float], axis: int, spacing_mm: Sequence[float]
) -> None:
    axes.imshow(pixels, cmap="gray", vmin=window[0], vmax=window[1], **_placement(axis, spacing_mm))
    axes.set_axis_off()


def draw_labels(
    axes: Axes,
    pixels: NDArray[np.integer],
    structures: Mapping[str, Sequence[int]],
    colours: Mapping[str, Colour],
    axis: int,
    spacing_mm: Sequence[float],
) -> set[str]:
    """Draw the structures and return the names of those that are on the slice."""
    layer = np.zeros((*pixels.shape, 4))
    drawn = set()
    for name, values in structures.items():
        mask = np.isin(pixels, values)
        if mask.any():
            layer[mask] = (*colours[name], OPACITY)
            drawn.add(name)
    axes.imshow(layer, **_placement(axis, spacing_mm))
    return drawn


def _placement(axis: int, spacing_mm: Sequence[float]) -> dict[str, object]:
    down, across = _plane(axis)
    # z grows towards the head in most scans: it points up on the page, while y, towards the back, points down.
    origin = "upper" if axis == 0 else "lower"
    return {"aspect": spacing_mm[down] / spacing_mm[across], "origin": origin, "interpolation": "nearest"}


def add_texts(figure: Figure, title: str, colours: Mapping[str, Colour]) -> None:
    figure.suptitle(title, fontsize=11, parse_math=False)
    if not colours:
        return
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    columns = min(_LEGEND_COLUMNS, len(handles))
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
