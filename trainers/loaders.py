"""nnU-Net's patch loader with one random stream per batch, and its sibling that serves pairs of patches of one scan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from queue import Empty
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from diffseg_nnunet.lifetime import end_with_parent
from diffseg_nnunet.training.seeding import random_stream
from diffseg_nnunet.training.settings import PATCHES_PER_SCAN

_RUN_DRY_S = 0.5  # a worker that has been told to pause still delivers the batch at hand


class SeededLoader(nnUNetDataLoader):
    """Batch k is a function of (seed, stream, k): the same for any number of workers and after any resume.

    Call :meth:`start_at` before the first batch.
    """

    def start_at(self, seed: int, stream: int, batch: int, workers: int) -> SeededLoader:
        """Set the stream, the index of the first batch to serve, and the number of processes that share the work."""
        self._stream = (seed, stream)
        self._first = batch
        self._workers = max(1, workers)
        self._served = 0
        return self

    def set_thread_id(self, thread_id: int) -> None:
        """Called in each worker process before its first batch."""
        super().set_thread_id(thread_id)
        end_with_parent()
        # a forked process has inherited the pool of its parent, but not the threads: it would wait for them for ever
        torch.set_num_threads(1)

    def generate_train_batch(self) -> dict[str, Any]:
        # the augmenter asks its workers in turn, so worker w serves batches w, w + workers, …
        index = self._first + self._served * self._workers + self.thread_id
        self._served += 1
        # also in this process one thread, as in a worker: sums over several are rounded otherwise
        with _one_thread(), random_stream(*self._stream, index):
            return super().generate_train_batch()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class PatchPairLoader(SeededLoader):
    """Batches of patches in pairs from the same scan, with the position of every voxel in the patient.

    Adds to nnU-Net's batch:
        ``scan``: int64 (B,), patches with the same number come from the same scan;
        ``affine``: float64 (B, 3, 4), mm = affine[:, :, :3] @ voxel + affine[:, :, 3] for a voxel index (three numbers,
        also in 2D) of the patch; only if positions were given;
        ``inside``: int64 (B, 3, 2), first and one past the last voxel per axis that lies inside the scan.

    Args:
        matrices: case -> (3, 4) matrix from preprocessed voxel to mm, None where the scan has no direction cosines.
    """

    def __init__(self, *args: Any, matrices: Mapping[str, np.ndarray] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.has_ignore = False  # no label is read, so annotated voxels are no better than others
        self._matrices = matrices
        self._boxes: list[tuple[np.ndarray, np.ndarray]] = []

    def get_indices(self) -> np.ndarray:
        scans = np.random.choice(self.indices, -(-self.batch_size // PATCHES_PER_SCAN), replace=True)
        return np.repeat(scans, PATCHES_PER_SCAN)[: self.batch_size]

    def get_bbox(self, data_shape: Sequence[int], *args: Any, **kwargs: Any) -> tuple[list[int], list[int]]:
        lower, upper = super().get_bbox(data_shape, *args, **kwargs)
        self._boxes.append((np.asarray(lower), np.asarray(data_shape)))
        return lower, upper

    def generate_train_batch(self) -> dict[str, Any]:
        self._boxes = []
        batch = super().generate_train_batch()
        batch.pop("target")  # no label is used
        corners = np.stack([corner for corner, _ in self._boxes])
        shapes = np.stack([shape for _, shape in self._boxes])
        patch = np.asarray(self.patch_size)
        batch["scan"] = torch.arange(self.batch_size) // PATCHES_PER_SCAN
        batch["inside"] = torch.from_numpy(
            np.stack([np.clip(-corners, 0, patch), np.clip(shapes - corners, 0, patch)], axis=-1).astype(np.int64)
        )
        if self._matrices is not None:
            matrices = np.stack([self._matrices[key] for key in batch["keys"]])
            offset = np.einsum("bij,bj->bi", matrices[:, :, :3], corners) + matrices[:, :, 3]
            batch["affine"] = torch.from_numpy(np.concatenate([matrices[:, :, :3], offset[:, :, None]], axis=2))
        return batch


def serve(loader: SeededLoader, workers: int, pin_memory: bool) -> MultiThreadedAugmenter | SingleThreadedAugmenter:
    """Serve batches from `workers` processes in a fixed order, or from this process if 0; the first one is ready.

    The order is that of the batch index, so the number of workers changes the speed and nothing else.
    """
    if workers == 0:
        return SingleThreadedAugmenter(loader, None)
    augmenter = MultiThreadedAugmenter(
        loader,
        None,
        workers,
        num_cached_per_queue=2,
        seeds=list(range(workers)),
        pin_memory=pin_memory,
        wait_time=0.002,
    )
    augmenter._start()  # nnU-Net starts its workers here too, before the first CUDA kernel
    return augmenter


def shut_down(served: MultiThreadedAugmenter | SingleThreadedAugmenter | None) -> None:
    """End the worker processes of :func:`serve`; nothing where they have ended."""
    if not isinstance(served, MultiThreadedAugmenter) or not served.was_initialized:
        return
    # the thread that unpacks batches would print a traceback if a worker ended meanwhile: let it run dry first
    served.pause_event.set()
    with suppress(Empty):
        while True:
            served.pin_memory_queue.get(timeout=_RUN_DRY_S)
    served._finish()
