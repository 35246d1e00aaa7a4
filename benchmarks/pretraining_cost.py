"""What an iteration of pretraining costs beside one of stock nnU-Net training: same network, patch, batch, precision.

Usage: python benchmarks/pretraining_cost.py WORKSPACE [--device cpu|cuda] [--repeats 6] [--block 5] [--compile]

WORKSPACE is that of benchmarks/abdomen.py, whose options set the network's size and the patch. Stock training and each
mode of pretraining take turns, block by block, in one process. Nothing is kept: a second run measures again.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from abdomen import CONFIGURATION, LABELLED, describe, run_environment
from results import table, write_section

from diffseg_nnunet import registry
from diffseg_nnunet.pipeline.device import prepare_device
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.planning.section import diffseg_section
from diffseg_nnunet.training.settings import PretrainingSettings
from diffseg_nnunet.workspace import Workspace

STOCK, REGRESSOR, DENOISER = "stock nnU-Net", "guidance, regressor", "guidance, denoiser"
KEPT_BATCHES, WARM_UP = 4, 2
LENGTH = 1000  # iterations the pretrainers believe in: sets their rates and phases, not what is measured
TRAINING_STREAM = 0

Times = dict[str, list[list[float]]]
"""Contender -> repeats -> seconds of each iteration of the block."""


@dataclass
class Contender:
    """A trainer that takes its turns.

    Attributes:
        step: one iteration on a batch.
        loader: gives the next batch, augmented, in this process.
        batches: drawn beforehand, for the turns without loading.
        own_gib: GPU memory it holds between iterations.
        peak_gib: largest GPU memory of an iteration, all it holds included.
    """

    step: Callable[[Any], Any]
    loader: Any
    batches: list[Any] = field(default_factory=list)
    own_gib: float = 0.0
    peak_gib: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--block", type=int, default=5, help="iterations of one turn")
    parser.add_argument("--compile", action="store_true", help="torch.compile on CUDA, as nnU-Net does by default")
    options = parser.parse_args()
    os.environ.update(run_environment(options.workspace, "pretraining_cost"))
    os.environ.update(nnUNet_n_proc_DA="0", nnUNet_compile="true" if options.compile else "false")
    workspace = Workspace.locate().activate()
    device = prepare_device(options.device)
    if device.type == "cuda":
        torch.set_autocast_dtype("cuda", torch.bfloat16)  # stock nnU-Net asks for autocast without naming a type
    contenders, share = _contenders(Project.open(workspace, LABELLED), device)
    computing = _take_turns(contenders, options, device, loading=False)
    loading = _take_turns(contenders, options, device, loading=True)
    name = f"pretraining-cost-{options.device}" + ("-compiled" if options.compile else "")
    write_section(name, _report(options, contenders, computing, loading, share))


def _contenders(project: Project, device: torch.device) -> tuple[dict[str, Contender], float]:
    """The trainers, built and warmed up one after the other, and the regressor's share of guidance's iterations."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    plans = equal_plans(project.plans())
    section, pretrainer = diffseg_section(plans), registry.load("trainers", "pretrain")

    def trainer(of_class: type) -> Any:
        fresh = {**copy.deepcopy(plans), "continue_training": False}
        return of_class(fresh, CONFIGURATION, 0, project.dataset_json(), device=device)

    def stock() -> Contender:
        built = trainer(nnUNetTrainer)
        built.initialize()
        built.network.train()
        loader, _ = built.get_dataloaders()
        return Contender(built.train_step, loader)

    def pretraining(mode: str, last_phase: bool) -> Contender:
        built = trainer(pretrainer)
        built.apply(
            PretrainingSettings.from_plan(section, coordinates={"mode": mode}, iterations=LENGTH, precision="float32")
        )
        built.initialize()
        built.current_epoch = built.phases[-1 if last_phase else 0].epochs.start
        built.on_train_epoch_start()
        loader = built.build_loaders()[0].start_at(0, TRAINING_STREAM, 0, 1)
        return Contender(built.train_step, loader)

    builders: dict[str, Callable[[], Contender]] = {
        STOCK: stock,
        "none": lambda: pretraining("none", True),
        "auxiliary": lambda: pretraining("auxiliary", True),
        REGRESSOR: lambda: pretraining("guidance", False),
        DENOISER: lambda: pretraining("guidance", True),
    }
    contenders = {}
    for name, build in builders.items():
        before = _allocated_gib(device)
        contenders[name] = contender = build()
        contender.batches = [next(contender.loader) for _ in range(KEPT_BATCHES)]
        for batch in contender.batches[:WARM_UP]:
            contender.step(batch)
        contender.own_gib = _allocated_gib(device) - before
        print(f"{name}: ready", flush=True)
    return contenders, PretrainingSettings.from_plan(section).coordinates.regressor_share


