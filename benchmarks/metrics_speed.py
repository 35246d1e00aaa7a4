"""Seconds of `diffseg evaluate` beside those of what it replaces: nnUNetv2_evaluate_simple, then surface-distance.

Usage: python benchmarks/metrics_speed.py DATA [--cases 24] [--repeats 3] [--workers 2]

DATA holds BTCV_3mm. The predictions are the references with every structure shifted by one voxel and dilated by one.
Both sides read the same files and give the same scores; ours adds IoU, volumes, intervals and reports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from time import perf_counter

import nibabel
import numpy as np
import surface_distance
from flare_rules import Pair
from numpy.typing import NDArray
from results import interval, table, write_section
from scipy import ndimage

from diffseg_nnunet.evaluation.protocols import BTCV_ORGANS

LABELS = {name: value for value, name in enumerate(BTCV_ORGANS, start=1)}
TOLERANCE_MM = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--surface-distance-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.surface_distance_only:
        _score_by_surface_distance(options.data)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cases = write_cases(options.data, folder, options.cases)
        times = [_race(folder, options.workers) for _ in range(options.repeats)]
        difference = _largest_difference(folder)
    write_section("metrics-speed", _report(times, cases, options.workers, difference))


def write_cases(data: Path, folder: Path, number: int) -> int:
    """References and their perturbations, as NIfTI; returns how many there are."""
    paths = sorted((data / "BTCV_3mm" / "RawData" / "Training" / "label").glob("*.nii.gz"))[:number]
    for path in paths:
        image = nibabel.load(path)
        labels = np.asarray(image.dataobj).astype(np.uint8)
        spacing = tuple(float(side) for side in image.header.get_zooms())
        pair = Pair(path.name.removesuffix(".nii.gz"), labels, _shifted_and_dilated(labels), spacing)
        pair.write(folder / "references", folder / "predictions")
    (folder / "labels.json").write_text(json.dumps(LABELS))
    return len(paths)


def _shifted_and_dilated(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    moved = np.roll(labels, 1, 0)
    return np.where(moved > 0, moved, ndimage.maximum_filter(moved, footprint=ndimage.generate_binary_structure(3, 1)))


def _race(folder: Path, workers: int) -> tuple[float, float, float]:
    """Seconds of ours, of nnU-Net's command, and of surface-distance."""
    predictions, references = folder / "predictions", folder / "references"
    ours = ["diffseg", "evaluate", "--prediction", predictions, "--reference", references]
    ours += ["--labels", folder / "labels.json", "-o", folder / "report", "--tolerance", TOLERANCE_MM]
    theirs = ["nnUNetv2_evaluate_simple", references, predictions, "-l", *LABELS.values(), "-np", workers]
    theirs += ["-o", folder / "summary.json"]
    surfaces = [sys.executable, __file__, folder, "--surface-distance-only"]
    return _seconds([*ours, "--workers", workers]), _seconds(theirs), _seconds(surfaces)


def _seconds(command: list[object]) -> float:
    began = perf_counter()
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return perf_counter() - began


def _score_by_surface_distance(folder: Path) -> None:
    """NSD, HD95 and average distance of all cases and organs, one after another, as its documentation shows."""
    warnings.simplefilter("ignore", DeprecationWarning)
    scores = {}
    for path in sorted((folder / "references").iterdir()):
        image = nibabel.load(path)
        maps = [np.asarray(image.dataobj), np.asarray(nibabel.load(folder / "predictions" / path.name).dataobj)]
        spacing = tuple(float(side) for side in image.header.get_zooms())
        for name, value in LABELS.items():
            masks = [labels == value for labels in maps]
            if not all(mask.any() for mask in masks):
                continue
            distances = surface_distance.compute_surface_distances(*masks, spacing)
            scores[f"{path.name.removesuffix('.nii.gz')}/{name}"] = (
                float(surface_distance.compute_surface_dice_at_tolerance(distances, TOLERANCE_MM)),
                float(surface_distance.compute_robust_hausdorff(distances, 95)),
                surface_distance.compute_average_surface_distance(distances),
            )
    (folder / "surface_distance.json").write_text(json.dumps(scores))


def _largest_difference(folder: Path) -> tuple[float, float, float]:
    """Of DSC to nnU-Net's, of NSD and of HD95 (mm) to surface-distance's."""
    rows = json.loads((folder / "report" / "scores.json").read_text())["rows"]
    summary = json.loads((folder / "summary.json").read_text())["metric_per_case"]
    surfaces = json.loads((folder / "surface_distance.json").read_text())
    dice = {
        f"{Path(case['reference_file']).name.removesuffix('.nii.gz')}/{name}": case["metrics"][str(value)]["Dice"]
        for case in summary
        for name, value in LABELS.items()
    }
    largest = np.zeros(3)
    for row in rows:
        key = f"{row['case']}/{row['structure']}"
        if key in surfaces:
            theirs = np.array([dice[key], *surfaces[key][:2]])
            largest = np.maximum(largest, np.abs(np.array([row["dsc"], row["nsd"], row["hd95_mm"]]) - theirs))
    return tuple(largest.tolist())


def _report(
    times: list[tuple[float, float, float]], cases: int, workers: int, difference: tuple[float, float, float]
) -> str:
    ours, stock, surfaces = zip(*times, strict=True)
    ratios = [(nnunet + distance) / own for own, nnunet, distance in times]
    rows = [
        ["`diffseg evaluate`", "DSC, IoU, NSD, HD95, ASSD, volumes, intervals, reports", interval(ours, 1)],
        ["`nnUNetv2_evaluate_simple`", "DSC, IoU, counts", interval(stock, 1)],
        ["surface-distance, one after another", "NSD, HD95, average distance", interval(surfaces, 1)],
    ]
    return (
        "## Speed of the evaluation\n\nScript: `benchmarks/metrics_speed.py`. "
        f"{cases} cases of BTCV at 3 mm, {len(LABELS)} organs, against themselves shifted and dilated by a voxel; "
        f"{workers} workers, whole commands from start to end, {len(times)} runs in turn.\n\n"
        + table(("command", "scores", "seconds"), rows)
        + f"\n\nNeeded for the same scores, theirs over ours: **{interval(ratios, 2)}**. Largest difference of DSC to "
        f"nnU-Net's {difference[0]:.1e}, of NSD to surface-distance's {difference[1]:.1e}, of HD95 "
        f"{difference[2]:.1e} mm."
    )


if __name__ == "__main__":
    main()
