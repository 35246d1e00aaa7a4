"""nnU-Net's patch loader with a random stream for each sample, and its sibling: pairs of patches of one scan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from diffseg_nnunet.lifetime import end_with_parent
from diffseg_nnunet.training.seeding import random_stream
from diffseg_nnunet.training.settings import PATCHES_PER_SCAN
from diffseg_nnunet.training.threads import single_threaded

from .augmentation import PatchAugmentation, box_mask, composed


class SeededLoader(nnUNetDataLoader):
    """Sample i of batch k is a function of (seed, stream, k, i): whatever the workers, the processes, and the resumes.

    Samples come in groups with one random stream each. The groups of the *global* batch are numbered through, and
    each of the processes that train together serves its part of them; `batch_size` is that part's. Call
    :meth:`start_at` before the first batch.

    Attributes:
        on_cases: called with the cases of a group before the first of them is loaded.
    """

    samples_per_group = 1
    on_cases: Callable[[Iterable[str]], None] | None = None

    def __init__(self, data: Any, batch_size: int, *args: Any, **kwargs: Any):
        if batch_size % self.samples_per_group:
            raise ValueError(f"a batch of {batch_size} has no whole groups of {self.samples_per_group}")
        super().__init__(data, self.samples_per_group, *args, **kwargs)
        self._groups = batch_size // self.samples_per_group
        self._group = 0

    def start_at(
        self, seed: int, stream: int, batch: int, workers: int, rank: int = 0, processes: int = 1
    ) -> SeededLoader:
        """Set the stream, the index of the first batch to serve, and who shares the work.

        Args:
            workers: worker processes that serve this loader's batches in turn.
            rank, processes: which part of each global batch to serve, of how many.
        """
        self._stream = (seed, stream)
        self._first = batch
        self._workers = max(1, workers)
        self._served = 0
        self._rank, self._processes = rank, processes
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
        parts = []
        # also in this process one thread, as in a worker: sums over several are rounded otherwise
        with single_threaded():
            for group in range(self._rank * self._groups, (self._rank + 1) * self._groups):
                self._group = group
                with random_stream(*self._stream, index, group):
                    parts.append(self.generate_group())
        return {name: _joined([part[name] for part in parts]) for name in parts[0]}

    @property
    def samples(self) -> int:
        """Of one batch of this process."""
        return self._groups * self.samples_per_group

    def generate_group(self) -> dict[str, Any]:
        """The samples of one group, in its random stream."""
        return super().generate_train_batch()

    def _oversample_last_XX_percent(self, sample_idx: int) -> bool:  # noqa: N802 nnU-Net's name
        """nnU-Net's rule, of the global batch: its last samples hold foreground."""
        index = self._group * self.samples_per_group + sample_idx
        total = self.samples * self._processes
        return not index < round(total * (1 - self.oversample_foreground_percent))


class RecurringLoader(SeededLoader):
    """Patches from a grid, so that they come again: the corner nnU-Net draws is moved to the next one of the grid.

    The grid's step is a quarter of the patch. A patch drawn around a voxel still holds it: it is moved by an eighth at
    most, or back to where the padded scan ends.
    """

    def get_bbox(self, data_shape: Sequence[int], *args: Any, **kwargs: Any) -> tuple[list[int], list[int]]:
        drawn, _ = super().get_bbox(data_shape, *args, **kwargs)
        lower = [
            on_grid(corner, size, patch, padding)
            for corner, size, patch, padding in zip(drawn, data_shape, self.patch_size, self.need_to_pad, strict=True)
        ]
        return lower, [corner + patch for corner, patch in zip(lower, self.patch_size, strict=True)]


