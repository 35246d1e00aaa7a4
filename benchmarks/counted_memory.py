"""Counted on fake tensors, against counted on a real run: what a step keeps for its backward pass.

Usage: python benchmarks/counted_memory.py

The other count knows nothing of ours: autograd itself hands over every tensor it keeps (saved-tensor hooks), to which
the tensors are added that the step still holds; storages are counted once, the weights' and the batch's not at all.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from results import table, write_section
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from diffseg_nnunet.coordinates.head import CoordinateSettings
from diffseg_nnunet.planners.steps import Shape, pretraining_steps, training_step
from diffseg_nnunet.planning.memory import Step, kept_for_backward
from diffseg_nnunet.training.settings import PretrainingSettings

MIB = 2**20
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Combination:
    """One row of the table; `stage` is "training", or the pretraining's coordinate mode."""

    backbone: str
    stage: str
    precision: str
    patch: tuple[int, ...]
    batch: int
    heads: int = 4
    channels: int = 1
    regions: bool = False

    def steps(self) -> Iterator[Step]:
        shape = Shape(
            architecture(self.backbone, len(self.patch)),
            self.channels,
            self.heads,
            self.patch,
            self.batch,
            self.regions,
        )
        dtype = DTYPES[self.precision]
        if self.stage == "training":
            return iter([training_step(shape, dtype)])
        return pretraining_steps(shape, PretrainingSettings(coordinates=CoordinateSettings(mode=self.stage)), dtype)


COMBINATIONS = (
    Combination("plain", "training", "float32", (32, 32, 32), 2),
    Combination("plain", "training", "bfloat16", (32, 40, 24), 2),
    Combination("plain", "training", "float16", (32, 32, 32), 3),
    Combination("plain", "training", "bfloat16", (32, 32, 32), 2, heads=118),
    Combination("plain", "training", "bfloat16", (16, 32, 32), 2, heads=3, channels=4, regions=True),
    Combination("plain", "training", "float32", (96, 64), 6),
    Combination("resenc", "training", "float32", (32, 32, 32), 2),
    Combination("resenc", "training", "bfloat16", (64, 64), 6),
    Combination("resenc", "training", "float32", (64, 96), 4, heads=14),
    Combination("plain", "auxiliary", "bfloat16", (32, 32, 32), 4),
    Combination("plain", "auxiliary", "float32", (64, 64), 8),
    Combination("plain", "guidance", "bfloat16", (32, 32, 32), 2),
    Combination("plain", "none", "float32", (24, 32, 40), 2, channels=4),
    Combination("resenc", "auxiliary", "float32", (32, 32, 32), 2),
    Combination("resenc", "guidance", "float32", (32, 32, 32), 2),
    Combination("resenc", "none", "bfloat16", (96, 64), 6),
)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows, worst = [], 0.0
    for combination in COMBINATIONS:
        computed, real = counts(combination)
        difference = computed / real - 1
        worst = max(worst, abs(difference))
        rows.append(
            [
                combination.backbone,
                combination.stage,
                combination.precision,
                " × ".join(str(side) for side in combination.patch),
                combination.batch,
                f"{combination.channels} ch, {combination.heads} {'regions' if combination.regions else 'classes'}",
                f"{computed / MIB:.2f}",
                f"{real / MIB:.2f}",
                f"{difference:+.3%}",
            ]
        )
        print(*rows[-1], flush=True)
    header = ("backbone", "stage", "precision", "patch", "batch", "of", "computed MiB", "real MiB", "difference")
    write_section(
        "counted-memory",
        "## Memory that is computed is memory that is used\n\nScript: `benchmarks/counted_memory.py`. What a step "
        "keeps between forward and backward pass beside weights and batch: computed on fake tensors, and counted on "
        "a real run by autograd's saved-tensor hooks and the tensors the step still holds. Networks of 8 features and "
        "four stages; guidance: the phase that keeps most. Half precisions by CUDA's autocast rules. Largest "
        "difference: "
        f"**{worst:.3%}** (at most 1 % wanted).\n\n" + table(header, rows),
    )


def architecture(backbone: str, dimensions: int, features: int = 8, stages: int = 4) -> dict[str, Any]:
    """nnU-Net's architecture entry of a small network."""
    kinds = {"plain": ("PlainConvUNet", "n_conv_per_stage"), "resenc": ("ResidualEncoderUNet", "n_blocks_per_stage")}
    name, blocks = kinds[backbone]
    each = [[1] * dimensions, *[[2] * dimensions] * (stages - 1)]
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": [features * 2**stage for stage in range(stages)],
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [[3] * dimensions] * stages,
            "strides": each,
            blocks: [2] * stages if backbone == "plain" else [1, 3, 4, 6][:stages],
            "n_conv_per_stage_decoder": [2 if backbone == "plain" else 1] * (stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def counts(combination: Combination) -> tuple[int, int]:
    """Bytes kept for the backward pass: computed on fake tensors, and counted on a real run."""
    with FakeTensorMode():
        computed = max(kept_for_backward(step) for step in combination.steps())
    return computed, max(counted_by_autograd(step) for step in combination.steps())


def counted_by_autograd(step: Step) -> int:
    """Bytes of the storages autograd keeps in a real forward pass, and of the tensors the step holds."""
    storages: dict[int, Tensor] = {}
    note = partial(_note, storages)
    batch = step.batch()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
        held = step.loss(batch)
    for tensor in tree_leaves(held):
        if isinstance(tensor, Tensor):
            note(tensor)
    parameters = [tensor for module in step.modules for tensor in (*module.parameters(), *module.buffers())]
    given = {_address(tensor) for tensor in (*parameters, *tree_leaves(batch))}
    return sum(kept.untyped_storage().nbytes() for address, kept in storages.items() if address not in given)


def _note(storages: dict[int, Tensor], tensor: Tensor) -> Tensor:
    storages[_address(tensor)] = tensor
    return tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


if __name__ == "__main__":
    main()
