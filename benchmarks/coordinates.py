"""Does a pretrained network know where it is? On held-out scans: displacements, organs across patients, left and right.

Usage: python benchmarks/coordinates.py WORKSPACE DATA [--modes auxiliary guidance] [--seed 0] [--iterations 600]
       python benchmarks/coordinates.py WORKSPACE DATA --checkpoint CHECKPOINT

Pretrains where the workspace has no such pretraining (see abdomen.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from abdomen import DATASETS, LABELS, ORGANS, HeldOut, add_arguments, describe, held_out, prepare, pretrain
from numpy.typing import NDArray
from results import cached, interval, table, write_section
from scans import (
    BODY_FROM_HU,
    Scan,
    body_points,
    coordinates_mm,
    inside,
    read_scan,
    rounded_to,
    span,
    stride,
    window,
)

from diffseg_nnunet.inference.pretrained import PretrainedModel, load_pretrained
from diffseg_nnunet.training.checkpoint import file_digest

PATCHES, POINTS = 4, 256
KIDNEYS = ("left_kidney", "right_kidney")
AXES = ("left", "posterior", "superior")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--modes", nargs="+", default=["auxiliary", "guidance"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--checkpoint", type=Path, help="of another pretraining, in place of the modes")
    parser.add_argument("--cases", type=int, help="only so many scans of each data set, to try the script")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    prepare(options.workspace, options.data)
    sections = []
    for name, path in _checkpoints(options).items():
        model = load_pretrained(path, torch.device(options.device))
        divisor = stride(model)
        sizes = {
            "whole patch": tuple(model.patch_size),
            "half patch": rounded_to([side / 2 for side in model.patch_size], divisor),
        }
        for kind, size in sizes.items():
            measured = _measure(options, model, file_digest(path)[:12], size)
            sections.append(_report(name, kind, size, measured))
    scans = "all" if options.cases is None else f"the first {options.cases}"
    write_section(
        "coordinates",
        f"## It knows where it is\n\nScript: `benchmarks/coordinates.py`, seed {options.seed}, "
        f"{_length(options)}. {describe(options.workspace)} Measured on {scans} of the held-out scans, without noise, "
        "in windows of the pretraining patch and of half its sides, which it was never trained on. Predicted "
        "coordinates are in the network's own mm (its unit × 300); *slope* is that of predicted on true displacements, "
        "1 for true mm, "
        "so that shrinking all coordinates helps nothing: "
        "*spread / slope* is divided by it, axis by axis.\n\n" + "\n\n".join(sections),
    )


def _length(options: argparse.Namespace) -> str:
    return "a given checkpoint" if options.checkpoint else f"{options.iterations} iterations of pretraining"


def _checkpoints(options: argparse.Namespace) -> dict[str, Path]:
    if options.checkpoint:
        return {options.checkpoint.parents[2].name: options.checkpoint}
    return {
        mode: pretrain(options.workspace, mode, options.seed, options.iterations).checkpoint for mode in options.modes
    }


def _measure(
    options: argparse.Namespace, model: PretrainedModel, key: str, size: tuple[int, ...]
) -> dict[str, list[dict[str, Any]]]:
    """Data set -> one record a scan, kept in the workspace."""
    run = f"{key}_seed{options.seed}_{'x'.join(str(side) for side in size)}"
    folder = options.workspace / "benchmarks" / "coordinates" / run
    return {
        dataset: [
            cached(
                folder / f"{scan.case}.json",
                lambda scan=scan, dataset=dataset: _measure_scan(model, scan, dataset, size, options.seed),
            )
            for scan in held_out(options.workspace, dataset)[: options.cases]
        ]
        for dataset in DATASETS
    }


def _measure_scan(
    model: PretrainedModel, source: HeldOut, dataset: str, size: tuple[int, ...], seed: int
) -> dict[str, Any]:
    scan = read_scan(model, source)
    body = body_points(source, BODY_FROM_HU[dataset])
    digits = int("".join(filter(str.isdigit, source.case)))
    record: dict[str, Any] = {"case": scan.case}
    record["displacements"] = _displacements(model, scan, body, size, np.random.default_rng([seed, digits]))
    if scan.labels is not None:
        record["organs"] = _organs(model, scan, size)
        record["kidneys_apart"] = _kidney_sides(model, scan, size)
        record["centre"] = scan.to_mm((np.array(scan.shape)[None] - 1) / 2)[0].tolist()
        record["box"] = [body.min(axis=0).tolist(), body.max(axis=0).tolist()]
    return record


def _displacements(
    model: PretrainedModel, scan: Scan, body: NDArray, size: tuple[int, ...], generator: np.random.Generator
) -> dict[str, Any]:
    """Of random pairs of body voxels, within one window and across two: errors, and sums for the slope."""
    index = scan.to_index(body)
    index = index[inside(index, tuple(slice(0, side) for side in scan.shape))]
    predicted, true = [], []
    for centre in index[generator.integers(len(index), size=PATCHES)]:
        box = window(centre, size, scan.shape)
        within = index[inside(index, box)]
        places = within[generator.integers(len(within), size=POINTS)]
        predicted.append(coordinates_mm(model, scan, box, size, places))
        true.append(scan.to_mm(places))
    return displacement_record(np.stack(predicted), np.stack(true))


def displacement_record(predicted: NDArray, true: NDArray) -> dict[str, Any]:
    """Errors of displacements between points of the same window, and of one window and the next.

    Args:
        predicted, true: mm, shape (windows, points, 3).

    Returns:
        For "within" and "across": ``error`` (median per axis), ``true`` (median length of the true displacement per
        axis: the error of who says "no displacement"), and ``products``, ``squares``, whose quotient is the slope.
    """
    record = {}
    for kind, partner in (("within", lambda x: np.roll(x, 1, axis=1)), ("across", lambda x: np.roll(x, 1, axis=0))):
        estimate, truth = (x - partner(x) for x in (predicted, true))
        record[kind] = {
            "error": np.median(np.abs(estimate - truth), axis=(0, 1)).tolist(),
            "true": np.median(np.abs(truth), axis=(0, 1)).tolist(),
            "products": (estimate * truth).sum(axis=(0, 1)).tolist(),
            "squares": (truth**2).sum(axis=(0, 1)).tolist(),
        }
    return record


def _organs(model: PretrainedModel, scan: Scan, size: tuple[int, ...]) -> dict[str, Any]:
    """Position and predicted coordinate of each organ's centroid, from a window around it."""
    organs = {}
    for organ in ORGANS:
        if not (scan.labels == LABELS[organ]).any():
            continue
        centroid = scan.centroid(LABELS[organ])
        predicted = coordinates_mm(model, scan, window(centroid, size, scan.shape), size, centroid[None])
        organs[organ] = {"true": scan.to_mm(centroid[None])[0].tolist(), "predicted": predicted[0].tolist()}
    return organs


