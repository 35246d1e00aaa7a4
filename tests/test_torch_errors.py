"""What a RuntimeError of torch means, by its words; torch's own CPU allocator fails for real."""

from __future__ import annotations

import pytest
import torch

from diffseg_nnunet.torch_errors import GpuFailedError, errors_of_torch_told_apart, is_out_of_gpu_memory

FULL_CPU = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), torch.OutOfMemoryError),
        (RuntimeError("CUDA error: out of memory"), torch.OutOfMemoryError),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), torch.OutOfMemoryError),
        (RuntimeError("GET was unable to find an engine to execute this computation"), torch.OutOfMemoryError),
        (RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be"), GpuFailedError),
        (RuntimeError("CUDA error: invalid configuration argument"), RuntimeError),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), GpuFailedError),
        (RuntimeError(f"{FULL_CPU} 8 bytes. Error code 12 (Cannot allocate memory)"), MemoryError),
        (RuntimeError(f"{FULL_CPU} 8 bytes: not enough memory. Buy new RAM, out of memory"), MemoryError),
        (RuntimeError("shape mismatch"), RuntimeError),
        (KeyError("out of memory"), KeyError),
    ],
)
def test_errors_are_told_by_their_words(error: Exception, expected: type[Exception]) -> None:
    assert is_out_of_gpu_memory(error) == (expected is torch.OutOfMemoryError)
    # a validation's, within those of a training
    with pytest.raises(expected) as caught, errors_of_torch_told_apart(), errors_of_torch_told_apart():
        raise error
    assert caught.type is expected
    if expected in (RuntimeError, KeyError):
        assert caught.value is error
    if expected is GpuFailedError:
        assert "might be" not in str(caught.value)
        assert "Run the same command again" in str(caught.value)


def test_memory_that_the_machine_does_not_have() -> None:
    with pytest.raises(MemoryError), errors_of_torch_told_apart():
        torch.empty(1 << 60, dtype=torch.uint8)
