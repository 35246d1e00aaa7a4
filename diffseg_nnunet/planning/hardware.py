"""What this process may use of its machine: cores and their instructions, memory, shared memory and disk.

Containers and schedulers limit a process by control groups (cgroups), which psutil and os.cpu_count() do not see, so
the cgroup files are read here. A limit may be set on any ancestor of the process's own group: the tightest one counts.
Importing this module is cheap: it knows no torch. GPUs are in :mod:`~diffseg_nnunet.planning.gpus`.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from pathlib import Path

from diffseg_nnunet.errors import BadInputError

GIB = 2**30
MOST_AUGMENTATION_WORKERS = 12  # nnU-Net's number
WORKER_PROCESS_GIB = 0.6  # a forked worker at work: what it does not share with its parent, without its batches
_MEMORY_FOR_WORKERS = 0.5  # the rest is for training itself, for other programs, and for cached scans

_ROOT = Path("/")
_CGROUP_MOUNT = Path("sys/fs/cgroup")
_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")


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
    bfloat16 are no faster than its float32 (benchmarks/RESULTS.md, "Floating-point formats on a CPU"); its AMX is not.
    """
    instructions = cpu_bf16_instructions(cpuinfo) or []
    if instructions == ["avx512_bf16"]:
        return re.search(r"^vendor_id\s*:\s*GenuineIntel\s*$", cpuinfo.read_text(), flags=re.MULTILINE) is None
    return bool(instructions)


def has_c_compiler() -> bool:
    """Whether there is what torch.compile builds its launchers with: $CC, gcc or clang."""
    return any(shutil.which(compiler) for compiler in (os.environ.get("CC", "cc"), "gcc", "clang"))


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
