"""Batches that depend on (seed, stream, index) alone, and patches that know where they lie."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from diffseg_nnunet.trainers import DiffSegPretrainer, DiffSegTrainer, DiffSegTrainerLinear
from diffseg_nnunet.trainers.loaders import PatchPairLoader, RecurringLoader, SeededLoader, _joined, on_grid
from diffseg_nnunet.trainers.serving import serve, shut_down

LABELS = LabelManager({"background": 0, "organ": 1}, regions_class_order=None)
SHAPES = {"large": (12, 17, 15), "small": (5, 20, 3), "tiny": (2, 3, 4)}


def served(loader: SeededLoader, workers: int, count: int, first: int = 0, seed: int = 7) -> list[dict[str, Any]]:
    """`count` batches from batch `first` on; a worker that hangs is an error."""
    batches = serve(loader.start_at(seed, 0, first, workers), workers, pin_memory=False)
    if workers == 0:
        return [next(batches) for _ in range(count)]
    with ThreadPoolExecutor(1) as waiting:
        try:
            return [waiting.submit(next, batches).result(timeout=100) for _ in range(count)]
        finally:
            shut_down(batches)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple, np.ndarray)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


@pytest.mark.parametrize("trainer_class", [DiffSegPretrainer, DiffSegTrainer])
def test_batches_depend_on_their_index_alone(new_trainer: Callable[..., Any], trainer_class: type) -> None:
    trainer = new_trainer(trainer_class)
    trainer.initialize()
    loader, _ = trainer.build_loaders()
    batches = served(loader, 0, 7)
    assert same(served(loader, 0, 7), batches)
    assert same(served(loader, 1, 3), batches[:3])
    assert same(served(loader, 3, 7), batches)
    # as after a resume
    assert same(served(loader, 0, 2, first=4), batches[4:6])
    assert same(served(loader, 3, 4, first=2), batches[2:6])
    # all different, though their keys may repeat
    assert not any(same(a["data"], b["data"]) for i, a in enumerate(batches) for b in batches[:i])
    assert not same(served(loader, 0, 1, seed=8)[0]["data"], batches[0]["data"])


@given(
    size=st.integers(1, 80),
    patch=st.integers(1, 40),
    margin=st.integers(0, 10),
    place=st.floats(0, 1, exclude_max=True),
)
def test_patches_of_a_grid_come_again_and_hold_what_they_were_drawn_around(
    size: int, patch: int, margin: int, place: float
) -> None:
    """Where nnU-Net may draw a patch, and around whichever voxel."""
    padding = max(margin, patch - size)
    first, last = -padding // 2, size + padding // 2 + padding % 2 - patch
    voxel = int(place * size)
    drawn = max(first, voxel - patch // 2)  # as nnU-Net, which bounds it below alone
    found = on_grid(drawn, size, patch, margin)
    assert first <= found <= last
    assert found <= voxel < found + patch
    grid = {*range(first, last + 1, max(1, patch // 4)), last}
    assert {on_grid(corner, size, patch, margin) for corner in range(first, last + patch)} <= grid


def test_windows_come_again(new_trainer: Callable[..., Any]) -> None:
    trainer = new_trainer(DiffSegTrainerLinear)
    trainer.initialize()
    loader, validation = trainer.build_loaders()
    assert isinstance(loader, RecurringLoader)
    assert not isinstance(validation, RecurringLoader)
    patches = [patch for batch in served(loader, 0, 40) for patch in batch["data"]]
    assert patches[0].shape[1:] == tuple(trainer.configuration_manager.patch_size)
    assert len({patch.numpy().tobytes() for patch in patches}) < len(patches)


def test_workers_do_not_wait_for_threads_they_lack(new_trainer: Callable[..., Any]) -> None:
    """A forked worker that used its parent's pool of threads would never answer; nor may batches depend on threads."""
    trainer = new_trainer(DiffSegTrainer)
    trainer.initialize()
    loader, _ = trainer.build_loaders()
    expected = served(loader, 0, 4)
    start_threads()
    assert same(served(loader, 2, 4), expected)
    assert same(served(loader, 0, 4), expected)
    assert torch.get_num_threads() == 2


def start_threads() -> None:
    """Have torch start the threads of this process, for its own loops and for its matrix products."""
    torch.set_num_threads(2)
    large = torch.ones(300, 300)
    assert (large @ large)[0, 0] == 300
    assert torch.ones(10**6).mul(2).sum() == 2 * 10**6