def on_grid(corner: int, size: int, patch: int, padding: int) -> int:
    """The place of a patch along an axis nearest to `corner`, among those a quarter of the patch apart from the first
    on; the last possible place instead of one beyond it.

    Args:
        size: of the scan, voxels.
        padding: nnU-Net's `need_to_pad`: by half of it patches may lie outside.
    """
    padding = max(int(padding), patch - size)
    first, last = -padding // 2, size + padding // 2 + padding % 2 - patch
    step = max(1, patch // 4)
    return min(first + step * round((corner - first) / step), last)


def _joined(values: list[Any]) -> Any:
    """One batch of those of the groups: tensors, arrays, or lists of them (deep supervision)."""
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    if isinstance(values[0], list):
        return [_joined(list(each)) for each in zip(*values, strict=True)]
    return np.concatenate(values)


class PatchPairLoader(SeededLoader):
    """Batches of patches in pairs from the same scan, with the position of every voxel in the patient.

    No label is read. A batch holds:
        ``data``: float32 (B, C, ...), the augmented patches;
        ``mask``: bool (B, 1, ...), True where a voxel lies inside the scan;
        ``scan``: int64 (B,), patches with the same number come from the same scan;
        ``affine``: float64 (B, 3, 4), mm = affine[:, :, :3] @ voxel + affine[:, :, 3] for a voxel index (three numbers,
        also in 2D) of the patch, whatever the augmentation; only if positions were given;
        ``keys``: the scans' identifiers.

    Args:
        data: the pool.
        batch_size: even.
        patch_size: of the patches, 2 or 3 axes.
        augmentation: turns and scales patches, and changes their brightness; None for neither.
        matrices: case -> (3, 4) matrix from preprocessed voxel to mm, None where the scan has no direction cosines.
        probabilities: with which each case is drawn; None: all alike.
    """

    samples_per_group = PATCHES_PER_SCAN

    def __init__(
        self,
        data: Any,
        batch_size: int,
        patch_size: Sequence[int],
        label_manager: Any,
        augmentation: PatchAugmentation | None = None,
        matrices: Mapping[str, np.ndarray] | None = None,
        probabilities: np.ndarray | None = None,
    ):
        crop = patch_size if augmentation is None else augmentation.crop_size
        super().__init__(data, batch_size, crop, patch_size, label_manager, transforms=self._transform)
        self.has_ignore = False  # no label is read, so annotated voxels are no better than others
        self._augmentation = augmentation
        self._matrices = matrices
        self._probabilities = probabilities
        self._boxes: list[tuple[np.ndarray, np.ndarray]] = []
        self._to_crop: list[np.ndarray] = []

    def get_indices(self) -> np.ndarray:
        return self._announced(
            np.repeat(np.random.choice(self.indices, 1, p=self._probabilities), self.samples_per_group)
        )

    def get_bbox(self, data_shape: Sequence[int], *args: Any, **kwargs: Any) -> tuple[list[int], list[int]]:
        lower, upper = super().get_bbox(data_shape, *args, **kwargs)
        self._boxes.append((np.asarray(lower), np.asarray(data_shape)))
        return lower, upper

    def _transform(self, image: torch.Tensor, segmentation: torch.Tensor) -> dict[str, torch.Tensor]:
        """nnU-Net's hook for a cropped sample; the mask of the scan takes the segmentation's place."""
        lower, shape = self._boxes[-1]
        mask = box_mask(-lower, shape - lower, self.patch_size)
        mask = mask[:, 0] if self.patch_size_was_2d else mask
        if self._augmentation is None:
            self._to_crop.append(np.eye(3, 4))
            return {"image": image, "segmentation": mask}
        image, mask, to_crop = self._augmentation(image, mask)
        self._to_crop.append(to_crop)
        return {"image": image, "segmentation": mask}

    def generate_group(self) -> dict[str, Any]:
        self._boxes, self._to_crop = [], []
        group = super().generate_group()
        group["mask"] = group.pop("target").bool()
        group["scan"] = torch.full((self.samples_per_group,), self._group)
        if self._matrices is not None:
            affines = []
            for key, (corner, _), to_crop in zip(group["keys"], self._boxes, self._to_crop, strict=True):
                to_scan = to_crop + np.column_stack([np.zeros((3, 3)), corner])
                affines.append(composed(self._matrices[key], to_scan))
            group["affine"] = torch.from_numpy(np.stack(affines))
        return group
