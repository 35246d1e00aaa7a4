"""cgroup files as Docker, Kubernetes, systemd and Slurm write them, and the memory budget."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil
import pytest
import torch

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.planning import hardware
from diffseg_nnunet.planning.hardware import Gpu, MemoryBudget

GIB = 2**30
NO_LIMIT_V1 = "9223372036854771712"

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


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


@pytest.mark.parametrize("requested", [11, 11.0, "11", " 11.0 "])
def test_a_requested_budget(requested: str | float) -> None:
    budget = hardware.memory_budget(requested)
    assert budget == MemoryBudget(11.0, "requested", hardware.gpu_count(), budget.bfloat16)


@pytest.mark.parametrize("requested", ["lots", "", "8GB", 0, -4, "0.5", 0.99, "nan", "inf", math.nan, None])
def test_an_impossible_budget(requested: str | float) -> None:
    with pytest.raises(BadInputError, match=r"not a memory budget.*'auto'"):
        hardware.memory_budget(requested)


def test_automatic_budget_takes_the_smallest_gpu() -> None:
    gpus = [Gpu(0, "Large", 70.0, 80.0), Gpu(1, "Small", 10.57, 12.0)]
    budget = hardware._automatic_budget(gpus)
    assert budget.gib == pytest.approx(10.57 - hardware.GPU_RESERVE_GIB, abs=0.1)
    assert budget.gib <= 10.57 - hardware.GPU_RESERVE_GIB
    assert "Small" in budget.source
    assert "GPU 1" in budget.source
    assert (budget.gpus, budget.bfloat16) == (2, True)


def test_one_gpu_without_bfloat16_counts_for_all() -> None:
    gpus = [Gpu(0, "Tesla T4", 14.5, 14.7, bfloat16=False), Gpu(1, "NVIDIA L40S", 43.9, 44.4)]
    assert not hardware._automatic_budget(gpus).bfloat16
    assert hardware._automatic_budget([]).bfloat16


def test_automatic_budget_of_a_mig_instance() -> None:
    """A process sees one instance, with its own memory."""
    budget = hardware._automatic_budget([Gpu(0, "NVIDIA A100-SXM4-40GB MIG 2g.10gb", 9.43, 9.75)])
    assert budget == MemoryBudget(
        8.4, "9.4 GiB free on GPU 0 (NVIDIA A100-SXM4-40GB MIG 2g.10gb), 1 GiB reserved", gpus=1
    )


def test_automatic_budget_beside_another_user() -> None:
    """Equal GPUs, of which one is partly taken: whichever trains, the plan fits."""
    gpus = [Gpu(0, "NVIDIA L40S", 43.9, 44.4), Gpu(1, "NVIDIA L40S", 21.5, 44.4), Gpu(2, "NVIDIA L40S", 43.9, 44.4)]
    budget = hardware._automatic_budget(gpus)
    assert (budget.gib, budget.gpus) == (20.5, 3)
    assert "21.5 GiB free on GPU 1 (NVIDIA L40S, the smallest of 3)" in budget.source


def test_automatic_budget_on_a_full_gpu() -> None:
    with pytest.raises(BadInputError, match=r"GPU 0 \(Busy\) has only 1\.5 of 24\.0 GiB free"):
        hardware._automatic_budget([Gpu(0, "Busy", 1.5, 24.0)])


def test_automatic_budget_where_not_even_a_context_can_be_had() -> None:
    with pytest.raises(BadInputError, match=r"GPU 1 \(Taken\) has only 0\.0 of 24\.0 GiB free.*CUDA_VISIBLE_DEVICES"):
        hardware._automatic_budget([Gpu(0, "Free", 23.0, 24.0), Gpu(1, "Taken", 0.0, 24.0)])


@pytest.mark.parametrize(
    ("visible", "index", "expected"),
    [(None, 1, "1"), ("3, 5", 1, "5"), ("3,5", 0, "3"), ("GPU-8f2a,GPU-77a0", 1, "GPU-77a0")],
)
def test_one_gpu_for_a_child(monkeypatch: pytest.MonkeyPatch, visible: str | None, index: int, expected: str) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus = [Gpu(number, "Any", 20.0, 24.0) for number in range(2)]
    assert hardware.only_gpu(gpus[index], gpus) == {"CUDA_VISIBLE_DEVICES": expected}
    # a MIG instance that is visible by default has no number of its own
    assert hardware.only_gpu(gpus[0], gpus[:1]) == {}


def test_a_process_tells_what_it_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The installed package answers, whatever lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "diffseg_nnunet.py").write_text("raise ImportError")
    asked = hardware._asked_in_a_process()
    assert [(gpu.index, gpu.name, gpu.total_gib) for gpu in asked] == [
        (gpu.index, gpu.name, gpu.total_gib) for gpu in hardware.visible_gpus()
    ]


@needs_no_gpu
def test_automatic_budget_without_a_gpu() -> None:
    budget = hardware.memory_budget("auto")
    assert (budget.gib, budget.gpus) == (8.0, 0)
    assert "no GPU" in budget.source


@needs_gpu
def test_automatic_budget_with_a_gpu() -> None:
    gpus = hardware.visible_gpus()
    assert all(0 < gpu.free_gib <= gpu.total_gib for gpu in gpus)
    assert len(gpus) == hardware.gpu_count()
    assert hardware.memory_budget("auto").gib < min(gpu.free_gib for gpu in gpus) + 0.5


@pytest.mark.parametrize("name", ["gpu", "cuda:0", "", "CPU"])
def test_unknown_device(name: str) -> None:
    with pytest.raises(BadInputError, match="auto, cpu, cuda"):
        hardware.resolve_device(name)


def test_device() -> None:
    assert hardware.resolve_device("cpu") == "cpu"
    assert hardware.resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert (hardware.no_gpu_reason() is None) == torch.cuda.is_available()


@needs_no_gpu
def test_cuda_without_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInputError, match=r"cannot be used: .+ Use --device cpu"):
        hardware.resolve_device("cuda")
    if torch.version.cuda:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        with pytest.raises(BadInputError, match="CUDA_VISIBLE_DEVICES is '-1'"):
            hardware.resolve_device("cuda")
