"""Batches from worker processes: the same for any number of them, and a failure that names its cause and its cases."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from diffseg_nnunet.errors import StageFailedError
from diffseg_nnunet.planning import hardware
from diffseg_nnunet.trainers import DiffSegPretrainer
from diffseg_nnunet.trainers.base import TRAINING_STREAM, DiffSegTrainerBase
from diffseg_nnunet.trainers.loaders import SeededLoader
from diffseg_nnunet.trainers.serving import Served, batches_gib, serve, shut_down
from diffseg_nnunet.training.settings import TrainingSettings

LABELS = LabelManager({"background": 0, "organ": 1}, regions_class_order=None)
PATCH = (4, 4, 4)
SHAPE = (1, 6, 6, 6)
CASES = 4
BAD = 2
BAD_CASE = f"scan_{BAD}"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Preprocessed cases; every voxel of scan_k is k."""
    size = {"chunks": SHAPE, "blocks": SHAPE}
    for number in range(CASES):
        data = np.full(SHAPE, number, np.float32)
        properties = {"class_locations": {}}
        nnUNetDatasetBlosc2.save_case(
            data, np.zeros(SHAPE, np.int16), properties, str(tmp_path / f"scan_{number}"), **size
        )
    return tmp_path


@pytest.fixture
def batches_from(folder: Path) -> Iterator[Callable[..., Served]]:
    """Serves batches of one case each, whose workers are ended afterwards: (workers, what happens at BAD_CASE)."""
    served = []

    def build(workers: int, at_bad_case: Callable[[], None] | None = None, first: int = 0) -> Served:
        transform = None if at_bad_case is None else Mishap(at_bad_case)
        loader = SeededLoader(nnUNetDatasetBlosc2(str(folder)), 1, PATCH, PATCH, LABELS, transforms=transform)
        served.append(serve(loader.start_at(5, 0, first, workers), workers, pin_memory=False))
        return served[-1]

    yield build
    for one in served:
        shut_down(one)


class Mishap:
    """A transform with which something happens at BAD_CASE."""

    def __init__(self, happen: Callable[[], None]):
        self.happen = happen

    def __call__(self, image: torch.Tensor, segmentation: torch.Tensor) -> dict[str, torch.Tensor]:
        if image.max() == BAD:
            self.happen()
        return {"image": image, "segmentation": segmentation}


def take(served: Served, count: int) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    batches = [next(served) for _ in range(count)]
    return [(str(batch["keys"][0]), batch["data"], batch["target"]) for batch in batches]


def drain(served: Served) -> None:
    for batch in served:
        assert BAD_CASE not in batch["keys"]


def failure_of(served: Served) -> str:
    """The message of the error that ends the batches; those before it are of other cases."""
    with pytest.raises(StageFailedError) as failed:
        drain(served)
    return str(failed.value)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_order_and_content_do_not_depend_on_workers(batches_from: Callable[..., Served], workers: int) -> None:
    expected = take(batches_from(0), 10)
    assert len({case for case, _, _ in expected}) > 1
    for first in (0, 4):  # the latter as after a resume
        for one, other in zip(take(batches_from(workers, first=first), 6), expected[first:], strict=False):
            assert one[0] == other[0]
            assert torch.equal(one[1], other[1])
            assert torch.equal(one[2], other[2])


def test_workers_leave_the_callers_random_numbers_and_signals_alone(batches_from: Callable[..., Served]) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    states = torch.random.get_rng_state(), np.random.get_state()
    next(batches_from(2))
    assert torch.equal(torch.random.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1][1])
    assert signal.getsignal(signal.SIGCHLD) is handler


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, ("SIGKILL", "out-of-memory killer", "fewer --workers")),
        (signal.SIGBUS, ("SIGBUS", "/dev/shm is too small", "--shm-size")),
        (signal.SIGTERM, ("SIGTERM", "diffseg verify", "--workers 0")),
    ],
)
def test_a_killed_worker_is_reported_with_signal_and_case(
    batches_from: Callable[..., Served], number: signal.Signals, words: tuple[str, ...]
) -> None:
    message = failure_of(batches_from(2, lambda: os.kill(os.getpid(), number)))
    assert f"was ended by {words[0]}" in message
    assert f"of case {BAD_CASE}" in message
    assert all(word in message for word in words)
    assert "no longer alive" not in message


