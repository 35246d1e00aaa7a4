"""What the refiners of refinement.py cost: seconds and memory of a prediction, bytes of weights."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from abdomen import CONFIGURATION
from refinement_runs import TEST, WORDS, Refinement, Segmentor
from refinement_tables import Setting
from results import cached, table

from diffseg_nnunet.refinement.binary import pack_state, unpack_state
from diffseg_nnunet.refinement.network import Refiner, RefinerArchitecture
from diffseg_nnunet.training.checkpoint import load_safely
from diffseg_nnunet.workspace import NNUNET_VARIABLES

COST_CASES, THRESHOLD_BITS = 3, 0.2


def prediction_costs(refinements: Sequence[Refinement]) -> dict[str, dict[str, float]]:
    """What `diffseg predict` takes on a few held-out scans, plain and refined by the first segmentor's variants, one
    after the other."""
    first = refinements[0]
    segmentor = first.segmentor
    root = segmentor.workspace / "benchmarks" / "refinement" / "costs"
    images = root / "images"
    images.mkdir(parents=True, exist_ok=True)
    for case in segmentor.images(TEST)[:COST_CASES]:
        shutil.copy2(case.images[0], images)
    own = segmentor.results.resolve()
    contenders: dict[str, tuple[Mapping[str, str], tuple[object, ...]]] = {
        "plain": ({**first.environment, NNUNET_VARIABLES[2]: str(own)}, ("--strategy", segmentor.strategy))
    }
    for refinement in refinements:
        if refinement.segmentor == segmentor and refinement.is_trained:
            contenders[WORDS[refinement.variant]] = (refinement.environment, ("--refine",))
    threshold = ("--refine", "--refine-threshold", THRESHOLD_BITS)
    contenders[f"{WORDS[first.variant]}, above {THRESHOLD_BITS} bits"] = (first.environment, threshold)

    def measure() -> dict[str, dict[str, float]]:
        return {name: _cost(segmentor, images, root / "out", *each) for name, each in contenders.items()}

    return cached(root / f"{first.run}_{len(contenders)}.json", measure)


def _cost(
    segmentor: Segmentor, images: Path, output: Path, environment: Mapping[str, str], more: tuple[object, ...]
) -> dict[str, float]:
    """Of one command: wall and processor seconds, GiB of resident memory at most, and the share that was refined."""
    shutil.rmtree(output, ignore_errors=True)
    what = ("-d", segmentor.source.id, "-c", CONFIGURATION, "-f", segmentor.fold, *more)
    command = [str(part) for part in ("diffseg", "predict", "-i", images, "-o", output, *what)]
    print("$", *command, flush=True)
    log = output.with_name("predict.log")
    with open(log, "w", encoding="utf-8") as stream:
        started = monotonic()
        child = subprocess.Popen(command, env=dict(environment), stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)  # of this child alone, which RUSAGE_CHILDREN is not
        seconds = monotonic() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    text = log.read_text(encoding="utf-8")
    if child.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{text}")
    share = re.search(r"([\d.]+)%\s+of\s+the\s+windows", text)
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "gib": usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20),
        "share": float(share[1]) / 100 if share else 0.0,
    }


def cost_table(costs: Mapping[str, Mapping[str, float]]) -> str:
    plain = costs["plain"]
    rows = [
        (
            name,
            f"{each['seconds']:.1f} (× {each['seconds'] / plain['seconds']:.1f})",
            f"{each['processor_seconds']:.1f} (× {each['processor_seconds'] / plain['processor_seconds']:.1f})",
            f"{each['gib']:.2f} (× {each['gib'] / plain['gib']:.2f})",
            f"{each['share']:.1%}" if name != "plain" else "",
        )
        for name, each in costs.items()
    ]
    return table(("prediction", "seconds", "processor seconds", "peak resident GiB", "voxels refined"), rows)


def refiner_bytes(checkpoint: Mapping[str, Any]) -> tuple[int, int, int]:
    """Of a refiner's weights: as they are stored for inference, as float32 each, and how many of them are one bit."""
    architecture = RefinerArchitecture(**checkpoint["refiner_architecture"])
    network = Refiner(architecture)
    network.load_state_dict(unpack_state(network, checkpoint["refiner_weights"]))
    packed = pack_state(network)
    state = network.state_dict()
    bits = sum(tensor.numel() for name, tensor in state.items() if name not in packed)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
    return stored, 4 * sum(tensor.numel() for tensor in state.values()), bits


def bytes_table(refinements: Sequence[Refinement], tests: Sequence[Setting]) -> str:
    rows = []
    for variant in dict.fromkeys(each.variant for each in refinements if each.is_trained):
        own = next(each for each in refinements if each.variant == variant)
        stored, full, bits = refiner_bytes(load_safely(own.checkpoint))
        dsc = [
            f"{setting.labels} {setting.evaluations()[1].overall.dsc.mean:.3f}"
            for setting in tests
            if setting.refiner.removesuffix(")").split(" (seeds")[0] == WORDS[variant]
        ]
        weights = (f"{full // 4:,}", f"{bits:,}", f"{stored / 1e6:.2f}", f"{full / 1e6:.2f}")
        rows.append((WORDS[variant], *weights, ", ".join(dsc)))
    header = ("refiner", "weights", "of one bit", "MB stored", "MB with 4 bytes each", "DSC of the test cases")
    return table(header, rows)
