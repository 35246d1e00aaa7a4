"""Real steps of a planned training, and the GPU memory they take, in a process of its own.

``python -m diffseg_nnunet.pipeline.measured_steps`` reads one line of JSON, what to measure, and answers with one;
everything else it or its libraries print goes to the standard error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffseg_nnunet import registry
from diffseg_nnunet.planning.hardware import GIB
from diffseg_nnunet.planning.section import diffseg_section

WARM_UP, STEPS = 2, 3
_MOST_WARM_UP = 20
TRAINERS = {"pretraining": "pretrain", "training": "finetune"}
"""Stage -> registered trainer whose step is measured."""


@dataclass(frozen=True)
class Reading:
    """What a GPU's memory showed.

    Attributes:
        allocated_gib: most that tensors took at once (torch.cuda.max_memory_allocated).
        reserved_gib: most that torch held for them (torch.cuda.max_memory_reserved); without the CUDA context.
        outside_gib: what was taken on the GPU beside that, at the end: the context and libraries' kernels, the driver,
            and other users.
        gpu: its name.
        torch: its version.
        compiled: whether the network was compiled (torch.compile), which changes what is kept.
        steps: how many were taken, warm-up included.
    """

    allocated_gib: float
    reserved_gib: float
    outside_gib: float
    gpu: str
    torch: str
    compiled: bool
    steps: int


@dataclass(frozen=True)
class Order:
    """What a process shall measure.

    Attributes:
        plans, dataset_json: as nnU-Net's trainers take them.
        configuration: of the plans.
        stage: "pretraining" or "training".
        device: "cuda"; on "cpu" the same steps are taken, and all figures are 0.
        limit_gib: what torch may reserve at most, as if the GPU were smaller; None: all there is.
    """

    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    configuration: str
    stage: str
    device: str = "cuda"
    limit_gib: float | None = None


def main() -> None:
    """Of the child: an :class:`Order` on the first line of the standard input, a :class:`Reading` or null back."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what nnU-Net and its libraries print is no answer
    order = Order(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        content = asdict(follow(order))
    except Exception as error:
        from diffseg_nnunet.torch_errors import is_out_of_gpu_memory

        if not is_out_of_gpu_memory(error):
            raise
        content = None
    print(json.dumps(content), file=answer, flush=True)


def _end_with_parent() -> None:
    while os.read(0, 1024):  # not of sys.stdin, whose lock a thread that waits would hold when Python ends
        pass
    os._exit(1)


def follow(order: Order) -> Reading:
    """Take the steps in this process."""
    from diffseg_nnunet.pipeline.device import prepare_device

    device = prepare_device(order.device)
    if order.limit_gib is not None:
        _limit(order.limit_gib)
    with scratch_folders(order):
        return take_steps(build_trainer(order, device))


def _limit(gib: float) -> None:
    import torch

    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total))


@contextmanager
def scratch_folders(order: Order) -> Iterator[None]:
    """nnU-Net's folders are temporary ones within the block: trainers write into results, and look for data."""
    kept = {name: os.environ.get(name) for name in ("nnUNet_preprocessed", "nnUNet_results")}
    with TemporaryDirectory(prefix="diffseg_measure_") as folder:
        for name in kept:
            os.environ[name] = str(Path(folder) / name)
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        identifier = PlansManager(order.plans).get_configuration(order.configuration).data_identifier
        data = Path(os.environ["nnUNet_preprocessed"]) / order.plans["dataset_name"] / identifier
        data.mkdir(parents=True)
        for ending in ("b2nd", "pkl"):  # of files that are never read: nnU-Net wants to see the format
            (data / f"noise.{ending}").touch()
        try:
            yield
        finally:
            for name, value in kept.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def build_trainer(order: Order, device: Any) -> Any:
    """The stage's trainer by the plans, initialised, in the epoch that takes most memory; within
    :func:`scratch_folders`."""
    from diffseg_nnunet.training.settings import PretrainingSettings

    trainer_class = registry.load("trainers", TRAINERS[order.stage])
    plans = {**order.plans, "continue_training": False}
    trainer = trainer_class(plans, order.configuration, 0, order.dataset_json, device=device)
    if order.stage == "pretraining":  # a training's own are the default ones
        trainer.apply(PretrainingSettings.from_plan(diffseg_section(plans)))
    trainer.initialize()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    trainer.current_epoch = trainer.largest_epoch()
    trainer.on_train_epoch_start()
    return trainer


def take_steps(trainer: Any) -> Reading:
    """A few iterations of an initialised trainer on noise: warm-up, then those whose memory counts."""
    import torch

    batch = trainer.random_batch()
    warm_up = 0
    # a gradient scaler skips steps until its scale suits; the optimizer's state is made in the first that is not
    while warm_up < WARM_UP or (warm_up < _MOST_WARM_UP and not trainer.optimizer.state):
        trainer.train_step(batch)
        warm_up += 1
    cuda = trainer.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        # convolutions' algorithms have been tried out by now, and what only that needed goes back
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        trainer.train_step(batch)
    trainer.close_loggers()
    if not cuda:
        return Reading(0.0, 0.0, 0.0, "cpu", torch.__version__, False, warm_up + STEPS)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return Reading(
        allocated_gib=torch.cuda.max_memory_allocated() / GIB,
        reserved_gib=torch.cuda.max_memory_reserved() / GIB,
        outside_gib=(total - free - torch.cuda.memory_reserved()) / GIB,
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        compiled=bool(trainer._do_i_compile()),
        steps=warm_up + STEPS,
    )


if __name__ == "__main__":
    main()