def test_a_worker_that_exits_is_reported_with_its_exit_code(batches_from: Callable[..., Served]) -> None:
    message = failure_of(batches_from(2, lambda: os._exit(7)))
    assert "exit code 7" in message
    assert f"of case {BAD_CASE}" in message


def test_a_worker_killed_between_two_batches_is_reported(batches_from: Callable[..., Served]) -> None:
    before = children()
    served = batches_from(1)
    next(served)
    (worker,) = children() - before
    deadline = time.monotonic() + 60
    while psutil.Process(worker).status() != psutil.STATUS_SLEEPING and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)  # until it waits for its next order
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(StageFailedError, match=rf"process {worker}\) was ended by SIGKILL.*between two batches"):
        take(served, 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_is_reported_with_case_and_message(batches_from: Callable[..., Served], workers: int) -> None:
    def fail() -> None:
        raise RuntimeError("the moon is full.")

    message = failure_of(batches_from(workers, fail))
    assert message.startswith(f"No batch could be made of case {BAD_CASE}: RuntimeError: the moon is full. Look at")
    assert "diffseg verify" in message


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_case_is_named(folder: Path, batches_from: Callable[..., Served], workers: int) -> None:
    path = folder / f"{BAD_CASE}.b2nd"
    path.write_bytes(path.read_bytes()[:40])
    message = failure_of(batches_from(workers))
    assert f"of case {BAD_CASE}: " in message
    assert "diffseg preprocess" in message


class BareTrainer(DiffSegTrainerBase):
    """Only what loaders are made by; its validation is what it trains on."""

    def __init__(self, folder: Path, **settings: Any):
        self.settings = TrainingSettings(workers=0, **settings)
        self.device, self.rank, self.processes, self.current_epoch = torch.device("cpu"), 0, 1, 0
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 1
        self.folder, self.built, self._precision_sample, self._cpu_precision = folder, 0, None, None

    def build_loaders(self) -> tuple[SeededLoader, SeededLoader]:
        self.built += 1
        return tuple(SeededLoader(nnUNetDatasetBlosc2(str(self.folder)), 3, PATCH, PATCH, LABELS) for _ in range(2))


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_precisions_batch_leaves_those_of_the_training_as_they_are(folder: Path, precision: str) -> None:
    trainer = BareTrainer(folder, precision=precision)
    training, _ = trainer.get_dataloaders()
    assert trainer.built == 1
    asked = trainer._precision_sample
    assert asked is None if precision == "float32" else asked.shape == (2, *SHAPE[:1], *PATCH)
    loader = trainer.build_loaders()[0].start_at(trainer.settings.seed, TRAINING_STREAM, 0, 1)
    for _ in range(3):
        batch, expected = next(training), next(loader)
        assert list(batch["keys"]) == list(expected["keys"])
        assert torch.equal(batch["data"], expected["data"])


def test_a_damaged_case_is_named_by_the_precisions_batch(folder: Path) -> None:
    for path in folder.glob("scan_?.b2nd"):
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(StageFailedError, match=r"No batch could be made of (case|the cases) scan_\d"):
        BareTrainer(folder, precision="bfloat16").get_dataloaders()
    BareTrainer(folder, precision="float32").get_dataloaders()  # which compares nothing, and reads nothing yet


def test_too_little_shared_memory_is_reported_with_the_case(batches_from: Callable[..., Served]) -> None:
    """A limit on the size of files holds in /dev/shm as well."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))

    message = failure_of(batches_from(2, limit))
    assert f"of case {BAD_CASE}: " in message
    assert "Enlarge /dev/shm" in message


def test_shut_down_leaves_no_process_and_no_words(
    batches_from: Callable[..., Served], capfd: pytest.CaptureFixture[str]
) -> None:
    bad = [case for case, _, _ in take(batches_from(0), 10)].index(BAD_CASE)
    before = children()
    busy = batches_from(1, lambda: time.sleep(600), first=bad)
    idle, untouched = batches_from(2), batches_from(1)
    take(idle, 3)
    assert len(children() - before) == 4
    for served in (idle, busy, untouched, idle, busy, untouched):
        shut_down(served)
    shut_down(None)
    shut_down(batches_from(0))
    assert children() <= before
    assert capfd.readouterr() == ("", "")
    with pytest.raises(StopIteration):
        next(idle)


def test_the_workers_of_a_failed_one_end_too(batches_from: Callable[..., Served]) -> None:
    before = children()
    served = batches_from(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    failure_of(served)
    shut_down(served)
    assert children() <= before


def test_the_workers_of_a_training_end_with_it(new_trainer: Callable[..., Any]) -> None:
    before = children()
    trainer = new_trainer(DiffSegPretrainer, workers=2)
    trainer.initialize()
    started = []
    trainer.progress = lambda *_: started.append(children() - before)
    trainer.run_training()
    assert len(started[0]) == 3  # one of them makes the validation's batches
    assert children() <= before


def test_workers_follow_settings_then_the_variable_then_the_machine(
    new_trainer: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = SeededLoader(nnUNetDatasetBlosc2(str(folder)), 2, PATCH, PATCH, LABELS)
    trainer = new_trainer(DiffSegPretrainer, workers=None)
    trainer.initialize()
    if hardware.usable_cores() <= 2:
        assert trainer.worker_count(loader) == 0
    assert 0 <= trainer.worker_count(loader) < max(2, hardware.usable_cores())
    monkeypatch.setenv("nnUNet_n_proc_DA", "5")
    assert trainer.worker_count(loader) == 5
    assert new_trainer(DiffSegPretrainer, workers=3).worker_count(loader) == 3


def test_memory_of_batches(folder: Path) -> None:
    small, large = (SeededLoader(nnUNetDatasetBlosc2(str(folder)), n, PATCH, PATCH, LABELS) for n in (1, 5))
    for loader in (small, large):
        stored = (next(loader.start_at(5, 0, 0, 1))[key] for key in ("data", "target"))
        taken = sum(tensor.numel() * tensor.element_size() for tensor in stored) / hardware.GIB
        assert 4 * taken < batches_gib(loader, channels=1) < 12 * taken


PARENT = """
import os, sys, time
from diffseg_nnunet.trainers.loaders import SeededLoader
from diffseg_nnunet.trainers.serving import serve
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import LabelManager
import psutil

def say(*words):  # in one write: lines of several processes do not mix
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def sleep(image, segmentation):
    say("busy")
    time.sleep(600)

labels = LabelManager({"background": 0, "organ": 1}, regions_class_order=None)
loader = SeededLoader(nnUNetDatasetBlosc2(sys.argv[1]), 1, (4, 4, 4), (4, 4, 4), labels, transforms=sleep)
served = serve(loader.start_at(5, 0, 0, 2), 2, pin_memory=False)
say("workers", *(child.pid for child in psutil.Process().children()))
next(served)
"""


def test_workers_end_when_their_parent_is_killed(folder: Path) -> None:
    with subprocess.Popen([sys.executable, "-P", "-c", PARENT, folder], stdout=subprocess.PIPE, text=True) as parent:
        try:
            lines = [parent.stdout.readline().split() for _ in range(3)]
        finally:
            parent.kill()
    (workers,) = [list(map(int, words[1:])) for words in lines if words[0] == "workers"]
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(runs(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(runs(worker) for worker in workers)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
