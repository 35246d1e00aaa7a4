"""Memory of a step: against closed forms, and against what autograd says it keeps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffseg_nnunet.planning.autocast_rules import CudaAutocast
from diffseg_nnunet.planning.memory import BLOCK_BYTES, Allowances, PeakMemory, Step, StorageLog, peak_of

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from counted_memory import COMBINATIONS, Combination, counts

KIB = 1024
GIB = 2**30


def floats(kib: int) -> Tensor:
    return torch.zeros(kib * KIB // 4)


@pytest.mark.parametrize("fake", [True, False])
def test_the_peak_is_the_largest_sum_of_what_is_alive(fake: bool) -> None:
    def run() -> StorageLog:
        with StorageLog() as log:
            first = floats(64)  # 64
            second = first + 1  # 128
            del first  # 64
            third = second.view(-1, 4)[1:] * 2  # 64 + 63.98: a view costs nothing, its product a rounded block
            third.add_(1)  # nothing new
            del second, third
            floats(100)
        return log

    if fake:
        with FakeTensorMode():
            log = run()
    else:
        log = run()
    assert sum(log.at_peak().values()) == 128 * KIB
    assert log.alive() == {}


def test_storages_are_rounded_to_blocks() -> None:
    with StorageLog() as log:
        kept = torch.zeros(1)
    assert list(log.alive().values()) == [BLOCK_BYTES]
    del kept


def linear_step(features: int, batch: int, average: bool = False) -> Step:
    """Two square linear maps with a square between: autograd keeps the input, both maps' inputs, and weights."""
    network = nn.Sequential(*(nn.Linear(features, features, bias=False) for _ in range(2)))
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)

    def loss(data: Tensor) -> tuple[Tensor, None]:
        return network[1](network[0](data).square()).sum(), None

    kept = [p.detach().clone() for p in network.parameters()] if average else []
    return Step([network], optimizer, lambda: torch.zeros(batch, features), loss, average=kept)


@pytest.mark.parametrize("fake", [True, False])
def test_parts_of_a_step_in_closed_form(fake: bool) -> None:
    features, batch = 128, 1024
    weight, activation = features * features * 4, features * batch * 4

    def measured() -> PeakMemory:
        return peak_of(linear_step(features, batch, average=True))

    if fake:
        with FakeTensorMode():
            memory = measured()
    else:
        memory = measured()
    assert memory.weights == memory.optimizer == memory.average == 2 * weight / GIB
    assert memory.batch == activation / GIB
    # at the peak, in the backward pass of the square: its input, the gradients of its output and of its input, and
    # factors of the chain rule; never less than what the forward pass keeps
    assert 3 * activation / GIB <= memory.activations <= 6 * activation / GIB
    assert memory.total_gib == memory.allocated_gib == pytest.approx(sum(memory.parts().values()))


def test_activations_are_proportional_to_the_batch() -> None:
    with FakeTensorMode():
        one, two = (peak_of(linear_step(64, batch)) for batch in (512, 1024))
    assert two.activations == pytest.approx(2 * one.activations, rel=0.01)
    assert two.weights == one.weights


def test_allowances_are_added() -> None:
    network = nn.Conv2d(1, 4, 3, padding=1, bias=False)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)

    def step() -> Step:
        return Step([network], optimizer, lambda: torch.zeros(2, 1, 32, 32), lambda x: (network(x).sum(), None))

    bare, full = peak_of(step()), peak_of(step(), Allowances(0.5, 0.1, 0.25))
    # backward of the convolution: gradient of the output, input, weight and its gradient; the input needs none
    touched = (2 * 4 * 32 * 32 + 2 * 32 * 32 + 2 * 4 * 9) * 4
    assert full.workspace == pytest.approx(0.5 * touched / GIB, rel=0.01)
    assert full.fragmentation == pytest.approx(0.1 * (bare.total_gib + full.workspace))
    assert full.context == 0.25
    assert full.allocated_gib == pytest.approx(bare.total_gib + full.workspace)


def test_the_batch_is_not_left_behind() -> None:
    """A measurement leaves the modules as they were: no gradients."""
    step = linear_step(8, 8)
    peak_of(step)
    assert all(p.grad is None for p in step.modules[0].parameters())


@pytest.mark.parametrize(
    "combination", COMBINATIONS, ids=lambda c: f"{c.backbone}-{c.stage}-{c.precision}-{len(c.patch)}d"
)
def test_as_much_is_kept_as_autograd_keeps(combination: Combination) -> None:
    computed, real = counts(combination)
    assert computed == pytest.approx(real, rel=0.01)


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.InstanceNorm3d(4, affine=True),
        nn.LeakyReLU(inplace=True),
        nn.AvgPool3d(2),
        nn.ConvTranspose3d(4, 2, 2, 2),
    )


def dtypes(network: nn.Module, data: Tensor) -> list[torch.dtype]:
    found: list[torch.dtype] = []
    hooks = [m.register_forward_hook(lambda _m, _i, output: found.append(output.dtype)) for m in network]
    output = network(data)
    found += [torch.softmax(output, 1).dtype, torch.cat([output, output.float()]).dtype]
    found.append(nn.functional.cross_entropy(output, torch.zeros_like(output[:, 0]).long()).dtype)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a build of torch with CUDA")
def test_rules_are_those_of_cuda() -> None:
    """Fake CUDA tensors go forward without a GPU: the types CUDA's own autocast gives them."""
    was_enabled, was_dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode():
        ours_network = small_network()
        with CudaAutocast(torch.float16):
            ours = dtypes(ours_network, torch.zeros(1, 1, 8, 8, 8))
        with torch.device("cuda"):
            network, data = small_network(), torch.zeros(1, 1, 8, 8, 8)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.float16)
        try:
            theirs = dtypes(network, data)
        finally:
            torch.set_autocast_enabled("cuda", was_enabled)
            torch.set_autocast_dtype("cuda", was_dtype)
    assert ours == theirs


def test_weights_are_cast_once() -> None:
    network = nn.Linear(64, 64, bias=False)
    data = torch.zeros(2, 64)
    with StorageLog() as log, CudaAutocast(torch.bfloat16):
        first, second = network(data), network(data)
        casts = [size for size in log.alive().values() if size == 64 * 64 * 2]
    assert len(casts) == 1
    assert first.dtype == second.dtype == torch.bfloat16
