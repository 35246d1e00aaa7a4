"""cgroup files as Docker, Kubernetes, systemd and Slurm write them."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil
import pytest

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.planning import hardware

GIB = 2**30
NO_LIMIT_V1 = "9223372036854771712"


def write(root: Path, files: dict[str, str]) -> Path:
    """Write `files` (path below `root` -> text), as the kernel ends them: with a line break."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_cgroup_v2_in_a_container(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"})
    assert hardware.cgroup_cpu_quota(tmp_path) == 1.5
    assert hardware.usable_cores(tmp_path) == min(2, hardware.usable_cores())


def test_less_than_one_core_is_one(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "20000 100000"})
    assert hardware.usable_cores(tmp_path) == 1


@pytest.mark.parametrize("text", ["max 100000", "", "max", "0 100000", "x y"])
def test_cgroup_v2_without_a_quota(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": text})
    assert hardware.cgroup_cpu_quota(tmp_path) is None


def test_the_tightest_of_the_ancestors_counts(tmp_path: Path) -> None:
    """As under systemd slices and Slurm: the process's own group has no limit, the job's has."""
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/slurm/job_7/step_0",
            "sys/fs/cgroup/slurm/job_7/step_0/cpu.max": "max 100000",
            "sys/fs/cgroup/slurm/job_7/cpu.max": "300000 100000",
            "sys/fs/cgroup/slurm/cpu.max": "800000 100000",
            "sys/fs/cgroup/slurm/job_7/memory.max": str(GIB),
            "sys/fs/cgroup/slurm/memory.max": str(2 * GIB),
            "sys/fs/cgroup/slurm/other_job/memory.max": "1024",
        },
    )
    assert hardware.cgroup_cpu_quota(tmp_path) == 3
    assert hardware.memory_limit_gib(tmp_path) == 1


def test_cgroup_v1_with_the_hosts_path(tmp_path: Path) -> None:
    """Docker without a cgroup namespace: /proc names the host's path, of which only the top is mounted."""
    write(
        tmp_path,
        {
            "proc/self/cgroup": "9:name=systemd:/docker/abc\n5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(GIB),
        },
    )
    assert hardware.cgroup_cpu_quota(tmp_path) == 2.5
    assert hardware.memory_limit_gib(tmp_path) == 1


def test_cgroup_v1_without_limits(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT_V1,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "4096",
        },
    )
    assert hardware.cgroup_cpu_quota(tmp_path) is None
    assert hardware.memory_limit_gib(tmp_path) == psutil.virtual_memory().total / GIB
    assert hardware.available_memory_gib(tmp_path) == pytest.approx(psutil.virtual_memory().available / GIB, abs=1)


def test_no_cgroup_at_all(tmp_path: Path) -> None:
    """macOS and Windows."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else math.inf
    assert hardware.usable_cores(tmp_path) == min(affinity, os.cpu_count() or 1)
    assert hardware.memory_limit_gib(tmp_path) == psutil.virtual_memory().total / GIB


def test_cached_files_are_available_memory(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": str(GIB),
            "sys/fs/cgroup/memory.current": str(3 * GIB // 4),
            "sys/fs/cgroup/memory.stat": f"anon 100\ninactive_file {GIB // 2}\nactive_file 7",
        },
    )
    assert hardware.available_memory_gib(tmp_path) == 0.75


def test_available_memory_is_never_negative(tmp_path: Path) -> None:
    limits = {"memory.max": str(GIB), "memory.current": str(2 * GIB)}
    write(tmp_path, {f"sys/fs/cgroup/{name}": text for name, text in limits.items()})
    assert hardware.available_memory_gib(tmp_path) == 0


def test_this_machine() -> None:
    assert 1 <= hardware.usable_cores() <= (os.cpu_count() or 1)
    assert 0 < hardware.available_memory_gib() <= hardware.memory_limit_gib()


def test_shared_memory(tmp_path: Path) -> None:
    assert hardware.shared_memory_gib(tmp_path / "none") is None
    free = hardware.shared_memory_gib(tmp_path)
    assert free is not None
    assert free > 0


def test_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    wanted = tmp_path / "not" / "yet"
    assert hardware.nearest_existing(wanted) == tmp_path
    assert hardware.free_disk_gib(wanted) == pytest.approx(hardware.free_disk_gib(tmp_path), abs=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16\nbugs : x", ["amx_bf16", "avx512_bf16"]),
        ("flags : fpu avx2 avx512f", []),
        ("Features\t: fp asimd bf16 i8mm", ["bf16"]),
        ("model : unknown", None),
    ],
)
def test_bf16_instructions(tmp_path: Path, text: str, expected: list[str] | None) -> None:
    write(tmp_path, {"cpuinfo": text})
    assert hardware.cpu_bf16_instructions(tmp_path / "cpuinfo") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16\n", False),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16 amx_bf16\n", True),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512_bf16\n", True),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2\n", False),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("model : unknown", False),
    ],
)
def test_which_cpus_gain_by_bf16(tmp_path: Path, text: str, expected: bool) -> None:
    write(tmp_path, {"cpuinfo": text})
    assert hardware.cpu_gains_by_bf16(tmp_path / "cpuinfo") is expected


def test_bf16_instructions_where_there_is_no_cpuinfo(tmp_path: Path) -> None:
    assert hardware.cpu_bf16_instructions(tmp_path / "cpuinfo") is None
    assert not hardware.cpu_gains_by_bf16(tmp_path / "cpuinfo")


@pytest.mark.parametrize(
    ("cores", "available_gib", "worker_gib", "expected"),
    [
        (8, 64.0, 1.0, 7),  # one core is left to training
        (64, 512.0, 1.0, 12),  # nnU-Net's number
        (2, 64.0, 1.0, 1),
        (1, 64.0, 1.0, 1),  # beside a GPU the one core is idle most of the time
        (16, 8.0, 1.0, 3),  # half of the memory, and one worker more for validation
        (16, 8.0, 2.5, 0),
        (16, 0.0, 0.6, 0),
    ],
)
def test_augmentation_workers(cores: int, available_gib: float, worker_gib: float, expected: int) -> None:
    assert hardware.augmentation_workers(cores, available_gib, worker_gib) == expected


def test_more_memory_never_means_fewer_workers() -> None:
    counts = [hardware.augmentation_workers(16, gib / 4, 0.9) for gib in range(200)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 12)


def test_exported_augmentation_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_n_proc_DA", raising=False)
    assert hardware.requested_augmentation_workers() is None
    monkeypatch.setenv("nnUNet_n_proc_DA", "5")
    assert hardware.requested_augmentation_workers() == 5
    monkeypatch.setenv("nnUNet_n_proc_DA", "many")
    with pytest.raises(BadInputError, match="nnUNet_n_proc_DA is exported as 'many'"):
        hardware.requested_augmentation_workers()
