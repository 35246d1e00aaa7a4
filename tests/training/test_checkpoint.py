"""Checkpoints are written whole or not at all, read without running what is in them, and refused with reasons."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from diffseg_nnunet.errors import EXIT_BAD_INPUT, BadInputError
from diffseg_nnunet.training.checkpoint import differences, initialise, load_safely, save

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")


class Net(nn.Module):
    def __init__(self, width: int = 4, classes: int = 2, depth: int = 1):
        super().__init__()
        self.encoder = nn.ModuleList(nn.Conv2d(width, width, 3) for _ in range(depth))
        self.decoder = nn.Module()
        self.decoder.seg_layers = nn.ModuleList([nn.Conv2d(width, classes, 1)])


class Harmful:
    """What an attacker would put into a pickle: unpickling it makes a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pth"
    save(path, {"network_weights": Net().state_dict(), "settings": {"seed": 3, "rate": 0.1, "names": ["a"], "n": None}})
    return path


def test_what_is_saved_is_read(good: Path) -> None:
    content = load_safely(str(good))
    assert content["settings"] == {"seed": 3, "rate": 0.1, "names": ["a"], "n": None}
    assert content["network_weights"].keys() == Net().state_dict().keys()
    assert [path.name for path in good.parent.iterdir()] == ["checkpoint.pth"]


def test_failed_write_leaves_the_old_checkpoint(good: Path) -> None:
    before = good.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save(good, {"network_weights": {}, "large": torch.zeros(10_000), "last": lambda: None})
    assert good.read_bytes() == before
    assert [path.name for path in good.parent.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize("with_torch", [True, False])
def test_malicious_pickle_is_refused_and_not_executed(tmp_path: Path, with_torch: bool) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "executed"
    content = {"network_weights": Net().state_dict(), "extra": Harmful(trace)}
    if with_torch:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"network_weights": {}, "extra": Harmful(trace)}))
    with pytest.raises(BadInputError, match=r"evil\.pth cannot be read") as refused:
        load_safely(path)
    assert refused.value.exit_code == EXIT_BAD_INPUT
    assert not trace.exists()
    # it would have been harmful
    torch.load(path, weights_only=False) if with_torch else pickle.loads(path.read_bytes())
    assert trace.exists()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"There is no checkpoint .*nowhere\.pth.*diffseg pretrain"):
        load_safely(tmp_path / "nowhere.pth")
    with pytest.raises(BadInputError, match="There is no checkpoint"):
        load_safely(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_file(good: Path, share: float) -> None:
    content = good.read_bytes()
    good.write_bytes(content[: int(share * len(content))])
    with pytest.raises(BadInputError, match=r"checkpoint\.pth cannot be read"):
        load_safely(good)


@given(content=st.binary(max_size=200))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.pth"
    for bytes_ in (content, b"\x80\x02" + content, pickle.dumps(content.hex()), b"PK\x03\x04" + content):
        path.write_bytes(bytes_)
        with pytest.raises(BadInputError, match=r"some\.pth"):
            load_safely(path)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"network_weights": [1]}, torch.zeros(2)])
def test_other_checkpoints_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(BadInputError, match="holds no 'network_weights'"):
        load_safely(tmp_path / "other.pth")


def test_differences() -> None:
    own, other = Net().state_dict(), Net(width=6).state_dict()
    assert differences(own, own) == []
    assert differences(own, Net(classes=9).state_dict()) == []
    assert differences(own, other) == [
        "encoder.0.weight: (6, 6, 3, 3) in the checkpoint, (4, 4, 3, 3) in the plan",
        "encoder.0.bias: (6,) in the checkpoint, (4,) in the plan",
    ]
    deeper = Net(depth=2).state_dict()
    assert differences(own, deeper) == [
        "encoder.1.weight: not in the plan's network",
        "encoder.1.bias: not in the plan's network",
    ]
    assert differences(deeper, own) == [
        "encoder.1.weight: missing in the checkpoint",
        "encoder.1.bias: missing in the checkpoint",
    ]


def test_initialise_takes_all_but_the_output_layers() -> None:
    torch.manual_seed(0)
    network, source = Net(classes=2), Net(classes=5)
    output = network.decoder.seg_layers[0].weight.clone()
    assert initialise(network, source.state_dict(), "source.pth") == 2
    assert torch.equal(network.encoder[0].weight, source.encoder[0].weight)
    assert torch.equal(network.encoder[0].bias, source.encoder[0].bias)
    assert torch.equal(network.decoder.seg_layers[0].weight, output)


def test_initialise_refuses_with_a_list_and_changes_nothing() -> None:
    network = Net(width=4, depth=6)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(BadInputError) as refused:
        initialise(network, Net(width=5, depth=6).state_dict(), "wide.pth")
    message = str(refused.value)
    assert "wide.pth does not fit the plan, 12 tensors differ" in message
    assert "encoder.0.weight: (5, 5, 3, 3) in the checkpoint, (4, 4, 3, 3) in the plan" in message
    assert "and 4 more" in message
    assert message.count("in the checkpoint,") == 8
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
