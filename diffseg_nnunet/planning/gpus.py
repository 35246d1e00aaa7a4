"""The GPUs that torch sees, and the memory budget that planning fits to.

Importing this module is cheap; torch is imported only by the functions that ask for GPUs.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass

from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.planning.hardware import GIB

DEVICES = ("auto", "cpu", "cuda")

# Kept free on a GPU by 'auto': what a desktop or a second process takes later, and a step more than was predicted.
GPU_RESERVE_GIB = 1.0
# Without a GPU the plan shall suit a common one, so that it can be trained elsewhere; it is also nnU-Net's own target.
BUDGET_WITHOUT_GPU_GIB = 8.0
SMALLEST_BUDGET_GIB = 1.0
_FIRST_WITH_BFLOAT16 = 8  # major compute capability: Ampere


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees.

    Attributes:
        index: its number in this process, after CUDA_VISIBLE_DEVICES.
        name: as the driver reports it.
        free_gib: memory nobody holds now, GiB.
        total_gib: all its memory, GiB.
        bfloat16: whether it computes in bfloat16, which pretraining then does.
    """

    index: int
    name: str
    free_gib: float
    total_gib: float
    bfloat16: bool = True


@dataclass(frozen=True)
class MemoryBudget:
    """The peak memory a training step may take, and where that number comes from.

    It is one GPU's, however many there are: see :func:`memory_budget`.

    Attributes:
        gib: the budget, GiB.
        source: one phrase for the user.
        gpus: how many GPUs are visible; 0 without any.
        bfloat16: whether all of them compute in bfloat16; True without any.
    """

    gib: float
    source: str
    gpus: int = 0
    bfloat16: bool = True


def visible_gpus() -> list[Gpu]:
    """The GPUs torch can use, in its order, with what others use of them counted; empty without any.

    torch alone is asked, not NVML (nvidia-ml-py). What cudaMemGetInfo gives is what this process could get: it counts
    other users, it is a MIG instance's own where one is visible, and it works on ROCm and WSL. NVML numbers GPUs by PCI
    slot, before CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER, and gives a MIG instance's memory by its UUID only, so that
    the mapping would have to be guessed; and why there is no GPU, torch says in the driver's own words
    (:func:`no_gpu_reason`). What NVML has ahead, that it opens no CUDA context of some hundred MiB on every GPU, a
    short-lived process has too: it asks here, and its contexts end with it. While it asks, they count as taken, as a
    training's own would be.

    Raises:
        StageFailedError: torch sees GPUs, and the process that asks for their memory failed.
    """
    import torch

    if not torch.cuda.is_available():  # opens no context
        return []
    return _asked_in_a_process()


def _asked_in_a_process() -> list[Gpu]:
    code = f"from {__name__} import _print_gpus; _print_gpus()"
    # -P: the installed package, not a folder of that name where the user happens to be
    asked = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    if asked.returncode != 0:
        words = (asked.stderr.strip() or f"exit code {asked.returncode}").splitlines()[-1]
        raise StageFailedError(f"The GPUs' free memory cannot be read: {words}.", "See `diffseg doctor`.")
    return [Gpu(**each) for each in json.loads(asked.stdout.splitlines()[-1])]


def _print_gpus() -> None:
    print(json.dumps([asdict(gpu) for gpu in _gpus_of_this_process()]))


def _gpus_of_this_process() -> list[Gpu]:
    """The same, by contexts in this process."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError:  # too full for a context, or in exclusive use: nothing can be had
            free, total = 0, properties.total_memory
        gpus.append(Gpu(index, properties.name, free / GIB, total / GIB, _computes_bfloat16(index)))
    return gpus


def gpu_count() -> int:
    """How many GPUs torch can use; their memory is not asked for."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _computes_bfloat16(index: int) -> bool:
    """As torch.cuda.is_bf16_supported without emulation, of any GPU and without making it the current one."""
    import torch

    return torch.version.hip is not None or torch.cuda.get_device_capability(index)[0] >= _FIRST_WITH_BFLOAT16


