"""nnU-Net's patch loader with one random stream per batch, and its sibling that serves pairs of patches of one scan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from diffseg_nnunet.lifetime import end_with_parent
from diffseg_nnunet.training.seeding import random_stream
from diffseg_nnunet.training.settings import PATCHES_PER_SCAN


class SeededLoader(nnUNetDataLoader):
    """Batch k is a function of (seed, stream, k): the same for any number of workers and after any resume.

    Call :meth:`start_at` before the first batch.

    Attributes:
        on_cases: called with the cases of a batch before the first of them is loaded.
    """

    on_cases: Callable[[Iterable[str]], None] | None = None

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

    def get_indices(self) -> np.ndarray:
        return self._announced(super().get_indices())

    def _announced(self, cases: np.ndarray) -> np.ndarray:
        if self.on_cases is not None:
            self.on_cases(cases)
        return cases

    def generate_train_batch(self) -> dict[str, Any]:
        # the workers are asked in turn, so worker w serves batches w, w + workers, …
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
        return self._announced(np.repeat(scans, PATCHES_PER_SCAN)[: self.batch_size])

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
