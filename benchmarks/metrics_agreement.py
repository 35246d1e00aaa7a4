"""Our scores beside those of other implementations, on real label maps and random ones.

Usage: python benchmarks/metrics_agreement.py DATA [--cases 24] [--random 60]

DATA holds BTCV_3mm. Predictions are the references with every organ shifted, dilated, eroded or dropped. DSC and NSD
(by sub-voxels) are MONAI's; HD95 and ASSD come from all pairs of surface elements (scipy's cdist); MONAI's HD95, by
another definition, is shown beside. FLARE22 is held to its rules as flare_rules.py restates them.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from flare_rules import CRASH, Pair, official_scores, random_pairs, real_pairs
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from monai.metrics.meandice import compute_dice
from numpy.typing import NDArray
from results import table, write_section
from scipy.spatial.distance import cdist
from surface_distance import lookup_tables

from diffseg_nnunet.evaluation.folders import evaluate_folders
from diffseg_nnunet.evaluation.metrics import HD95_PERCENT, joint_box, score_structure
from diffseg_nnunet.evaluation.protocols import FLARE_TOLERANCES_MM, find_protocol

TOLERANCE_MM = 3.1  # between the distances of a 3 mm grid, so that rounding decides nothing
MOST_PAIRS = 60_000_000
_CHUNK = 500

Differences = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--random", type=int, default=60)
    options = parser.parse_args()
    paths = sorted((options.data / "BTCV_3mm" / "RawData" / "Training" / "label").glob("*.nii.gz"))[: options.cases]
    labels = {path.name.removesuffix(".nii.gz"): path for path in paths}
    differences = _agreement(real_pairs(labels))
    official = {
        revision: _official(chain(real_pairs(labels), random_pairs(options.random)), revision)
        for revision in ("2024", "2022")
    }
    write_section("metrics-agreement", _report(differences, official, len(labels), options.random))


def _agreement(pairs: Iterator[Pair]) -> Differences:
    """Absolute differences of every score of every organ of every case."""
    differences: Differences = defaultdict(list)
    for pair in pairs:
        for organ in range(1, 14):
            reference, prediction = pair.reference == organ, pair.prediction == organ
            if reference.any() and prediction.any():
                box = joint_box(reference, prediction)
                # a voxel's margin: MONAI takes what touches the border for inside
                masks = [np.pad(mask[box], 1) for mask in (reference, prediction)]
                for name, difference in _differences(masks[0], masks[1], pair.spacing):
                    differences[name].append(difference)
        print(pair.name, {name: f"{max(values):.1e}" for name, values in differences.items()}, flush=True)
    return differences


def _differences(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing: tuple[float, ...]
) -> Iterator[tuple[str, float]]:
    ours = score_structure(reference, prediction, spacing, TOLERANCE_MM)
    theirs, truth = (torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (prediction, reference))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield "DSC, MONAI", abs(ours.dsc - compute_dice(theirs, truth).item())
        nsd = compute_surface_dice(theirs, truth, [TOLERANCE_MM], True, spacing=spacing, use_subvoxels=True)
        yield "NSD, MONAI by sub-voxels", abs(ours.nsd - nsd.item())
        hd95 = compute_hausdorff_distance(theirs, truth, True, percentile=HD95_PERCENT, spacing=spacing)
        yield "HD95 (mm), MONAI, other definition", abs(ours.hd95_mm - hd95.item())
    brute = _brute_force(reference, prediction, spacing)
    if brute is not None:
        yield "NSD, all pairs", abs(ours.nsd - brute[0])
        yield "HD95 (mm), all pairs", abs(ours.hd95_mm - brute[1])
        yield "ASSD (mm), all pairs", abs(ours.assd_mm - brute[2])


def _surface(mask: NDArray[np.bool_], spacing: tuple[float, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions (mm) and areas (mm2) of the surface elements."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 1), (2, 2, 2))
    codes = (windows * lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL).sum(axis=(3, 4, 5))
    at = np.argwhere((codes > 0) & (codes < 255))
    areas = lookup_tables.create_table_neighbour_code_to_surface_area(spacing)[codes[tuple(at.T)]]
    return at * np.array(spacing), areas


def _brute_force(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing: tuple[float, ...]
) -> tuple[float, float, float] | None:
    """NSD, HD95 and ASSD from the distances of all pairs of surface elements; None where these are too many."""
    sides = [_surface(mask, spacing) for mask in (reference, prediction)]
    if len(sides[0][0]) * len(sides[1][0]) > MOST_PAIRS:
        return None
    percentiles, within, total, area = [], 0.0, 0.0, 0.0
    for (own, areas), (other, _) in (sides, sides[::-1]):
        starts = range(0, len(own), _CHUNK)
        distances = np.concatenate([cdist(own[start : start + _CHUNK], other).min(axis=1) for start in starts])
        order = np.argsort(distances, kind="stable")
        share = np.cumsum(areas[order]) / areas.sum()
        percentiles.append(distances[order][np.argmax(share >= HD95_PERCENT / 100)])
        within += areas[distances <= TOLERANCE_MM].sum()
        total += float(distances @ areas)
        area += areas.sum()
    return within / area, max(percentiles), total / area


def _official(pairs: Iterator[Pair], revision: str) -> dict[str, float]:
    """How many of FLARE22's scores are the official ones, and the largest difference."""
    labels = {name: value for value, name in enumerate(FLARE_TOLERANCES_MM, start=1)}
    counts: dict[str, float] = {"cases": 0, "scores": 0, "equal": 0, "crashes": 0, "largest": 0.0}
    with tempfile.TemporaryDirectory() as temporary:
        references, predictions = Path(temporary) / "references", Path(temporary) / "predictions"
        written = {pair.name: pair.write(references, predictions) for pair in pairs}
        evaluation = evaluate_folders(
            predictions, references, labels, protocol=find_protocol("flare22", revision), workers=2
        )
        rows = {(row.case, labels[row.structure]): (row.dsc, row.nsd) for row in evaluation.rows}
        crashes = {(remark.case, labels[remark.structure]) for remark in evaluation.remarks}
        counts["cases"] = len(written)
        for case, paths in written.items():
            for organ, scores in official_scores(*paths, revision).items():
                ours = rows[case, organ]
                counts["scores"] += 1
                counts["crashes"] += scores == CRASH
                is_equal = (case, organ) in crashes if scores == CRASH else ours == scores
                counts["equal"] += is_equal
                if scores != CRASH:
                    counts["largest"] = max(counts["largest"], *np.abs(np.subtract(ours, scores)).tolist())
    return counts


