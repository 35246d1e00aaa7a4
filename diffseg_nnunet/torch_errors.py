"""What torch says in plain RuntimeErrors, told apart: memory that ran out, and a GPU that does no more work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffseg_nnunet.errors import StageFailedError

_GPU_MEMORY = ("out of memory", "ALLOC_FAILED", "unable to find an engine", "Unable to find a valid cuDNN algorithm")
_CPU_MEMORY = "DefaultCPUAllocator"
_GPU_FAILED = (
    "illegal memory access",
    "device-side assert",
    "launch failure",
    "misaligned address",
    "illegal instruction",
    "ECC error",
)
"""After these nothing that a process asks of its GPU succeeds; of others, a case's size may be the cause."""


class GpuFailedError(StageFailedError):
    """The GPU failed: nothing that this process asks of it succeeds any more."""


def is_out_of_gpu_memory(error: Exception) -> bool:
    """Whether it says that the GPU's memory ran out: torch's own error, or the words of CUDA, cuBLAS and cuDNN."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    named = isinstance(error, RuntimeError) and any(words in str(error) for words in _GPU_MEMORY)
    return named and _CPU_MEMORY not in str(error)


@contextmanager
def errors_of_torch_told_apart() -> Iterator[None]:
    """Within the block, what a RuntimeError of torch means is told by its type.

    Raises:
        MemoryError: the machine's memory ran out.
        torch.OutOfMemoryError: the GPU's did, in whosever words.
        GpuFailedError: the GPU failed.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if _CPU_MEMORY in str(error):
            raise MemoryError(str(error)) from error
        if is_out_of_gpu_memory(error):
            raise torch.OutOfMemoryError(str(error)) from error
        if any(words in str(error) for words in _GPU_FAILED):
            reason = str(error).strip().splitlines()[0]
            raise GpuFailedError(
                f"The GPU failed, and this process cannot use it any more: {reason}",
                "Run the same command again, what is finished is kept; if it recurs, look at the driver's log, or use "
                "--device cpu.",
            ) from error
        raise
