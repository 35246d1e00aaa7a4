"""What a trainer has learned, and whether two have learned the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

NewTrainer = Callable[..., Any]
Weights = dict[str, torch.Tensor]


def weights_of(trainer: Any) -> Weights:
    """All that was learned, with the moving averages."""
    phases = getattr(trainer, "phases", ())
    modules = {name: module for phase in phases for name, module in phase.modules.items()} or {
        "network": trainer.network
    }
    weights = {f"{name}.{key}": t.clone() for name, module in modules.items() for key, t in module.state_dict().items()}
    for phase in phases:
        for name, average in phase.ema.state_dict()["average"].items():
            weights |= {f"ema.{name}.{key}": tensor.clone() for key, tensor in average.items()}
    return weights


def trained(trainer: Any) -> Weights:
    trainer.initialize()
    trainer.run_training()
    return weights_of(trainer)


def resumed_from(stopped: Any, trainer: Any) -> Any:
    """`trainer`, initialised, where `stopped` was cut off."""
    assert stopped.latest_checkpoint.is_file()
    assert not stopped.final_checkpoint.exists()
    trainer.initialize()
    trainer.load_checkpoint(str(stopped.latest_checkpoint))
    return trainer


def assert_same(one: Weights, other: Weights) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def stock_network(trainer: Any, outputs: int) -> nn.Module:
    return nnUNetTrainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, outputs, enable_deep_supervision=False
    )
