"""The GPUs that torch sees, and the memory budget: what is asked for, or what the smallest of them has free."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.planning.gpus import (
    GPU_RESERVE_GIB,
    Gpu,
    MemoryBudget,
    _asked_in_a_process,
    _automatic_budget,
    gpu_count,
    memory_budget,
    no_gpu_reason,
    only_gpu,
    resolve_device,
    visible_gpus,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.mark.parametrize("requested", [11, 11.0, "11", " 11.0 "])
def test_a_requested_budget(requested: str | float) -> None:
    budget = memory_budget(requested)
    assert budget == MemoryBudget(11.0, "requested", gpu_count(), budget.bfloat16)


@pytest.mark.parametrize("requested", ["lots", "", "8GB", 0, -4, "0.5", 0.99, "nan", "inf", math.nan, None])
def test_an_impossible_budget(requested: str | float) -> None:
    with pytest.raises(BadInputError, match=r"not a memory budget.*'auto'"):
        memory_budget(requested)


def test_automatic_budget_takes_the_smallest_gpu() -> None:
    gpus = [Gpu(0, "Large", 70.0, 80.0), Gpu(1, "Small", 10.57, 12.0)]
    budget = _automatic_budget(gpus)
    assert budget.gib == pytest.approx(10.57 - GPU_RESERVE_GIB, abs=0.1)
    assert budget.gib <= 10.57 - GPU_RESERVE_GIB
    assert "Small" in budget.source
    assert "GPU 1" in budget.source
    assert (budget.gpus, budget.bfloat16) == (2, True)


def test_one_gpu_without_bfloat16_counts_for_all() -> None:
    gpus = [Gpu(0, "Tesla T4", 14.5, 14.7, bfloat16=False), Gpu(1, "NVIDIA L40S", 43.9, 44.4)]
    assert not _automatic_budget(gpus).bfloat16
    assert _automatic_budget([]).bfloat16


def test_automatic_budget_of_a_mig_instance() -> None:
    """A process sees one instance, with its own memory."""
    budget = _automatic_budget([Gpu(0, "NVIDIA A100-SXM4-40GB MIG 2g.10gb", 9.43, 9.75)])
    assert budget == MemoryBudget(
        8.4, "9.4 GiB free on GPU 0 (NVIDIA A100-SXM4-40GB MIG 2g.10gb), 1 GiB reserved", gpus=1
    )


def test_automatic_budget_beside_another_user() -> None:
    """Equal GPUs, of which one is partly taken: whichever trains, the plan fits."""
    gpus = [Gpu(0, "NVIDIA L40S", 43.9, 44.4), Gpu(1, "NVIDIA L40S", 21.5, 44.4), Gpu(2, "NVIDIA L40S", 43.9, 44.4)]
    budget = _automatic_budget(gpus)
    assert (budget.gib, budget.gpus) == (20.5, 3)
    assert "21.5 GiB free on GPU 1 (NVIDIA L40S, the smallest of 3)" in budget.source


def test_automatic_budget_on_a_full_gpu() -> None:
    with pytest.raises(BadInputError, match=r"GPU 0 \(Busy\) has only 1\.5 of 24\.0 GiB free"):
        _automatic_budget([Gpu(0, "Busy", 1.5, 24.0)])


def test_automatic_budget_where_not_even_a_context_can_be_had() -> None:
    with pytest.raises(BadInputError, match=r"GPU 1 \(Taken\) has only 0\.0 of 24\.0 GiB free.*CUDA_VISIBLE_DEVICES"):
        _automatic_budget([Gpu(0, "Free", 23.0, 24.0), Gpu(1, "Taken", 0.0, 24.0)])


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
    assert only_gpu(gpus[index], gpus) == {"CUDA_VISIBLE_DEVICES": expected}
    # a MIG instance that is visible by default has no number of its own
    assert only_gpu(gpus[0], gpus[:1]) == {}


def test_a_process_tells_what_it_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The installed package answers, whatever lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "diffseg_nnunet.py").write_text("raise ImportError")
    asked = _asked_in_a_process()
    assert [(gpu.index, gpu.name, gpu.total_gib) for gpu in asked] == [
        (gpu.index, gpu.name, gpu.total_gib) for gpu in visible_gpus()
    ]


@needs_no_gpu
def test_automatic_budget_without_a_gpu() -> None:
    budget = memory_budget("auto")
    assert (budget.gib, budget.gpus) == (8.0, 0)
    assert "no GPU" in budget.source


@needs_gpu
def test_automatic_budget_with_a_gpu() -> None:
    gpus = visible_gpus()
    assert all(0 < gpu.free_gib <= gpu.total_gib for gpu in gpus)
    assert len(gpus) == gpu_count()
    assert memory_budget("auto").gib < min(gpu.free_gib for gpu in gpus) + 0.5


@pytest.mark.parametrize("name", ["gpu", "cuda:0", "", "CPU"])
def test_unknown_device(name: str) -> None:
    with pytest.raises(BadInputError, match="auto, cpu, cuda"):
        resolve_device(name)


def test_device() -> None:
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert (no_gpu_reason() is None) == torch.cuda.is_available()


@needs_no_gpu
def test_cuda_without_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInputError, match=r"cannot be used: .+ Use --device cpu"):
        resolve_device("cuda")
    if torch.version.cuda:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        with pytest.raises(BadInputError, match="CUDA_VISIBLE_DEVICES is '-1'"):
            resolve_device("cuda")
