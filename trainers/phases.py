"""The phases of a pretraining: each trains its own modules by its own objective, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffseg_nnunet.training.draws import Draws
from diffseg_nnunet.training.ema import ExponentialMovingAverage
from diffseg_nnunet.training.settings import PretrainingSettings

Objective = Callable[[dict[str, Tensor], Draws], dict[str, Tensor]]


class Phase:
    """Some epochs of a pretraining.

    Args:
        name: "regressor" or "denoiser".
        modules: what is trained, by name; also the names in the checkpoint.
        objective: the losses of a batch.
        epochs: first, and one past the last.
        settings: of the pretraining.
    """

    def __init__(
        self,
        name: str,
        modules: dict[str, nn.Module],
        objective: Objective,
        epochs: range,
        settings: PretrainingSettings,
    ):
        self.name, self.modules, self.objective, self.epochs = name, modules, objective, epochs
        self.parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, settings.initial_lr, weight_decay=settings.weight_decay)
        self.ema = ExponentialMovingAverage(modules, settings.ema_decay)

    def train(self, mode: bool) -> None:
        for module in self.modules.values():
            module.train(mode)

    def state_dict(self) -> dict[str, Any]:
        return {
            **{f"{name}_state": module.state_dict() for name, module in self.modules.items()},
            f"{self.name}_optimizer_state": self.optimizer.state_dict(),
            f"{self.name}_ema_state": self.ema.state_dict(),
        }

    def load_state_dict(self, content: dict[str, Any]) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(content[f"{name}_state"])
        self.optimizer.load_state_dict(content[f"{self.name}_optimizer_state"])
        self.ema.load_state_dict(content[f"{self.name}_ema_state"])