def _report(differences: Differences, official: dict[str, dict[str, float]], cases: int, random: int) -> str:
    rows = [
        [name, len(values), f"{max(values):.1e}", f"{np.mean(values):.1e}"]
        for name, values in sorted(differences.items())
    ]
    flare = [
        [revision, count["cases"], count["scores"], count["equal"], count["crashes"], f"{count['largest']:.0e}"]
        for revision, count in official.items()
    ]
    return (
        "## Agreement of the scores\n\nScript: `benchmarks/metrics_agreement.py`. "
        f"{cases} label maps of BTCV at 3 mm against themselves perturbed, organ by organ. MONAI computes in float32. "
        "All pairs: every distance between surface elements, where there are not more than "
        f"{MOST_PAIRS / 1e6:.0f} million. MONAI's HD95 takes centres of surface voxels, all of one weight, where ours "
        "takes surface elements by their area; it is shown for those who compare with it.\n\n"
        + table(("score, other implementation", "pairs", "largest difference", "mean"), rows)
        + f"\n\nFLARE22's official rules, restated independently, on those and {random} random cases; equal: DSC and "
        "NSD both to the last bit, and the same structures reported where the official script would end with an "
        "error.\n\n" + table(("revision", "cases", "scores", "equal", "would end it", "largest difference"), flare)
    )


if __name__ == "__main__":
    main()