def only_gpu(gpu: Gpu, gpus: list[Gpu]) -> dict[str, str]:
    """Variables by which a child process sees this one of the GPUs visible here; none where it is the only one."""
    if len(gpus) < 2:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else []
    return {"CUDA_VISIBLE_DEVICES": names[gpu.index] if gpu.index < len(names) else str(gpu.index)}


def no_gpu_reason() -> str | None:
    """Why torch has no GPU, as a phrase; None if it has one."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"no GPU is visible to torch, and CUDA_VISIBLE_DEVICES is '{visible}'"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # carries the driver's own words: missing, too old
        return f"no GPU is visible to torch ({str(error).strip().splitlines()[0].split('. ')[0].rstrip('.')})"
    return "no GPU is visible to torch"


def resolve_device(name: str) -> str:
    """'cpu' or 'cuda' for 'auto', 'cpu' or 'cuda'; 'auto' takes a GPU where there is one.

    Raises:
        BadInputError: the name is another, or 'cuda' is asked for and torch has no GPU; the message says why.
    """
    if name not in DEVICES:
        raise BadInputError(f"Unknown device '{name}'.", f"Known: {', '.join(DEVICES)}; pass one with --device.")
    if name == "cpu":
        return name
    reason = no_gpu_reason()
    if reason is None:
        return "cuda"
    if name == "auto":
        return "cpu"
    raise BadInputError(f"Device 'cuda' cannot be used: {reason}.", "Use --device cpu, or see `diffseg doctor`.")


def memory_budget(requested: str | float) -> MemoryBudget:
    """The peak memory to plan for: one GPU's, also where several are visible.

    nnU-Net's batch is that of a whole training, and shared by the processes that train together, so a plan must fit one
    GPU for one fold to train on each, and on whatever smaller machine comes next. Several GPUs on one training make the
    same iteration faster, with the same result, and need less memory each.

    Args:
        requested: GiB, as a number or its text, or 'auto': what is free on the visible GPU with the least of it, less
            GPU_RESERVE_GIB, rounded down to 0.1 GiB; without a GPU BUDGET_WITHOUT_GPU_GIB.

    Raises:
        BadInputError: not a number, or less than SMALLEST_BUDGET_GIB; or, with 'auto', the GPU has too little left.
    """
    if requested == "auto":
        return _automatic_budget(visible_gpus())
    try:
        gib = float(requested)
    except (TypeError, ValueError):
        gib = math.nan
    if not math.isfinite(gib) or gib < SMALLEST_BUDGET_GIB:
        raise BadInputError(
            f"'{requested}' is not a memory budget.",
            f"Give a number of GiB, at least {SMALLEST_BUDGET_GIB:g}, or 'auto'.",
        )
    count = gpu_count()
    return MemoryBudget(gib, "requested", count, all(map(_computes_bfloat16, range(count))))


def _automatic_budget(gpus: list[Gpu]) -> MemoryBudget:
    if not gpus:
        return MemoryBudget(BUDGET_WITHOUT_GPU_GIB, "no GPU is visible: a common GPU's size is assumed")
    # free memory differs between GPUs of one machine, and any of them may be the one that trains
    gpu = smallest_gpu(gpus)
    gib = math.floor((gpu.free_gib - GPU_RESERVE_GIB) * 10) / 10
    if gib < SMALLEST_BUDGET_GIB:
        raise BadInputError(
            f"GPU {gpu.index} ({gpu.name}) has only {gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free.",
            "End what uses it, choose another GPU with CUDA_VISIBLE_DEVICES, or give the budget in GiB.",
        )
    smallest = "" if len(gpus) == 1 else f", the smallest of {len(gpus)}"
    source = f"{gpu.free_gib:.1f} GiB free on GPU {gpu.index} ({gpu.name}{smallest}), {GPU_RESERVE_GIB:g} GiB reserved"
    return MemoryBudget(gib, source, len(gpus), all(gpu.bfloat16 for gpu in gpus))


def smallest_gpu(gpus: list[Gpu]) -> Gpu:
    """The one with the least free memory, which is the one a plan has to fit."""
    return min(gpus, key=lambda candidate: candidate.free_gib)
