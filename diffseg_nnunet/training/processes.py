"""Processes that train together: started by torchrun, each with its share of every batch.

The group is read from the environment that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, …), so it spans
any number of nodes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

# rank 0 may preprocess, predict or write for long while the others wait
_TIMEOUT = timedelta(hours=24)


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 1


def rank() -> int:
    """This process's number among all, 0 without torchrun."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def local_rank() -> int:
    """This process's number on its node: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


def local_world_size() -> int:
    """How many of the processes share this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The group of torchrun's processes, nccl on GPUs and gloo on CPUs; nothing for a single process."""
    if world_size() == 1 or distributed.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    yield
    # after success only: nccl ends a group when all of it has ended, so a process that failed would wait for the others
    # with its error unsaid; torchrun ends the others as soon as it exits
    distributed.destroy_process_group()


def _alone() -> bool:
    return not (distributed.is_available() and distributed.is_initialized())


def from_first(value: Any) -> Any:
    """What rank 0 passes, on every process; a plain value."""
    if _alone():
        return value
    held = [value]
    distributed.broadcast_object_list(held)
    return held[0]


def gathered(value: Any) -> list[Any]:
    """What each process passes, in the order of ranks, on every process; plain values."""
    if _alone():
        return [value]
    held: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(held, value)
    return held


def wait_for_all() -> None:
    if not _alone():
        distributed.barrier()


def all_agree(condition: bool, device: torch.device) -> bool:
    """Whether the condition holds on every process."""
    if _alone():
        return condition
    flag = torch.tensor(float(condition), device=device)
    distributed.all_reduce(flag, distributed.ReduceOp.MIN)
    return bool(flag > 0)


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace each gradient by its mean over processes; in one message, since a step is long beside it.

    All processes must have gradients for the same parameters.
    """
    if _alone():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch._utils._flatten_dense_tensors(gradients)
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, mean in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(mean)


def share_of_batch(batch_size: int, group: int, processes: int) -> int:
    """Samples of each process; whole groups of samples stay together.

    Raises:
        ValueError: the batch does not divide; the message names the numbers of processes that do.
    """
    groups = batch_size // group
    if groups % processes:
        fitting = fitting_numbers(batch_size, group)
        together = ("a pair" if groups == 1 else f"{groups} pairs") if group > 1 else f"{groups} patches"
        raise ValueError(
            f"A batch of {together} cannot be shared equally by {processes} processes; "
            f"these numbers of processes can: {', '.join(map(str, fitting))}."
        )
    return groups // processes * group


def fitting_numbers(batch_size: int, group: int) -> list[int]:
    """The numbers of processes that can share a batch equally, ascending; whole groups of samples stay together."""
    groups = batch_size // group
    return [n for n in range(1, groups + 1) if groups % n == 0]


def mean_of_rows(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each entry over the rows in which it is a number."""
    means = {}
    for name in rows[0]:
        values = [row[name] for row in rows if not math.isnan(row[name])]
        means[name] = sum(values) / len(values) if values else math.nan
    return means
