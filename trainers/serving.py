"""Batches made ahead by worker processes, in a fixed order; a worker that fails is reported with cases and cause."""

from __future__ import annotations

import math
import mmap
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from diffseg_nnunet.errors import DiffSegError, StageFailedError
from diffseg_nnunet.planning.hardware import GIB
from diffseg_nnunet.verification.findings import listed

from .loaders import SeededLoader

PREFETCHED = 2  # batches each worker makes ahead

_SLOT_BYTES = 1 << 16  # reserved, not taken: only pages that are written to cost memory
_LENGTH_BYTES = 4
_DYING_S = 1.0  # a process closes its sockets a little before it is dead
_SHARED_MEMORY = "Enlarge /dev/shm (`docker run --shm-size=8g` or --ipc=host), or take fewer --workers"
_GO_ON = "Run the same command again to go on from the last checkpoint."
_SIGNALS = {
    "SIGKILL": ("which the kernel's out-of-memory killer sends", "Take fewer --workers, or give it more memory"),
    "SIGBUS": ("as happens where /dev/shm is too small", _SHARED_MEMORY),
}


class Served(Protocol):
    """Batches without end; raises StageFailedError where one cannot be made."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def __next__(self) -> dict[str, Any]: ...

    def shut_down(self) -> None:
        """End what makes the batches; nothing the second time."""


def serve(loader: SeededLoader, workers: int, pin_memory: bool) -> Served:
    """Serve batches from `workers` processes in a fixed order, or from this process if 0; the first ones are begun.

    The order is that of the batch index, so the number of workers changes the speed and nothing else.

    Args:
        loader: started at its first batch, with the same number of workers.
        workers: processes to fork; each uses one thread, and ends with this process.
        pin_memory: hand tensors over in page-locked memory, from which copies to a GPU are asynchronous.
    """
    return _FromWorkers(loader, workers, pin_memory) if workers > 0 else _FromHere(loader)


def batches_gib(loader: SeededLoader, channels: int) -> float:
    """Memory of the batches that one worker holds at most, GiB: those made ahead, one in the making, one in use."""
    patch = math.prod(loader.final_patch_size)
    sample = math.prod(loader.patch_size)  # before augmentation, and copies of it on the way
    voxel = 4 * channels + 4  # float32, and int16 labels with those of deep supervision
    return ((PREFETCHED + 2) * loader.samples * patch + 4 * sample) * voxel / GIB


def shut_down(served: Served | None) -> None:
    """End the worker processes of :func:`serve`; nothing where they have ended."""
    if served is not None:
        served.shut_down()


class _FromHere:
    """Batches made when they are asked for."""

    def __init__(self, loader: SeededLoader):
        self._loader = loader
        self._cases: list[str] = []
        loader.on_cases = self._note

    def _note(self, cases: Iterable[str]) -> None:
        self._cases = _distinct(cases)

    def __iter__(self) -> _FromHere:
        return self

    def __next__(self) -> dict[str, Any]:
        self._cases = []
        try:
            return next(self._loader)
        except DiffSegError:
            raise
        except Exception as error:
            raise _Failure(self._cases, _in_words(error)).as_error() from error

    def shut_down(self) -> None:
        """Nothing to end."""


class _FromWorkers:
    """Batches from the workers of torch's DataLoader, which asks them in turn."""

    def __init__(self, loader: SeededLoader, workers: int, pin_memory: bool):
        self._slots = [_Slot() for _ in range(workers)]
        self._ended = False
        with _handler_kept(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: as asked for
            batches = DataLoader(
                _Stream(loader, self._slots),
                batch_size=None,
                collate_fn=_unchanged,
                num_workers=workers,
                prefetch_factor=PREFETCHED,
                pin_memory=pin_memory,
                multiprocessing_context="fork",
                generator=torch.Generator(),  # else the workers' seeds are drawn from the training's own generator
            )
            self._batches = iter(batches)

    def __iter__(self) -> _FromWorkers:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._ended:
            raise StopIteration
        self._raise_if_any_is_dead(0)
        try:
            batch = next(self._batches)
        except Exception as error:
            self._raise_if_any_is_dead(_DYING_S, error)
            raise StageFailedError(
                f"A batch could not be taken over from an augmentation worker: {_in_words(error)}.",
                f"Take fewer --workers, or raise the limit of open files (`ulimit -n`). {_GO_ON}",
            ) from error
        if isinstance(batch, _Failure):
            raise batch.as_error()
        return batch

    def _raise_if_any_is_dead(self, wait_s: float, error: Exception | None = None) -> None:
        # DataLoader tells only some of the causes, and in words that hide them: ask the processes themselves
        workers = self._batches._workers
        dead = connection.wait([worker.sentinel for worker in workers], wait_s)
        for worker, slot in zip(workers, self._slots, strict=True):
            if worker.sentinel in dead:
                worker.join()
                raise _death_of(worker.pid, worker.exitcode, slot.cases()) from error

    def shut_down(self) -> None:
        # explicitly: an exception on its way may hold on to the iterator, whose workers end only with it
        self._ended = True
        self._batches._shutdown_workers()


class _Stream(IterableDataset):
    """In worker w of W: the batches w, w + W, … of the loader."""

    def __init__(self, loader: SeededLoader, slots: Sequence[_Slot]):
        self._loader = loader
        self._slots = slots

    def __iter__(self) -> Iterator[dict[str, Any] | _Failure]:
        worker = get_worker_info().id
        self._loader.set_thread_id(worker)
        self._loader.on_cases = self._slots[worker].note
        return self._batches(self._slots[worker])

    def _batches(self, slot: _Slot) -> Iterator[dict[str, Any] | _Failure]:
        while True:
            try:
                batch = next(self._loader)
            except Exception as error:
                yield _Failure(slot.cases(), _in_words(error))
                continue
            try:
                # Left to the queue, this would happen in a thread of its own, whose errors reach nobody. Tensors are
                # passed as open files, some ten a batch, well below the usual limit of 1024; torch's other strategy is
                # files with names, which outlive a killed job in /dev/shm.
                _move_to_shared_memory(batch)
            except Exception as error:
                yield _Failure(slot.cases(), _in_words(error), _SHARED_MEMORY)
                continue
            slot.note(())
            yield batch


class _Slot:
    """Memory shared with one forked worker: the cases at hand, to be read also after the worker was killed."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SLOT_BYTES)

    def note(self, cases: Iterable[str]) -> None:
        text = "\n".join(_distinct(cases)).encode()[: _SLOT_BYTES - _LENGTH_BYTES]
        self._memory[:_LENGTH_BYTES] = bytes(_LENGTH_BYTES)  # nothing, rather than a mixture, if killed meanwhile
        self._memory[_LENGTH_BYTES : _LENGTH_BYTES + len(text)] = text
        self._memory[:_LENGTH_BYTES] = len(text).to_bytes(_LENGTH_BYTES, "little")

    def cases(self) -> list[str]:
        length = int.from_bytes(self._memory[:_LENGTH_BYTES], "little")
        return self._memory[_LENGTH_BYTES : _LENGTH_BYTES + length].decode(errors="ignore").splitlines()


@dataclass(frozen=True)
class _Failure:
    """Instead of a batch: which cases it was to hold, and why it could not be made or handed over."""

    cases: list[str]
    reason: str
    mend: str | None = None

    def as_error(self) -> StageFailedError:
        mend = self.mend or (
            "Look at the scans with `diffseg verify`; if they are sound, remove what is preprocessed of these cases "
            "and run `diffseg preprocess`"
        )
        return StageFailedError(f"No batch could be made{_of(self.cases)}: {self.reason}.", f"{mend}. {_GO_ON}")


def _death_of(pid: int | None, exit_code: int | None, cases: Sequence[str]) -> StageFailedError:
    """What a dead worker is reported with."""
    mend = "Look at the scans with `diffseg verify`, or run it with --workers 0, which shows the error itself"
    if exit_code is not None and exit_code < 0:
        try:
            cause = signal.Signals(-exit_code).name
        except ValueError:  # real-time signals have no names
            cause = f"signal {-exit_code}"
        hint, mend = _SIGNALS.get(cause, (None, mend))
        cause = f"was ended by {cause}" + (f", {hint}" if hint else "")
    else:
        cause = f"ended by itself with exit code {exit_code}"
    at = f"; it was at work on a batch{_of(cases)}" if cases else "; it was between two batches"
    return StageFailedError(f"An augmentation worker (process {pid}) {cause}{at}.", f"{mend}. {_GO_ON}")


def _of(cases: Sequence[str]) -> str:
    return f" of {'case' if len(cases) == 1 else 'the cases'} {listed(cases)}" if cases else ""


def _in_words(error: Exception) -> str:
    text = str(error).strip().rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _distinct(cases: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(map(str, cases)))


def _unchanged(batch: Any) -> Any:
    return batch


def _move_to_shared_memory(value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value.share_memory_()
    elif isinstance(value, dict):
        _move_to_shared_memory(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _move_to_shared_memory(entry)


@contextmanager
def _handler_kept() -> Iterator[None]:
    """Leave SIGCHLD as it is: DataLoader's handler raises amid whatever runs when a worker dies, be it a checkpoint."""
    kept = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGCHLD) is not kept:  # it sets one in the main thread only
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if kept is None else kept)