def equal_plans(plans: Mapping[str, Any]) -> dict[str, Any]:
    """The plans with the pretraining's patch and batch for training too."""
    equal = copy.deepcopy(dict(plans))
    stage = equal["diffseg"]["configurations"][CONFIGURATION]["pretraining"]
    equal["configurations"][CONFIGURATION] |= {key: stage[key] for key in ("patch_size", "batch_size")}
    return equal


def _take_turns(
    contenders: Mapping[str, Contender], options: argparse.Namespace, device: torch.device, loading: bool
) -> Times:
    times: Times = {name: [] for name in contenders}
    for repeat in range(options.repeats):
        # there and back, so that a machine that slows down slows all alike
        order = list(contenders) if repeat % 2 == 0 else list(reversed(contenders))
        for name in order:
            times[name].append(_turn(contenders[name], options.block, device, loading))
        print(f"{'with' if loading else 'without'} loading: {repeat + 1} of {options.repeats}", flush=True)
    return times


def _turn(contender: Contender, block: int, device: torch.device, loading: bool) -> list[float]:
    resting = _allocated_gib(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for index in range(block):
        _wait_for(device)
        start = perf_counter()
        batch = next(contender.loader) if loading else contender.batches[index % KEPT_BATCHES]
        contender.step(batch)
        _wait_for(device)
        times.append(perf_counter() - start)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30 - resting + contender.own_gib
        contender.peak_gib = max(contender.peak_gib, peak)
    return times


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated_gib(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def with_guidance(times: Times, share: float) -> Times:
    """The same with guidance as a whole: its two phases by their share of the iterations, repeat by repeat."""
    joined = [
        [share * float(np.median(first)) + (1 - share) * float(np.median(second))]
        for first, second in zip(times[REGRESSOR], times[DENOISER], strict=True)
    ]
    return {**times, "guidance": joined}


def ratio(ours: Sequence[Sequence[float]], stock: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Ratio of the medians over all iterations, and the least and largest of the repeats' ratios."""
    of_repeats = [float(np.median(a) / np.median(b)) for a, b in zip(ours, stock, strict=True)]
    return float(np.median(np.concatenate(ours)) / np.median(np.concatenate(stock))), min(of_repeats), max(of_repeats)


def _report(
    options: argparse.Namespace, contenders: Mapping[str, Contender], computing: Times, loading: Times, share: float
) -> str:
    rows = []
    for kind, times in (("excluded", computing), ("included", loading)):
        complete = with_guidance(times, share)
        for name, of_repeats in complete.items():
            cells = [name, kind, f"{np.median(np.concatenate(of_repeats)):.3f}"]
            middle, low, high = ratio(of_repeats, complete[STOCK])
            cells.append("1" if name == STOCK else f"**{middle:.2f}** ({low:.2f} to {high:.2f})")
            if options.device == "cuda":
                cells.append(f"{contenders[name].peak_gib:.2f}" if name in contenders else "")
            rows.append(cells)
    header = ["iteration of", "loading", "seconds", "over stock"]
    precision = (
        "float32 on both sides: stock nnU-Net has no autocast on the CPU, so the bfloat16 that pretraining would take "
        "on a CPU with such instructions is left out"
    )
    if options.device == "cuda":
        header.append("peak GiB")
        compiled = "compiled" if options.compile else "not compiled"
        precision = f"bfloat16 autocast on both sides (stock nnU-Net's own is float16), {compiled}"
    return (
        f"## Cost of a pretraining iteration, {options.device.upper()}\n\nScript: `benchmarks/pretraining_cost.py`. "
        f"{describe(options.workspace)} Stock is nnunetv2's `nnUNetTrainer` with the same patch and batch, deep "
        f"supervision and augmentation as it comes; {precision}. {options.repeats} turns of {options.block} iterations "
        "each, stock and ours in turn in one process; seconds: median over iterations; ratio of medians (least and "
        "largest of the turns). Loading included means: read and augmented in the same process, in between, on both "
        f"sides. Guidance spends {share:.0%} of its iterations on the regressor.\n\n" + table(header, rows)
    )


if __name__ == "__main__":
    main()
