"""The device a stage runs on, and the threads torch may use beside it."""

from __future__ import annotations

import gc

import torch

from diffseg_nnunet.planning.hardware import resolve_device, usable_cores
from diffseg_nnunet.training import processes


def prepare_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda"; torch gets the cgroup's cores on the CPU and one thread beside a GPU.

    Processes that torchrun started share the node's cores, and each has a GPU of its own.

    Raises:
        BadInputError: "cuda" without a GPU.
    """
    device = torch.device(resolve_device(name))
    if device.type == "cuda" and processes.world_size() > 1:
        device = torch.device("cuda", processes.local_rank())
    cores = max(1, usable_cores() // processes.local_world_size())
    torch.set_num_threads(cores if device.type == "cpu" else 1)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    return device


def release_memory(device: torch.device) -> None:
    """Give back what an ended training held, compiled graphs too, before another begins in this process."""
    gc.collect()
    if device.type == "cuda":
        torch._dynamo.reset()
        torch.cuda.empty_cache()
