"""What a user is told where a plan and a GPU's memory do not go together; none is needed for it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.pipeline.device import gpu_memory_watched, gpu_of, own_gpu, prepare_device
from diffseg_nnunet.planning.gpus import Gpu
from diffseg_nnunet.planning.hardware import usable_cores

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run_out(gpu: Gpu, needed_gib: float) -> str:
    """The message of a stage whose memory runs out."""
    with pytest.raises(StageFailedError) as failed, gpu_memory_watched(gpu, needed_gib, 7, lambda _: None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return str(failed.value)


def test_a_plan_that_fits_is_left_in_peace() -> None:
    warnings: list[str] = []
    with gpu_memory_watched(Gpu(0, "Large", 70.0, 80.0), 24.0, 7, warnings.append):
        pass
    assert warnings == []


def test_a_gpu_that_is_too_small_is_refused() -> None:
    watched = gpu_memory_watched(Gpu(1, "Small", 7.6, 8.0), 20.0, 7, lambda _: None)
    with pytest.raises(BadInputError) as refused, watched:
        pytest.fail("the stage was begun")
    message = str(refused.value)
    assert "the plan needs 20.0 GiB by prediction, of the 8.0 GiB of GPU 1 (Small) 7.6 GiB are free" in message
    assert "`diffseg plan 7 --gpu-memory 6`" in message


@pytest.mark.parametrize("gpu", [Gpu(0, "Busy", 5.0, 24.0), Gpu(0, "Nearly large enough", 7.6, 7.8)])
def test_a_gpu_with_too_little_free_is_warned_of(gpu: Gpu) -> None:
    warnings: list[str] = []
    with gpu_memory_watched(gpu, 8.0, 7, warnings.append):
        pass
    (warning,) = warnings
    assert f"{gpu.free_gib} GiB are free" in warning
    assert f"--gpu-memory {int(gpu.free_gib - 1)}`" in warning


def test_memory_that_runs_out_is_explained() -> None:
    message = run_out(Gpu(0, "Busy", 5.9, 24.0), 8.0)
    assert "memory ran out: the plan needs 8.0 GiB by prediction" in message
    assert "of the 24.0 GiB of GPU 0 (Busy) 5.9 GiB were free when the stage began" in message
    assert "`diffseg plan 7 --gpu-memory 4`" in message
    assert "checkpoint is intact" in message


@pytest.mark.parametrize(("needed_gib", "proposed"), [(8.0, 7), (7.3, 7), (7.01, 7), (1.5, 1)])
def test_the_next_plan_is_smaller_where_the_prediction_was_too_low(needed_gib: float, proposed: int) -> None:
    message = run_out(Gpu(0, "Large", 70.0, 80.0), needed_gib)
    assert re.search(r"--gpu-memory (\d+)`", message)[1] == str(proposed)


def test_no_plan_is_proposed_where_nothing_is_free() -> None:
    message = run_out(Gpu(0, "Full", 0.9, 80.0), 8.0)
    assert "--gpu-memory" not in message
    assert "CUDA_VISIBLE_DEVICES" in message


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), gpu_memory_watched(Gpu(0, "Large", 70.0, 80.0), 8.0, 7, lambda _: None):
        raise KeyError


def test_nothing_is_watched_on_a_cpu() -> None:
    assert gpu_of(torch.device("cpu")) is None
    with gpu_memory_watched(None, 1000.0, 7, lambda _: None):
        pass


@pytest.fixture
def threads() -> Iterator[int]:
    """The number this process has; restored."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("exported", "torchrun", "expected"),
    [
        (None, False, usable_cores()),
        ("", False, usable_cores()),
        ("1", False, 1),
        ("1,4", False, 1),  # OpenMP's form for nested levels
        ("1024", False, usable_cores()),
        ("all", False, usable_cores()),
        ("1", True, max(1, usable_cores() // 2)),  # torchrun's own, where the user exported nothing
        ("1024", True, max(1, usable_cores() // 2)),
    ],
)
def test_exported_threads_are_a_limit(
    monkeypatch: pytest.MonkeyPatch, exported: str | None, torchrun: bool, expected: int
) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value) if torchrun else monkeypatch.delenv(name, raising=False)
    if exported is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", exported)
    torch.set_num_threads(1)
    prepare_device("cpu")
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize("rank", [0, 2])
def test_every_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Where there are too few, every process says so, with or without one: the first is the one that is heard."""
    for name, value in {**TORCHRUN, "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "LOCAL_RANK": str(rank)}.items():
        monkeypatch.setenv(name, value)
    assert own_gpu(3) == torch.device("cuda", rank)
    with pytest.raises(BadInputError, match=r"3 processes on this node, which has 2 GPU.*--nproc_per_node=2"):
        own_gpu(2)


@needs_gpu
def test_the_gpu_at_hand() -> None:
    gpu = gpu_of(torch.device("cuda"))
    assert gpu is not None
    assert 0 < gpu.free_gib <= gpu.total_gib


@needs_gpu
def test_real_memory_that_runs_out() -> None:
    gpu = gpu_of(torch.device("cuda"))
    watched = gpu_memory_watched(gpu, 1.0, 7, lambda _: None)
    with pytest.raises(StageFailedError, match="memory ran out"), watched:
        torch.empty(int(2 * gpu.total_gib) * 2**30, dtype=torch.uint8, device="cuda")
