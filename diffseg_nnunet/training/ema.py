"""Exponential moving average of weights, the copy a diffusion model is used from (arXiv 2006.11239 §4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Averages all floating-point entries of some modules' state dicts.

    The decay rises to its final value, min(decay, (1 + n) / (10 + n)) after n updates, so that short runs are not
    dominated by the initial weights.

    Args:
        modules: name -> module; the averages are kept under the same names.
        decay: final decay per update.
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float):
        self.decay = decay
        self.updates = 0
        self._modules = dict(modules)
        self._average = {name: _copy_of(module) for name, module in self._modules.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, module in self._modules.items():
            pairs = [(self._average[name][k], v) for k, v in _unique_floats(module).items()]
            torch._foreach_lerp_([a for a, _ in pairs], [v for _, v in pairs], weight)

    def tensors(self) -> list[Tensor]:
        """The averages."""
        return [tensor for average in self._average.values() for tensor in average.values()]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block, the modules hold the averages; afterwards their own weights again, bit for bit."""
        own = {name: _copy_of(module) for name, module in self._modules.items()}
        self._write(self._average)
        try:
            yield
        finally:
            self._write(own)

    def keep(self) -> None:
        """Give the modules the averages for good."""
        self._write(self._average)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "decay": self.decay, "average": self._average}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        self.decay = state["decay"]
        with torch.no_grad():
            for name, average in self._average.items():
                for key, tensor in average.items():
                    tensor.copy_(state["average"][name][key])

    @torch.no_grad()
    def _write(self, source: dict[str, dict[str, Tensor]]) -> None:
        for name, module in self._modules.items():
            for key, tensor in _unique_floats(module).items():
                tensor.copy_(source[name][key])


def _unique_floats(module: nn.Module) -> dict[str, Tensor]:
    """Floating-point entries of the state dict, each tensor once (nnU-Net lists one up to four times)."""
    unique = {}
    seen: set[int] = set()
    for key, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            unique[key] = tensor.detach()
    return unique


def _copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in _unique_floats(module).items()}
