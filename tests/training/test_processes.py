"""What several processes agree on without being several: shares and means."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffseg_nnunet.training import processes
from diffseg_nnunet.training.processes import mean_of_rows, share_of_batch


@given(group=st.integers(1, 3), groups=st.integers(1, 40), count=st.integers(1, 40))
def test_shares_are_equal_whole_groups_or_refused(group: int, groups: int, count: int) -> None:
    if groups % count:
        with pytest.raises(ValueError, match=f"shared equally by {count} processes"):
            share_of_batch(group * groups, group, count)
        return
    share = share_of_batch(group * groups, group, count)
    assert share * count == group * groups
    assert share % group == 0
    assert share > 0


@pytest.mark.parametrize(
    ("batch", "group", "count", "message"),
    [
        (
            12,
            2,
            4,
            "A batch of 6 pairs cannot be shared equally by 4 processes; these numbers of processes can: 1, 2, 3, 6.",
        ),
        (
            5,
            1,
            2,
            "A batch of 5 patches cannot be shared equally by 2 processes; these numbers of processes can: 1, 5.",
        ),
        (2, 2, 2, "A batch of a pair cannot be shared equally by 2 processes; these numbers of processes can: 1."),
    ],
)
def test_the_message_says_what_would_fit(batch: int, group: int, count: int, message: str) -> None:
    with pytest.raises(ValueError, match="shared equally") as refused:
        share_of_batch(batch, group, count)
    assert str(refused.value) == message


def test_means_leave_out_what_is_no_number() -> None:
    rows = [{"a": 1.0, "b": math.nan, "c": math.nan}, {"a": 3.0, "b": 5.0, "c": math.nan}]
    means = mean_of_rows(rows)
    assert (means["a"], means["b"]) == (2, 5)
    assert math.isnan(means["c"])


@given(
    rows=st.lists(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=2, max_size=2), min_size=1, max_size=6)
)
def test_means_lie_between_the_numbers(rows: list[list[float]]) -> None:
    means = mean_of_rows([dict(zip("ab", row, strict=True)) for row in rows])
    for name, values in zip("ab", zip(*rows, strict=True), strict=True):
        numbers = [value for value in values if not math.isnan(value)]
        if numbers:
            assert min(numbers) - 1e-6 <= means[name] <= max(numbers) + 1e-6
        else:
            assert math.isnan(means[name])


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    assert (processes.rank(), processes.local_rank()) == (0, 0)
    assert (processes.world_size(), processes.local_world_size()) == (1, 1)
    with processes.process_group(torch.device("cpu")):
        assert not torch.distributed.is_initialized()
        assert processes.from_first("value") == "value"
        assert processes.gathered(3) == [3]
        assert processes.all_agree(True, torch.device("cpu"))
        assert not processes.all_agree(False, torch.device("cpu"))
        parameter = torch.nn.Parameter(torch.ones(2))
        parameter.grad = torch.tensor([1.0, 2.0])
        processes.average_gradients([parameter])
        assert parameter.grad.tolist() == [1, 2]
        processes.wait_for_all()


def test_ranks_are_those_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of four: the GPU's index is the number on the node, not among all."""
    for variable, value in {"RANK": 6, "WORLD_SIZE": 8, "LOCAL_RANK": 2, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(variable, str(value))
    assert (processes.rank(), processes.local_rank()) == (6, 2)
    assert (processes.world_size(), processes.local_world_size()) == (8, 4)
