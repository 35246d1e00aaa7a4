"""The moving average against its formula, and weights that come back bit for bit."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from diffseg_nnunet.training.ema import ExponentialMovingAverage


def unet() -> PlainConvUNet:
    torch.manual_seed(0)
    norm = {"norm_op": nn.InstanceNorm2d, "norm_op_kwargs": {"affine": True}}
    return PlainConvUNet(1, 2, (4, 8), nn.Conv2d, 3, (1, 2), 1, 2, 1, conv_bias=True, **norm, nonlin=nn.ReLU)


def perturb(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def content(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_average_follows_the_formula(decay: float) -> None:
    """a_n = d_n a_{n-1} + (1 - d_n) w_n with d_n = min(decay, (1 + n) / (10 + n)), on every tensor of a U-Net."""
    network = unet()
    average = ExponentialMovingAverage({"network": network}, decay)
    expected = {key: tensor.numpy().astype(float) for key, tensor in content(network).items()}
    for n in range(1, 13):
        perturb(network, n)
        average.update()
        share = min(decay, (1 + n) / (10 + n))
        for key, tensor in content(network).items():
            expected[key] = share * expected[key] + (1 - share) * tensor.numpy()
    with average.applied():
        for key, tensor in content(network).items():
            np.testing.assert_allclose(tensor.numpy(), expected[key], atol=1e-5, rtol=1e-4)


def test_weights_come_back_bit_for_bit() -> None:
    network, head = unet(), nn.Linear(3, 3)
    average = ExponentialMovingAverage({"network": network, "head": head}, 0.9)
    for module in (network, head):
        perturb(module, 1)
    average.update()
    before = content(network), content(head)
    with average.applied():
        assert not torch.equal(
            network.state_dict()["decoder.seg_layers.0.weight"], before[0]["decoder.seg_layers.0.weight"]
        )
        assert not torch.equal(head.weight, before[1]["weight"])
    assert_same(content(network), before[0])
    assert_same(content(head), before[1])
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert_same(content(network), before[0])


def test_applying_keeps_parameters_and_their_optimizer() -> None:
    """Tensors are overwritten, not exchanged: an optimizer goes on with the parameters it was given."""
    network = unet()
    parameters = list(network.parameters())
    average = ExponentialMovingAverage({"network": network}, 0.9)
    with average.applied():
        pass
    assert all(now is then for now, then in zip(network.parameters(), parameters, strict=True))
    assert all(parameter.requires_grad for parameter in parameters)


def test_tensors_with_several_names_are_averaged_once() -> None:
    """nnU-Net lists one tensor up to four times; the average need not be kept, nor saved, as often."""
    network = unet()
    state = network.state_dict()
    tensors = {tensor.data_ptr() for tensor in state.values()}
    assert len(tensors) < len(state)
    start = content(network)
    average = ExponentialMovingAverage({"network": network}, 0.5)
    assert len(average.state_dict()["average"]["network"]) == len(tensors)
    perturb(network, 3)
    new = content(network)
    average.update()  # share 2 / 11 of the old
    with average.applied():
        for key, tensor in content(network).items():
            torch.testing.assert_close(tensor, 2 / 11 * start[key] + 9 / 11 * new[key])


def test_buffers_are_averaged_and_counters_left_alone() -> None:
    norm = nn.BatchNorm1d(2)
    average = ExponentialMovingAverage({"norm": norm}, 0.5)
    norm(torch.randn(8, 2) + 5)
    average.update()
    mean = norm.running_mean.clone()
    with average.applied():
        torch.testing.assert_close(norm.running_mean, 9 / 11 * mean)
        assert norm.num_batches_tracked == 1


def test_state_survives_a_checkpoint() -> None:
    network = unet()
    average = ExponentialMovingAverage({"network": network}, 0.9)
    for seed in range(3):
        perturb(network, seed)
        average.update()
    stream = io.BytesIO()
    torch.save({"ema": average.state_dict(), "network": network.state_dict()}, stream)
    saved = torch.load(io.BytesIO(stream.getvalue()), weights_only=True)

    again = unet()
    resumed = ExponentialMovingAverage({"network": again}, 0.1)
    again.load_state_dict(saved["network"])
    resumed.load_state_dict(saved["ema"])
    for module, ema in ((network, average), (again, resumed)):
        perturb(module, 7)
        ema.update()
    with average.applied(), resumed.applied():
        assert_same(content(network), content(again))
