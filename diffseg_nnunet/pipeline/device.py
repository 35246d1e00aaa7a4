"""The device a stage runs on, the threads torch may use beside it, and whether a plan fits into its memory."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.planning.gpus import GPU_RESERVE_GIB, SMALLEST_BUDGET_GIB, Gpu, resolve_device
from diffseg_nnunet.planning.hardware import GIB, usable_cores
from diffseg_nnunet.torch_errors import errors_of_torch_told_apart
from diffseg_nnunet.training import processes

_HOPELESS = 1.25  # torch.compile takes less than was counted, and the allowances are generous: a little more may fit


def prepare_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda"; torch gets the cgroup's cores on the CPU and one thread beside a GPU.

    Processes that torchrun started share the node's cores, and each has a GPU of its own. An exported OMP_NUM_THREADS
    is a limit.

    Raises:
        BadInputError: "cuda" without a GPU; torchrun started more processes than the node has GPUs.
    """
    device = torch.device(resolve_device(name))
    if device.type == "cuda" and processes.world_size() > 1:
        device = own_gpu(torch.cuda.device_count())
    torch.set_num_threads(_threads() if device.type == "cpu" else 1)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    return device


def own_gpu(count: int) -> torch.device:
    """That of this process, of the `count` that all processes of its node see."""
    sharing = max(processes.local_world_size(), processes.local_rank() + 1)
    if sharing > count:
        raise BadInputError(
            f"torchrun started {sharing} processes on this node, which has {count} GPU(s): each needs one of its own.",
            f"Start torchrun with --nproc_per_node={count}.",
        )
    return torch.device("cuda", processes.local_rank())


def _threads() -> int:
    """Of this process: its share of the usable cores, and no more than OMP_NUM_THREADS where a user exported that."""
    sharing = processes.local_world_size()
    cores = max(1, usable_cores() // sharing)
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # further numbers are of nested levels
    exported = int(first) if first.isdecimal() else 0
    # torchrun itself exports 1 for several processes of a node where the user exported nothing
    by_torchrun = sharing > 1 and exported == 1
    return min(cores, exported) if exported and not by_torchrun else cores


def release_memory(device: torch.device) -> None:
    """Give back what an ended training held, compiled graphs too, before another begins in this process."""
    gc.collect()
    if device.type == "cuda":
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU with its free memory as a stage of this process finds it; None for a CPU."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    # what torch keeps of earlier stages counts as taken, but is given to this one
    kept = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return Gpu(index, torch.cuda.get_device_name(index), (free + kept) / GIB, total / GIB)


@contextmanager
def gpu_memory_watched(
    gpu: Gpu | None, needed_gib: float, dataset_id: int, warn: Callable[[str], None]
) -> Iterator[None]:
    """Refuse the stage within the block if its plan cannot fit, and say why if the GPU's memory runs out.

    Args:
        gpu: as the stage finds it; None: there is nothing to watch.
        needed_gib: the peak that the plan predicts for the stage, GiB.
        dataset_id: whose plan it is, for the command that makes another.
        warn: takes one line, where the plan needs more than is free. This alone refuses nothing: the prediction is no
            measurement, and memory may be freed meanwhile.

    Raises:
        BadInputError: the plan needs far more than the GPU has.
        StageFailedError: the memory ran out, or the GPU failed.
    """
    if gpu is None:
        yield
        return
    mend = _smaller_plan(gpu, needed_gib, dataset_id)
    needs = f"the plan needs {needed_gib:.1f} GiB by prediction"
    free = f"of the {gpu.total_gib:.1f} GiB of GPU {gpu.index} ({gpu.name}) {gpu.free_gib:.1f} GiB"
    if needed_gib > _HOPELESS * gpu.total_gib:
        raise BadInputError(f"This GPU is too small: {needs}, {free} are free.", mend)
    if needed_gib > gpu.free_gib:
        warn(f"memory may run out: {needs}, {free} are free. {mend}")
    try:
        with errors_of_torch_told_apart():
            yield
    except torch.OutOfMemoryError as error:
        message = f"The GPU's memory ran out: {needs}, {free} were free when the stage began."
        raise StageFailedError(message, f"{mend} The last checkpoint is intact.") from error


def _smaller_plan(gpu: Gpu, needed_gib: float, dataset_id: int) -> str:
    # less than is free, and less than now: the prediction may have been too low
    fitting_gib = min(math.floor(gpu.free_gib - GPU_RESERVE_GIB), math.ceil(needed_gib) - 1)
    if fitting_gib < SMALLEST_BUDGET_GIB:
        return "End what else uses the GPU, or choose another with CUDA_VISIBLE_DEVICES."
    return (
        "End what else uses the GPU, or make a plan that fits, with the other options it had: "
        f"`diffseg plan {dataset_id} --gpu-memory {fitting_gib}`."
    )