def _kidney_sides(model: PretrainedModel, scan: Scan, size: tuple[int, ...]) -> dict[str, Any]:
    """Left coordinates of both kidneys, each from a window that holds no voxel of the other."""
    axis, values = scan.left_axis, {}
    for kidney, other in (KIDNEYS, KIDNEYS[::-1]):
        centroid = scan.centroid(LABELS[kidney])
        occupied = np.argwhere(scan.labels == LABELS[other])[:, axis]
        low, high = beside(centroid[axis], int(occupied.min()), int(occupied.max()), scan.shape[axis])
        narrow = list(size)
        narrow[axis] = min(size[axis], rounded_to([high - low], [stride(model)[axis]], up=False)[0])
        box = list(window(centroid, size, scan.shape))
        box[axis] = span(centroid[axis], narrow[axis], low, high)
        predicted = coordinates_mm(model, scan, tuple(box), narrow, centroid[None])
        values[kidney] = {"left": float(predicted[0][0]), "window": box[axis].stop - box[axis].start}
    return values


def beside(position: float, first: int, last: int, size: int) -> tuple[int, int]:
    """The part of 0 ... size on this position's side of what lies from `first` to `last`."""
    return (last + 1, size) if position > (first + last) / 2 else (0, first)


def slope(records: list[dict[str, Any]]) -> NDArray[np.float64]:
    """Of predicted on true displacements across windows, through the origin, per axis: shape (3,)."""
    sums = {
        part: np.sum([record["displacements"]["across"][part] for record in records], axis=0)
        for part in ("products", "squares")
    }
    return sums["products"] / sums["squares"]


