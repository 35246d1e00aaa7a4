"""How long a conversion takes in which no voxel changes: against hard-linking the same files, and with verification.

Writes a folder of small cases, then times ``diffseg convert`` as users run it (a process of its own, imports included)
with --no-verify and with verification, and `os.link` of every file. Writes the section "conversion-speed".

    python benchmarks/conversion.py WORK_FOLDER [--cases 200] [--runs 3] [--no-record]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from results import diffseg, table, write_section

SIZE = (48, 96, 96)
LIMIT_S = 5.0
DATASET = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the cases and the data sets are written; emptied of them")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3, help="each is timed so often; the median is reported")
    parser.add_argument("--no-record", action="store_true", help="print, and leave RESULTS.md as it is")
    options = parser.parse_args()
    source = options.folder / "source"
    megabytes = write_source(source, options.cases)
    rows = [
        ("`os.link` of every file", timed(lambda: link_all(source, options.folder / "links"), options.runs)),
        ("`diffseg convert --no-verify`", timed(lambda: convert(options.folder, "--no-verify"), options.runs)),
        ("`diffseg convert`, every voxel read and checked", timed(lambda: convert(options.folder), options.runs)),
    ]
    seconds = table(("", "seconds"), [(name, f"{duration:.2f}") for name, duration in rows])
    body = (
        f"## Speed of a conversion in which no voxel changes\n\n{options.cases} cases, {2 * options.cases} files, "
        f"{megabytes:.0f} MB; seconds, the median of {options.runs}, the process's start included. Without "
        f"verification at most {LIMIT_S:g} s are wanted.\n\n{seconds}"
    )
    print(body)
    if not options.no_record:
        write_section("conversion-speed", body)


def write_source(source: Path, cases: int) -> float:
    """Write images and labels of equal names, unless they are there; their size in MB."""
    for name in ("images", "labels"):
        (source / name).mkdir(parents=True, exist_ok=True)
    for number in range(cases):
        image = source / f"images/case_{number:03d}.nii.gz"
        if image.exists():
            continue
        rng = np.random.default_rng(number)
        label = (np.indices(SIZE).sum(axis=0) // 40 % 3).astype(np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(label), source / f"labels/case_{number:03d}.nii.gz")
        sitk.WriteImage(sitk.GetImageFromArray(rng.normal(0, 300, SIZE).astype(np.int16)), image)
    (source / "labels.json").write_text(json.dumps({"background": 0, "one": 1, "two": 2}))
    return sum(path.stat().st_size for path in source.glob("*/*.nii.gz")) / 1e6


def timed(action: Callable[[], None], runs: int) -> float:
    """Median duration, s."""
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def link_all(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for path in source.glob("*/*.nii.gz"):
        (target / path.parent.name).mkdir(parents=True, exist_ok=True)
        os.link(path, target / path.parent.name / path.name)


def convert(folder: Path, *options: str) -> None:
    shutil.rmtree(folder / "workspace", ignore_errors=True)
    source = folder / "source"
    given = ("--images", source / "images", "--labels", source / "labels", "--label-names", source / "labels.json")
    named = ("--modality", "MRI", "--id", DATASET, "--name", "Speed", "--workspace", folder / "workspace")
    diffseg("convert", "folder", *given, *named, *options)


if __name__ == "__main__":
    main()
