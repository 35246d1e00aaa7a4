"""What a training iteration takes on this CPU, by floating-point format and by how weights lie in memory.

Usage: python benchmarks/cpu_formats.py WORKSPACE ID [--repeats 6] [--block 5]

The data set is planned and preprocessed. The formats take turns in one process, on the same kept batches.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from abdomen import CONFIGURATION
from pretraining_cost import ratio
from results import table, write_section

from diffseg_nnunet import registry
from diffseg_nnunet.pipeline.device import prepare_device
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.planning.hardware import cpu_bf16_instructions, cpu_gains_by_bf16
from diffseg_nnunet.training.settings import SegmentationSettings
from diffseg_nnunet.workspace import Workspace

BASE, BF16, OURS = "float32", "bfloat16", "float32, channels innermost"
KEPT_BATCHES = WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("id", type=int)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--block", type=int, default=5, help="iterations of one turn")
    options = parser.parse_args()
    device = prepare_device("cpu")
    project = Project.open(Workspace.locate(options.workspace.resolve()).activate(), options.id)
    trainers = {name: _trainer(project, device, name) for name in (BASE, OURS, BF16)}
    rows = _rows(trainers, _take_turns(trainers, options.repeats, options.block))
    write_section(f"cpu-formats-{project.name}", _report(options, project.name, rows))


def _trainer(project: Project, device: torch.device, name: str) -> tuple[Any, list[dict]]:
    """A trainer after its first steps, and batches for more."""
    plans = {**copy.deepcopy(project.plans()), "continue_training": False}
    trainer = registry.load("trainers", "scratch")(plans, CONFIGURATION, 0, project.dataset_json(), device=device)
    trainer.disable_checkpointing = True
    precision = "bfloat16" if name == BF16 else "float32"
    trainer.apply(SegmentationSettings(optimizer="adamw", precision=precision, workers=0))
    trainer.on_train_start()
    if name == BASE:
        trainer.network.to(memory_format=torch.contiguous_format)
    trainer.on_train_epoch_start()
    batches = [next(trainer.dataloader_train) for _ in range(KEPT_BATCHES)]
    for batch in batches[:WARM_UP]:
        trainer.train_step(batch)
    return trainer, batches


def _take_turns(trainers: dict[str, tuple[Any, list[dict]]], repeats: int, block: int) -> dict[str, list[list[float]]]:
    times: dict[str, list[list[float]]] = {name: [] for name in trainers}
    for repeat in range(repeats):
        for name in trainers if repeat % 2 == 0 else reversed(trainers):
            trainer, batches = trainers[name]
            seconds = []
            for index in range(block):
                start = perf_counter()
                trainer.train_step(batches[index % KEPT_BATCHES])
                seconds.append(perf_counter() - start)
            times[name].append(seconds)
    return times


def _rows(trainers: dict[str, Any], times: dict[str, list[list[float]]]) -> list[list[str]]:
    plan = next(iter(trainers.values()))[0].configuration_manager
    features = plan.network_arch_init_kwargs["features_per_stage"][0]
    patch = f"{plan.batch_size} × {'×'.join(map(str, plan.patch_size))}"
    rows = []
    for name, of_repeats in times.items():
        middle, low, high = ratio(of_repeats, times[BASE])
        over = "1" if name == BASE else f"**{middle:.2f}** ({low:.2f} to {high:.2f})"
        rows.append([features, patch, name, f"{np.median(np.concatenate(of_repeats)):.3f}", over])
    return rows


def _report(options: argparse.Namespace, dataset: str, rows: list[list[str]]) -> str:
    taken = BF16 if cpu_gains_by_bf16() else OURS
    return (
        f"## Floating-point formats on a CPU: {dataset}\n\nScript: `benchmarks/cpu_formats.py`. Seconds of a training "
        f"iteration, loading excluded, AdamW, {torch.get_num_threads()} thread(s): {options.repeats} turns of "
        f"{options.block} iterations each, in turn in one process; medians, and the ratio of medians (least and "
        "largest of the turns). "
        "`bfloat16` is autocast, with weights as torch lays them out. This CPU's instructions for bfloat16: "
        f"{', '.join(cpu_bf16_instructions() or []) or 'none'}; trainings on it take {taken}.\n\n"
        + table(["features", "batch", "format", "seconds", "over float32"], rows)
    )


if __name__ == "__main__":
    main()