def spread_mm(points: NDArray) -> float:
    """Root mean square distance to the mean, of points (N, 3)."""
    return float(np.sqrt(((points - points.mean(axis=0)) ** 2).sum(axis=1).mean()))


def organ_spreads(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Organ -> spread over patients, mm, of the predicted coordinate and of the baselines."""
    boxes = np.array([record["box"] for record in records])
    mean_box = (boxes[:, 1] - boxes[:, 0]).mean(axis=0)
    spreads: dict[str, dict[str, float]] = {}
    for organ in ORGANS:
        own = [(record, box) for record, box in zip(records, boxes, strict=True) if organ in record["organs"]]
        if len(own) < 2:
            continue
        true, predicted = (np.array([record["organs"][organ][k] for record, _ in own]) for k in ("true", "predicted"))
        centres = np.array([record["centre"] for record, _ in own])
        low, high = (np.array([box[end] for _, box in own]) for end in (0, 1))
        spreads[organ] = {
            "network": spread_mm(predicted),
            "network / slope": spread_mm(predicted / slope(records)),
            "scan centre": spread_mm(true - centres),
            "body box": spread_mm((true - low) / (high - low) * mean_box),
        }
    return spreads


def _report(name: str, kind: str, size: tuple[int, ...], measured: dict[str, list[dict[str, Any]]]) -> str:
    side = "×".join(str(n) for n in size)
    parts = [f"### {name}, {kind} ({side} voxels)", _displacement_table(measured)]
    labelled = measured["BTCV"]
    spreads = organ_spreads(labelled)
    if spreads:
        columns = list(next(iter(spreads.values())))
        rows = [(organ, *(f"{values[c]:.1f}" for c in columns)) for organ, values in spreads.items()]
        means = [f"**{np.mean([values[c] for values in spreads.values()]):.1f}**" for c in columns]
        parts.append(
            f"Spread of each organ's centroid over {len(labelled)} held-out patients (root mean square distance to "
            "their mean, mm). *Scan centre*: position relative to it; *body box*: fraction of the body's bounding box "
            "× mean box size.\n\n" + table(("organ", *columns), [*rows, ("mean", *means)])
        )
    parts.append(_kidney_lines(labelled))
    return "\n\n".join(parts)


def _displacement_table(measured: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for dataset, records in measured.items():
        factors = slope(records)
        for kind in ("within", "across"):
            for axis, label in enumerate(AXES):
                errors, true = (
                    [record["displacements"][kind][part][axis] for record in records] for part in ("error", "true")
                )
                rows.append(
                    (dataset, f"{kind} windows", label, interval(errors, 1), interval(true, 1), f"{factors[axis]:.2f}")
                )
    return (
        f"Displacements between random body voxels of one scan ({PATCHES} windows a scan, {POINTS} pairs each): median "
        "error of a scan, mean over scans [95 % CI]; beside it the median true displacement, which is the error of "
        "always saying zero.\n\n" + table(("data", "pairs", "axis", "error mm", "true mm", "slope"), rows)
    )


def _kidney_lines(records: list[dict[str, Any]]) -> str:
    centred = [np.subtract(*(record["organs"][k]["predicted"][0] for k in KIDNEYS)) for record in records]
    apart = [np.subtract(*(record["kidneys_apart"][k]["left"] for k in KIDNEYS)) for record in records]
    true = [np.subtract(*(record["organs"][k]["true"][0] for k in KIDNEYS)) for record in records]
    lines = [
        f"- {text}: **{sum(d > 0 for d in found)} of {len(found)}** right; difference {interval(found, 1)} mm, true "
        f"{interval(true, 1)} mm"
        for text, found in (
            ("windows centred on each kidney", centred),
            ("windows without a voxel of the other kidney", apart),
        )
    ]
    return "Left and right kidney told apart (the left one's coordinate is further left):\n\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