@pytest.mark.parametrize("trainer_class", [DiffSegPretrainer, DiffSegTrainer])
def test_caller_is_not_reseeded(new_trainer: Callable[..., Any], trainer_class: type) -> None:
    trainer = new_trainer(trainer_class)
    trainer.initialize()
    loader, _ = trainer.build_loaders()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    first = torch.rand(1)
    served(loader, 0, 1)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)


def test_augmentation_does_not_depend_on_timing(new_trainer: Callable[..., Any]) -> None:
    """batchgeneratorsv2's blur can time two algorithms, and take the faster; their results differ by rounding."""
    trainer = new_trainer(DiffSegTrainer)
    trainer.initialize()
    loader, _ = trainer.build_loaders()
    names = []

    def visit(transform: Any) -> None:
        names.append(type(transform).__name__)
        assert not getattr(transform, "benchmark", False), names[-1]
        for inner in [*getattr(transform, "transforms", ()), getattr(transform, "transform", None)]:
            if inner is not None:
                visit(inner)

    visit(loader.transforms)
    assert {"GaussianBlurTransform", "SpatialTransform"} <= set(names)


class Draws:
    """A transform that writes what the three generators say into the patch."""

    def __call__(self, image: torch.Tensor, segmentation: torch.Tensor) -> dict[str, torch.Tensor]:
        image = torch.zeros_like(image)
        image.view(-1)[:3] = torch.tensor([random.random(), np.random.rand(), torch.rand(1).item()])
        return {"image": image, "segmentation": segmentation}


@pytest.fixture
def matrices() -> dict[str, np.ndarray]:
    """Where the voxels of each case lie: any affine map."""
    rng = np.random.default_rng(0)
    return {case: np.column_stack([rng.normal(0, 3, (3, 3)), rng.uniform(-200, 200, 3)]) for case in SHAPES}


@pytest.fixture
def cases(tmp_path: Path, matrices: dict[str, np.ndarray]) -> nnUNetDatasetBlosc2:
    """Preprocessed cases whose first three channels are positions in mm, and whose last is 1 within the scan."""
    for case, shape in SHAPES.items():
        voxels = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
        positions = np.einsum("ij,j...->i...", matrices[case][:, :3], voxels) + matrices[case][:, 3, None, None, None]
        data = np.concatenate([positions, np.ones((1, *shape))]).astype(np.float32)
        size = {"chunks": (1, *shape), "blocks": (1, *shape)}
        nnUNetDatasetBlosc2.save_case(
            data, np.zeros((1, *shape), np.int16), {"class_locations": {}}, str(tmp_path / case), **size
        )
    return nnUNetDatasetBlosc2(str(tmp_path), list(SHAPES))


def pair_loader(cases: Any, batch: int, patch: tuple[int, ...], matrices: Any = None) -> PatchPairLoader:
    return PatchPairLoader(cases, batch, patch, LABELS, matrices=matrices)


def test_workers_have_streams_of_their_own(cases: nnUNetDatasetBlosc2) -> None:
    """Stock nnU-Net's workers share one torch stream: their first augmentations are the same."""
    loader = SeededLoader(cases, 3, (4, 4, 4), (4, 4, 4), LABELS, transforms=Draws())
    draws = torch.stack([batch["data"].flatten(1)[:, :3] for batch in served(loader, 2, 6)]).flatten()
    assert len(draws) == 6 * 3 * 3
    assert len(draws.unique()) == len(draws)


@pytest.mark.usefixtures("one_thread")
def test_large_batches_are_handed_over(cases: nnUNetDatasetBlosc2) -> None:
    """Workers copy batches into shared memory in a thread of its own; where these are large, on several more."""
    loader = pair_loader(cases, 2, (64, 64, 64))
    expected = served(loader, 0, 3)
    start_threads()
    assert same(served(loader, 2, 3), expected)


