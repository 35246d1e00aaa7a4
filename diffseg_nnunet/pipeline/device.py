"""The device a stage runs on, and the threads torch may use beside it."""

from __future__ import annotations

import gc

import torch

from diffseg_nnunet.planning.hardware import resolve_device, usable_cores


def prepare_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda"; torch gets the cgroup's cores on the CPU and one thread beside a GPU.

    Raises:
        BadInputError: "cuda" without a GPU.
    """
    device = torch.device(resolve_device(name))
    torch.set_num_threads(usable_cores() if device.type == "cpu" else 1)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    return device


def release_memory(device: torch.device) -> None:
    """Give back what an ended training held, compiled graphs too, before another begins in this process."""
    gc.collect()
    if device.type == "cuda":
        torch._dynamo.reset()
        torch.cuda.empty_cache()
