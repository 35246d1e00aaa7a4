"""One-bit layers: what they compute, how they are learned through, and what they cost on disk."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from diffseg_nnunet.refinement.binary import (
    BinaryConv,
    BinaryLinear,
    binary_activation,
    binary_weight,
    pack,
    pack_state,
    signs,
    state_bytes,
    unpack,
    unpack_state,
    weight_scale,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def activation_surrogate(values: Tensor) -> Tensor:
    """Bi-Real Net's approximation of the sign (arXiv 1808.00278 eq. 7)."""
    inside = torch.where(values < 0, 2 * values + values**2, 2 * values - values**2)
    return torch.where(values.abs() < 1, inside, values.sign())


def slopes(function, at: Tensor, h: float = 1e-6) -> Tensor:
    """Derivatives of a scalar function at every element, by central differences."""
    found = torch.zeros_like(at)
    for index in range(at.numel()):
        change = torch.zeros_like(at).flatten()
        change[index] = h
        change = change.reshape(at.shape)
        found.view(-1)[index] = (function(at + change) - function(at - change)) / (2 * h)
    return found


class Small(nn.Module):
    """A network with binary and other layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(1, 4, 1)
        self.conv = BinaryConv(4, 5, (1, 3, 3), (1, 1, 2))
        self.linear = BinaryLinear(5, 7)

    def forward(self, image: Tensor) -> Tensor:
        return self.linear(self.conv(self.stem(image)).mean((2, 3, 4)))


def small() -> Small:
    torch.manual_seed(0)
    return Small()


def test_activations_are_one_bit() -> None:
    found = binary_activation(torch.tensor([-2.0, -0.1, -0.0, 0.0, 0.1, 3.0]))
    assert found.tolist() == [-1, -1, 1, 1, 1, 1]


@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (6, 3, 1, 3, 3), (6, 5)])
def test_weights_are_a_sign_times_the_mean_magnitude_of_their_channel(shape: tuple[int, ...]) -> None:
    weight = normal(*shape).float()
    weight.view(-1)[0] = 0
    found = binary_weight(weight)
    for channel, original in zip(found, weight, strict=True):
        scale = original.abs().mean()
        torch.testing.assert_close(channel.abs(), scale.expand_as(channel))
        assert torch.equal(channel > 0, original >= 0)
        assert len(channel.unique()) == 2


def test_activations_are_learned_through_as_through_their_surrogate() -> None:
    values = (2 * normal(200)).requires_grad_()
    factors = normal(200, seed=1)
    (factors * binary_activation(values)).sum().backward()
    expected = slopes(lambda at: (factors * activation_surrogate(at)).sum(), values.detach())
    torch.testing.assert_close(values.grad, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), (1, 2)), ((1, 3, 3), (1, 2, 1))])
def test_convolutions_are_learned_through_as_through_their_surrogates(
    kernel: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    layer = BinaryConv(2, 3, kernel, stride).double()
    with torch.no_grad():
        layer.weight.copy_(1.2 * normal(*layer.weight.shape))  # some beyond ±1, where no gradient passes
    values = normal(1, 2, *(4, 3, 5)[: len(kernel)], seed=1).requires_grad_()
    output = layer(values)
    factors = normal(*output.shape, seed=2)
    (factors * output).sum().backward()
    convolve = functional.conv2d if len(kernel) == 2 else functional.conv3d
    binary, ones = binary_weight(layer.weight.detach()), signs(values.detach())

    def of(inputs: Tensor, weight: Tensor) -> Tensor:
        return (factors * convolve(inputs, weight, stride=stride, padding=layer.padding)).sum()

    expected = slopes(lambda at: of(activation_surrogate(at), binary), values.detach())
    torch.testing.assert_close(values.grad, expected, atol=1e-5, rtol=1e-5)
    expected = slopes(lambda at: of(ones, at.clamp(-1, 1)), layer.weight.detach())
    torch.testing.assert_close(layer.weight.grad, expected, atol=1e-5, rtol=1e-5)
    assert (layer.weight.grad[layer.weight.abs() > 1] == 0).all()


def test_linear_layers_are_binary_too() -> None:
    layer = BinaryLinear(6, 4).double()
    values = normal(2, 3, 6)
    expected = signs(values) @ (signs(layer.weight) * layer.weight.abs().mean(1, keepdim=True)).T
    torch.testing.assert_close(layer(values), expected)


def test_initial_weights_have_both_signs() -> None:
    for layer in (BinaryConv(8, 8, (3, 3), (1, 1)), BinaryLinear(64, 8)):
        assert 0.3 < (layer.weight > 0).float().mean() < 0.7
        assert layer.weight.abs().max() < 1


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.integers(0, 2**31))
@hypothesis_settings(deadline=None, max_examples=50)
def test_packing_is_lossless_and_eight_weights_a_byte(shape: list[int], seed: int) -> None:
    weight = normal(*shape, seed=seed).float()
    bits, scale = pack(weight)
    assert bits.dtype == torch.uint8
    assert bits.numel() == math.ceil(weight.numel() / 8)
    found = unpack(bits, scale, tuple(shape))
    assert torch.equal(found, binary_weight(weight))
    # and what was unpacked is binarised to itself, to the last bit
    assert torch.equal(binary_weight(found), found)
    assert torch.equal(weight_scale(found).flatten(), scale)


def test_bits_that_are_not_those_of_the_shape() -> None:
    bits, scale = pack(torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"\(2,\) bytes and \(3,\) scales are not weights of shape \(3, 6\)"):
        unpack(bits, scale, (3, 6))
    with pytest.raises(ValueError, match="are not weights of shape"):
        unpack(bits, scale[:2], (3, 5))
    with pytest.raises(ValueError, match="are not weights of shape"):
        unpack(bits.float(), scale, (3, 5))


def test_a_packed_network_computes_the_same_from_disk() -> None:
    network, image = small(), normal(2, 1, 3, 4, 5).float()
    file = io.BytesIO()
    torch.save(pack_state(network), file)
    file.seek(0)
    other = Small()
    other.load_state_dict(unpack_state(other, torch.load(file, weights_only=True)))
    assert torch.equal(other(image), network(image))


def test_bytes_are_those_of_what_is_stored() -> None:
    network = small()
    stem = (4 + 4) * 4
    conv = math.ceil(5 * 4 * 9 / 8) + 5 * 4
    linear = math.ceil(7 * 5 / 8) + 7 * 4
    assert state_bytes(network) == stem + conv + linear
    assert state_bytes(nn.Conv2d(2, 3, 3)) == (2 * 3 * 9 + 3) * 4