@pytest.mark.parametrize("batch_size", [2, 6])
def test_pairs_come_from_one_scan(cases: nnUNetDatasetBlosc2, batch_size: int) -> None:
    seen = set()
    for batch in served(pair_loader(cases, batch_size, (4, 4, 4)), 0, 12):
        assert batch["data"].shape == (batch_size, 4, 4, 4, 4)
        assert batch["scan"].tolist() == [index // 2 for index in range(batch_size)]
        assert "target" not in batch
        assert "affine" not in batch
        for start in range(0, batch_size, 2):
            assert len(set(batch["keys"][start : start + 2])) == 1
        seen |= set(batch["keys"])
    assert seen == set(SHAPES)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_of_odd_patches_has_no_pairs(cases: nnUNetDatasetBlosc2, batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"a batch of {batch_size} has no whole groups of 2"):
        pair_loader(cases, batch_size, (4, 4, 4))


@pytest.mark.parametrize("trainer_class", [DiffSegPretrainer, DiffSegTrainer])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batches_of_one(
    new_trainer: Callable[..., Any], trainer_class: type, processes: int
) -> None:
    """Augmented, with positions, and with foreground where the whole batch has it: each serves its part, in order."""
    trainer = new_trainer(trainer_class, "2d" if trainer_class is DiffSegTrainer else "3d_fullres")
    trainer.initialize()

    def batches_of(rank: int, count: int) -> list[dict[str, Any]]:
        trainer.batch_size = 12 // count
        loader, _ = trainer.build_loaders()
        loader.start_at(5, 0, 3, 1, rank, count)
        return [next(loader) for _ in range(2)]

    shares = [batches_of(rank, processes) for rank in range(processes)]
    for index, whole in enumerate(batches_of(0, 1)):
        parts = [share[index] for share in shares]
        assert same(_joined([part["keys"] for part in parts]), whole["keys"])
        for name in whole:
            assert same(_joined([part[name] for part in parts]), whole[name]), name


@pytest.mark.parametrize("percent", [0.33, 1.0])
@pytest.mark.parametrize(("batch_size", "processes"), [(2, 2), (5, 1), (6, 2), (12, 4)])
def test_foreground_is_that_of_the_global_batch(
    tmp_path: Path, percent: float, batch_size: int, processes: int
) -> None:
    """Of a scan with one organ voxel, those samples show it that must by nnU-Net's rule for the whole batch."""
    shape, organ = (12, 40, 40), (6, 38, 2)
    data, target = np.zeros((1, *shape), np.float32), np.zeros((1, *shape), np.int16)
    target[(0, *organ)] = 1
    properties = {"class_locations": {1: np.array([[0, *organ]])}}
    size = {"chunks": (1, *shape), "blocks": (1, *shape)}
    nnUNetDatasetBlosc2.save_case(data, target, properties, str(tmp_path / "scan"), **size)
    dataset, patch = nnUNetDatasetBlosc2(str(tmp_path), ["scan"]), (2, 3, 3)
    stock = nnUNetDataLoader(dataset, batch_size, patch, patch, LABELS, oversample_foreground_percent=percent)
    required = [stock.get_do_oversample(index) for index in range(batch_size)]
    shown = []
    for rank in range(processes):
        loader = SeededLoader(
            dataset, batch_size // processes, patch, patch, LABELS, oversample_foreground_percent=percent
        )
        batches = [next(loader.start_at(1, 0, index, 1, rank, processes)) for index in range(4)]
        shown += torch.stack([(batch["target"] == 1).flatten(1).any(1) for batch in batches]).float().mean(0).tolist()
    # the organ is met by chance in less than one patch in a thousand
    assert [share == 1 for share in shown] == required


def test_patches_of_a_pair_lie_at_different_places(cases: nnUNetDatasetBlosc2, matrices: dict[str, np.ndarray]) -> None:
    batches = served(pair_loader(cases, 2, (4, 4, 3), matrices), 0, 20)
    distinct = [not torch.equal(*batch["affine"]) for batch in batches if batch["keys"][0] == "large"]
    assert sum(distinct) > 0.8 * len(distinct) > 0


@pytest.mark.parametrize("patch", [(4, 6, 2), (8, 8, 8), (13, 4, 16), (4, 6), (16, 3)])
def test_positions_and_masks_of_patches(
    cases: nnUNetDatasetBlosc2, matrices: dict[str, np.ndarray], patch: tuple[int, ...]
) -> None:
    """What the voxels say against what the loader says, with scans larger and smaller than the patch."""
    padded = 0
    for batch in served(pair_loader(cases, 4, patch, matrices), 0, 12):
        assert batch["mask"].dtype == torch.bool
        assert batch["mask"].shape == (4, 1, *patch)
        assert batch["affine"].dtype == torch.float64
        assert torch.equal(batch["mask"], batch["data"][:, -1:] == 1)
        data = batch["data"].reshape(4, 4, *(1,) * (3 - len(patch)), *patch).numpy()
        for sample, affine in zip(data, batch["affine"].numpy(), strict=True):
            voxels = np.argwhere(sample[-1] == 1)
            padded += len(voxels) < sample[-1].size
            assert len(voxels) > 0
            expected = voxels @ affine[:, :3].T + affine[:, 3]
            np.testing.assert_allclose(sample[:3, *voxels.T].T, expected, atol=1e-3)
    assert padded > 0
