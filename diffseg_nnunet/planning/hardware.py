"""What this process may use: cores, memory, shared memory, disk and GPUs, and the memory budget planning fits to.

Containers and schedulers limit a process by control groups (cgroups), which psutil and os.cpu_count() do not see, so
the cgroup files are read here. A limit may be set on any ancestor of the process's own group: the tightest one counts.
Importing this module is cheap; torch is imported only by the functions that ask for GPUs.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from diffseg_nnunet.errors import BadInputError, StageFailedError

GIB = 2**30
DEVICES = ("auto", "cpu", "cuda")

# Kept free on a GPU by 'auto': what a desktop or a second process takes later, and a step more than was predicted.
GPU_RESERVE_GIB = 1.0
# Without a GPU the plan shall suit a common one, so that it can be trained elsewhere; it is also nnU-Net's own target.
BUDGET_WITHOUT_GPU_GIB = 8.0
SMALLEST_BUDGET_GIB = 1.0
MOST_AUGMENTATION_WORKERS = 12  # nnU-Net's number
WORKER_PROCESS_GIB = 0.6  # a forked worker at work: what it does not share with its parent, without its batches
_MEMORY_FOR_WORKERS = 0.5  # the rest is for training itself, for other programs, and for cached scans

_ROOT = Path("/")
_CGROUP_MOUNT = Path("sys/fs/cgroup")
_FIRST_WITH_BFLOAT16 = 8  # major compute capability: Ampere
_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")


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


def usable_cores(root: Path = _ROOT) -> int:
    """CPU cores this process may use: the least of cgroup quota (rounded up), affinity and the machine's cores; >= 1.

    Args:
        root: the folder that holds ``proc`` and ``sys``; anything but ``/`` is for tests.
    """
    counts = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        counts.append(len(os.sched_getaffinity(0)))
    quota = cgroup_cpu_quota(root)
    if quota is not None:
        counts.append(math.ceil(quota))
    return max(1, min(counts))


def worker_count() -> int:
    """Processes or threads for work on cases: the usable cores, or fewer if nnU-Net's nnUNet_def_n_proc says so."""
    wanted = os.environ.get("nnUNet_def_n_proc", "")
    return max(1, min(usable_cores(), int(wanted) if wanted.isdecimal() else usable_cores()))


def augmentation_workers(cores: int, available_gib: float, worker_gib: float) -> int:
    """Processes that make batches beside training: as many as cores and memory allow, at most nnU-Net's number.

    Args:
        cores: usable ones; one of several is left to training.
        available_gib: memory still to be had, GiB; half of it is given to workers, one more than returned among them:
            it makes the validation's batches.
        worker_gib: memory of one worker, GiB: WORKER_PROCESS_GIB and its batches.

    Returns:
        0 where the memory does not suffice for two workers: batches are better made by the training process itself.
    """
    by_memory = int(available_gib * _MEMORY_FOR_WORKERS / worker_gib) - 1
    return max(0, min(MOST_AUGMENTATION_WORKERS, max(1, cores - 1), by_memory))


def requested_augmentation_workers() -> int | None:
    """What nnU-Net's variable nnUNet_n_proc_DA asks for; None where it is not exported.

    Raises:
        BadInputError: it is no number.
    """
    text = os.environ.get("nnUNet_n_proc_DA")
    if text is None:
        return None
    if not text.strip().isdecimal():
        raise BadInputError(
            f"nnUNet_n_proc_DA is exported as '{text}', which is no number.",
            "Run `unset nnUNet_n_proc_DA`, or export 0 or more.",
        )
    return int(text)


def memory_limit_gib(root: Path = _ROOT) -> float:
    """Memory this process may use at most, GiB: the cgroup's limit or the machine's memory, whichever is less."""
    import psutil

    limits = [limit for limit, _ in _memory_groups(root)]
    return min([psutil.virtual_memory().total, *limits]) / GIB


