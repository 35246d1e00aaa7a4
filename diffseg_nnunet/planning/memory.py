"""Peak memory of a training step, computed without a GPU: the step is run on fake tensors, and storages are counted.

Fake tensors have shapes and storages, but no memory behind them. Every storage an operator makes is noted when it is
made and when it is freed; the largest sum of those alive is the peak, and its parts are what was alive then. Autocast
is CUDA's (:mod:`.autocast_rules`), whatever device this is run on.

What cannot be counted is allowed for (:class:`Allowances`): convolutions' workspaces, what the allocator cannot use,
and the CUDA context.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffseg_nnunet.planning.hardware import GIB

BLOCK_BYTES = 512
"""What CUDA's caching allocator rounds every tensor up to."""


@dataclass(frozen=True)
class Allowances:
    """Memory of a step that no tensor shows. [default] values, not yet calibrated on a GPU.

    Attributes:
        workspace_share: workspace of the greediest convolution, as a share of the bytes it reads and writes: cuDNN's
            fast algorithms copy both into another order of axes.
        fragmentation_share: of the allocated bytes, which the caching allocator reserves and cannot use.
        context_gib: CUDA context and libraries' kernels.
    """

    workspace_share: float = 1.0
    fragmentation_share: float = 0.03
    context_gib: float = 0.5


@dataclass(frozen=True)
class PeakMemory:
    """Memory at the moment most is taken, GiB, by part.

    Attributes:
        weights: parameters and buffers.
        gradients: those that were there at the peak.
        optimizer: its state.
        average: the moving average of the weights.
        batch: what the loader handed over, and what was drawn for it.
        activations: all else that was alive: kept for the backward pass, or on its way.
        workspace, fragmentation, context: allowed for.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    batch: float
    activations: float
    workspace: float = 0.0
    fragmentation: float = 0.0
    context: float = 0.0

    @property
    def allocated_gib(self) -> float:
        """What torch.cuda.max_memory_allocated would report."""
        return self.total_gib - self.fragmentation - self.context

    @property
    def total_gib(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Step:
    """A training step to be measured, built on fake or on real tensors.

    Attributes:
        modules: what is trained.
        optimizer: of the trained parameters.
        batch: makes the tensors the loader hands over, in any nesting.
        loss: from the batch to the scalar to minimise, with all that is alive until the backward pass has ended.
        average: tensors of a moving average; empty without.
        idle: what other phases of the training leave in memory; counted as the optimizer's.
        update_average: after the optimizer's step; None without.
        clip_norm: gradients are clipped to this norm.
        keeps_batch: whether the trainer holds the batch until the step is over, as nnU-Net does, or autograd alone
            what it needs of it.
    """

    modules: Sequence[nn.Module]
    optimizer: torch.optim.Optimizer
    batch: Callable[[], Any]
    loss: Callable[[Any], tuple[Tensor, Any]]
    average: Sequence[Tensor] = ()
    idle: Sequence[Tensor] = ()
    update_average: Callable[[], None] | None = None
    clip_norm: float = 12.0
    keeps_batch: bool = True


class StorageLog(TorchDispatchMode):
    """Notes when the storages of operators' results are made and freed; works on real and fake tensors alike."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        super().__init__()
        self._block_bytes = block_bytes
        self.events: list[tuple[int, int]] = []
        """(number of the storage, bytes: positive when it is made, negative when it is freed)."""
        self.largest_convolution = 0
        """Bytes that the convolution with most of them reads and writes."""
        self._numbers: dict[int, int] = {}
        self._watches: dict[int, Any] = {}
        self._made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note(result)
        if func._schema.name.startswith("aten::convolution"):
            touched = sum(_bytes(tensor) for tensor in tree_leaves((args, result)) if isinstance(tensor, Tensor))
            self.largest_convolution = max(self.largest_convolution, touched)
        return result

    def note(self, tensors: Any) -> set[int]:
        """Numbers of the storages of all tensors in a nesting; those not seen before are noted as made now."""
        return {self._number(tensor) for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor)}

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            number, size = self._made, -(-storage.nbytes() // self._block_bytes) * self._block_bytes
            self._made += 1
            self._numbers[key] = number
            self.events.append((number, size))

            def freed(_: Any) -> None:
                self.events.append((number, -size))
                del self._numbers[key], self._watches[key]

            self._watches[key] = weakref.ref(storage, freed)
        return self._numbers[key]

    def at_peak(self) -> dict[int, int]:
        """Storages alive when their sum was largest: number -> bytes."""
        most, total, when = 0, 0, 0
        for index, (_, size) in enumerate(self.events):
            total += size
            if total > most:
                most, when = total, index + 1
        return self.alive(when)

    def alive(self, when: int | None = None) -> dict[int, int]:
        """Storages alive after the first `when` events, now if None: number -> bytes."""
        alive: dict[int, int] = {}
        for number, size in self.events[:when]:
            if size >= 0:
                alive[number] = size
            else:
                del alive[number]
        return alive


def peak_of(step: Step, allowances: Allowances | None = None) -> PeakMemory:
    """Run a step, after one that only fills the optimizer's state, and count.

    Args:
        step: built under the fake-tensor mode, or on real tensors of the CPU.
        allowances: for what no tensor shows; None: nothing is added.
    """
    _fill_state(step.optimizer)
    log = StorageLog()
    weights = log.note([[*module.parameters(), *module.buffers()] for module in step.modules])
    states = [list(state.values()) for state in step.optimizer.state.values()]
    optimizer = log.note([states, list(step.idle)])
    average = log.note(list(step.average))
    with log:
        batch = step.batch()
        given = log.note(batch)
        loss, kept = step.loss(batch)
        if not step.keeps_batch:
            batch = None
        loss.backward()
        trained = [p for group in step.optimizer.param_groups for p in group["params"]]
        gradients = log.note([p.grad for p in trained if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(trained, step.clip_norm)
        step.optimizer.step()
        if step.update_average is not None:
            step.update_average()
        del batch, loss, kept
    alive = log.at_peak()
    named = {"weights": weights, "gradients": gradients, "optimizer": optimizer, "average": average, "batch": given}
    parts = {name: _gib(alive[number] for number in numbers if number in alive) for name, numbers in named.items()}
    parts["activations"] = _gib(alive.values()) - sum(parts.values())
    step.optimizer.zero_grad()
    return _with_allowances(PeakMemory(**parts), log.largest_convolution / GIB, allowances)


def kept_for_backward(step: Step) -> int:
    """Bytes alive between forward and backward pass beside the weights and the batch; none of the allocator's rounding.

    What is checked against real runs: everything else of a peak follows from shapes alone.
    """
    log = StorageLog(block_bytes=1)
    given = log.note([[*module.parameters(), *module.buffers()] for module in step.modules])
    with log:
        batch = step.batch()
        given |= log.note(batch)
        held = step.loss(batch)
        alive = log.alive()
    del held
    return sum(size for number, size in alive.items() if number not in given)


def _with_allowances(counted: PeakMemory, largest_convolution_gib: float, allowances: Allowances | None) -> PeakMemory:
    if allowances is None:
        return counted
    parts = counted.parts()
    parts["workspace"] = allowances.workspace_share * largest_convolution_gib
    parts["fragmentation"] = allowances.fragmentation_share * (counted.total_gib + parts["workspace"])
    parts["context"] = allowances.context_gib
    return PeakMemory(**parts)


def _fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its state, which it does in its first step, from gradients of zero."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gib(sizes: Iterable[int]) -> float:
    return sum(sizes) / GIB
