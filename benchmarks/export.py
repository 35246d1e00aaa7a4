"""Export of a large scan's segmentation, slab by slab and as nnU-Net does it: seconds, peak memory, labels that differ.

Usage: python benchmarks/export.py [--size 96 512 512] [--planned 96 216 216] [--classes 14] [--turns 3]

Smooth random logits of the preprocessed size, in half precision as the sliding window makes them, become a label map of
the scan's size on disk. Every export is in a process of its own, one after the other in turn.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, process_time
from types import SimpleNamespace
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from results import table, write_section

EXPORTS = {"nnU-Net": "stock", "slab by slab": "slabs", "slab by slab, with the map of uncertainty": "slabs_and_map"}
CASE = "case"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=(96, 512, 512), help="of the scan")
    parser.add_argument("--planned", type=int, nargs=3, default=(96, 216, 216), help="of the preprocessed scan")
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in EXPORTS}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        logits = folder / "logits.npy"
        np.save(logits, _logits(options))
        for _ in range(options.turns):
            for name, kind in EXPORTS.items():
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found[name].append(pool.apply(_export, (kind, logits, tuple(options.size), folder / kind)))
        labels = [
            sitk.GetArrayFromImage(sitk.ReadImage(str(folder / kind / f"{CASE}.nii.gz"))) for kind in EXPORTS.values()
        ]
    differing = [int((each != labels[0]).sum()) for each in labels]
    write_section("export", _report(options, found, differing, labels[0].size))


def _logits(options: argparse.Namespace) -> np.ndarray:
    """Of structures some ten voxels wide."""
    coarse = torch.randn(
        (1, options.classes, *(size // 8 for size in options.planned)), generator=torch.Generator().manual_seed(0)
    )
    return torch.nn.functional.interpolate(4 * coarse, tuple(options.planned), mode="trilinear")[0].half().numpy()


def _export(kind: str, path: Path, size: tuple[int, ...], folder: Path) -> tuple[float, float, float]:
    """Seconds, processor seconds and peak resident GiB of one export, in this process."""
    from nnunetv2.inference.export_prediction import export_prediction_from_logits

    from diffseg_nnunet.inference.export import export_case
    from diffseg_nnunet.inference.uncertainty import entropy

    folder.mkdir(exist_ok=True)
    logits = np.load(path)
    predictor, properties = _predictor(logits.shape, size)
    started, processor = monotonic(), process_time()
    if kind == "stock":
        managers = predictor.configuration_manager, predictor.plans_manager, predictor.dataset_json
        export_prediction_from_logits(logits, properties, *managers, str(folder / CASE), num_threads_torch=1)
    else:
        measure = entropy(False) if kind == "slabs_and_map" else None
        export_case(torch.from_numpy(logits), properties, predictor, folder, CASE, uncertainty=measure)
    unit = 2**30 if sys.platform == "darwin" else 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return monotonic() - started, process_time() - processor, peak


def _predictor(shape: tuple[int, ...], size: tuple[int, ...]) -> tuple[Any, dict[str, Any]]:
    """What an export reads of a predictor, and of a case: voxels of the scan are 0.8 × 0.8 × 3 mm."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    scan = [3.0, 0.8, 0.8]
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "spacing": [mm * full / planned for mm, full, planned in zip(scan, size, shape[1:], strict=True)],
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling,
    }
    plans = {
        **{"dataset_name": "Dataset001_Export", "plans_name": "Plans", "label_manager": "LabelManager"},
        **{"transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "image_reader_writer": "SimpleITKIO"},
        "configurations": {"3d_fullres": configuration},
    }
    labels = {"background": 0, **{f"organ_{value}": value for value in range(1, shape[0])}}
    manager = PlansManager(plans)
    predictor = SimpleNamespace(
        plans_manager=manager,
        configuration_manager=SimpleNamespace(
            spacing=configuration["spacing"], resampling_fn_probabilities=_resampling(resampling)
        ),
        dataset_json={"labels": labels, "file_ending": ".nii.gz"},
    )
    geometry = {"spacing": tuple(scan[::-1]), "origin": (0.0, 0.0, 0.0), "direction": tuple(np.eye(3).ravel())}
    properties = {
        **{"spacing": scan, "sitk_stuff": geometry, "shape_before_cropping": size},
        "shape_after_cropping_and_before_resampling": size,
        "bbox_used_for_cropping": [[0, length] for length in size],
    }
    return predictor, properties


def _resampling(settings: dict[str, Any]) -> Any:
    from functools import partial

    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    return partial(resample_data_or_seg_to_shape, **settings)


def _report(
    options: argparse.Namespace, found: dict[str, list[tuple[float, float, float]]], differing: list[int], voxels: int
) -> str:
    rows = []
    stock = np.median(found["nnU-Net"], axis=0)
    for (name, each), count in zip(found.items(), differing, strict=True):
        seconds, processor, peak = np.median(each, axis=0)
        least, most = np.min(each, axis=0)[0], np.max(each, axis=0)[0]
        over = [f"**{value / of_stock:.2f}**" for value, of_stock in ((seconds, stock[0]), (peak, stock[2]))]
        spread = f"{seconds:.1f} ({least:.1f} to {most:.1f})"
        rows.append((name, spread, over[0], f"{processor:.1f}", f"{peak:.2f}", over[1], f"{count} of {voxels:,}"))
    size, planned = ("×".join(map(str, each)) for each in (options.size, options.planned))
    header = (
        "export",
        "seconds",
        "over nnU-Net",
        "processor seconds",
        "peak GiB",
        "over nnU-Net",
        "labels that differ",
    )
    return f"""## Export of a large scan

Script: `benchmarks/export.py`. Smooth random logits of {options.classes} classes, half precision, {planned} voxels, \
to a label map of {size} on disk: {options.turns} turns, each export in a process of its own; medians (least to \
most). Peak resident memory of the whole process, imports and the logits included.

{table(header, rows)}"""


if __name__ == "__main__":
    main()