def available_memory_gib(root: Path = _ROOT) -> float:
    """Memory still to be had, GiB: the least of what the machine and every limiting cgroup have left."""
    import psutil

    left = [limit - used for limit, used in _memory_groups(root)]
    return max(0, min([psutil.virtual_memory().available, *left])) / GIB


def shared_memory_gib(folder: Path = Path("/dev/shm")) -> float | None:
    """Free shared memory, GiB, through which worker processes hand arrays over; None where the system has no such."""
    return shutil.disk_usage(folder).free / GIB if folder.is_dir() else None


def free_disk_gib(path: Path | str) -> float:
    """Free disk space, GiB, at `path` or, where it does not exist yet, at its nearest existing ancestor."""
    return shutil.disk_usage(nearest_existing(path)).free / GIB


def nearest_existing(path: Path | str) -> Path:
    """`path` itself, or the closest of its ancestors that exists."""
    path = Path(path).expanduser().absolute()
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def cpu_bf16_instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str] | None:
    """Names of this CPU's bfloat16 instructions (empty: none; bf16 would be emulated); None where it cannot be told."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return None
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, flags=re.MULTILINE)
    return [flag for flag in _BF16_FLAGS if flag in line[1].split()] if line else None


def cpu_gains_by_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether convolutions take less time in bfloat16 than in float32 on this CPU.

    By its flags and maker, not by a measurement, which would differ from run to run. Intel's vector instructions for
    bfloat16 are slower than its float32 (benchmarks/RESULTS.md, "Floating-point formats on a CPU"); its AMX is not.
    """
    instructions = cpu_bf16_instructions(cpuinfo) or []
    if instructions == ["avx512_bf16"]:
        return re.search(r"^vendor_id\s*:\s*GenuineIntel\s*$", cpuinfo.read_text(), flags=re.MULTILINE) is None
    return bool(instructions)


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


def has_c_compiler() -> bool:
    """Whether there is what torch.compile builds its launchers with: $CC, gcc or clang."""
    return any(shutil.which(compiler) for compiler in (os.environ.get("CC", "cc"), "gcc", "clang"))


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


def cgroup_cpu_quota(root: Path = _ROOT) -> float | None:
    """The tightest CPU quota, in cores, of this process's cgroup and its ancestors (v2 or v1); None without one."""
    quotas = []
    for folder in _cgroup_folders("cpu", root):
        v2 = (_read(folder / "cpu.max") or "").split()
        quota, period = v2 if len(v2) == 2 else (_read(folder / f"cpu.cfs_{key}_us") for key in ("quota", "period"))
        if _is_count(quota) and _is_count(period) and int(quota) > 0 and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _memory_groups(root: Path) -> list[tuple[int, int]]:
    """(limit, used) in bytes of every cgroup above this process that limits its memory."""
    groups = []
    for folder in _cgroup_folders("memory", root):
        for limit_file, used_file, cache_key in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _read(folder / limit_file), _read(folder / used_file)
            if _is_count(limit):
                # cached files count as used, and are given back as soon as memory is asked for
                cached = re.search(rf"^{cache_key} (\d+)$", _read(folder / "memory.stat") or "", flags=re.MULTILINE)
                taken = int(used) - int(cached[1] if cached else 0) if _is_count(used) else 0
                groups.append((int(limit), max(0, taken)))
    return groups


def _cgroup_folders(controller: str, root: Path) -> list[Path]:
    """The folders of this process's cgroup and all its ancestors that exist, of v2 and of v1's `controller`.

    In a container the path in /proc may be the host's, of which only the mount's top exists: it is always included.
    """
    mount = root / _CGROUP_MOUNT
    folders: dict[Path, None] = {}
    for line in (_read(root / "proc/self/cgroup") or "0::/").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        tops = (mount / controller, mount / controllers) if controllers else (mount, mount / "unified")
        own = Path(path.lstrip("/"))
        for top in tops:
            folders.update({top / below: None for below in (own, *own.parents)})
    return [folder for folder in folders if folder.is_dir()]


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _is_count(text: str | None) -> bool:
    return text is not None and text.isdecimal()
