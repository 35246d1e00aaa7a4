"""Voters: each sees voxels of its own, and what they say there is what they say of the whole patch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from diffseg_nnunet.coordinates.head import gather_voxels
from diffseg_nnunet.probing.ensemble import VotingHead, draw_voxels, vote_entropy

CHANNELS, CLASSES, MEMBERS = (6, 4, 3), 5, 4


def pyramid(dimensions: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((2, c, *(2 << scale,) * dimensions), generator=generator) for scale, c in enumerate(CHANNELS)]


def head() -> VotingHead:
    """Its weights larger than at the start, so that its voters disagree."""
    torch.manual_seed(1)
    voting = VotingHead(CHANNELS, CLASSES, MEMBERS)
    with torch.no_grad():
        for parameter in voting.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return voting.eval()


@pytest.mark.parametrize("dimensions", [2, 3])
@torch.no_grad()
def test_voxels_are_those_of_the_whole_patch(dimensions: int) -> None:
    voting, features = head(), pyramid(dimensions)
    shape = features[-1].shape[2:]
    voxels = draw_voxels(torch.zeros(2, 1, *shape), MEMBERS, 6, torch.Generator().manual_seed(2))
    found = voting.at(features, voxels)
    assert found.shape == (MEMBERS, 2, CLASSES, 6)
    for member, own, logits in zip(voting.members, voxels, found, strict=True):
        expected = gather_voxels(member.dense(features), own).mT
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_majority_wins() -> None:
    voting, features = head(), pyramid(3)
    shares = voting(features)
    opinions = torch.stack([member.dense(features).argmax(1) for member in voting.members])
    counted = torch.stack([(opinions == label).sum(0) for label in range(CLASSES)], 1)
    torch.testing.assert_close(shares * MEMBERS, counted.float())
    assert (shares.amax(1) < 1).any()  # there is disagreement to count


def test_members_are_independent() -> None:
    """The loss of one reaches no other's weights."""
    voting, features = head(), pyramid(3)
    voxels = draw_voxels(torch.zeros(2, 1, 8, 8, 8), MEMBERS, 6, torch.Generator().manual_seed(2))
    assert not torch.equal(voxels[0], voxels[1])
    voting.at(features, voxels)[1].square().sum().backward()
    for index, member in enumerate(voting.members):
        gradients = [p.grad for p in member.parameters()]
        assert all(g is None or not g.any() for g in gradients) == (index != 1)


def test_half_of_the_voxels_from_labels_alike() -> None:
    """One voxel of 512 is 1/1024 of the first half, and a half of the second."""
    target = torch.zeros(1, 1, 8, 8, 8)
    target[0, 0, 3, 4, 5] = 2
    drawn = draw_voxels(target, 2, 20_000, torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 1, 20_000, 3)
    rare = (drawn == torch.tensor([3, 4, 5])).all(-1).float().mean().item()
    assert rare == pytest.approx(0.25 + 0.5 / 512, abs=0.01)
    assert len(drawn.flatten(0, 2).unique(dim=0)) == 512
    again = draw_voxels(target, 2, 20_000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


@given(arrays(np.int64, (7,), elements=st.integers(0, 10)).filter(lambda votes: votes.sum() > 0))
def test_entropy_of_votes_is_a_share_of_the_largest(votes: np.ndarray) -> None:
    assert 0 <= vote_entropy(torch.from_numpy(votes / votes.sum())) <= 1


def test_entropy_of_votes() -> None:
    shares = torch.tensor([[1.0, 0.25, 0.5], [0.0, 0.25, 0.5], [0.0, 0.25, 0.0], [0.0, 0.25, 0.0]])
    torch.testing.assert_close(vote_entropy(shares), torch.tensor([0.0, 1.0, 0.5]))


def test_ignored_voxels_are_not_drawn() -> None:
    target = torch.full((2, 1, 4, 4, 4), 3)
    target[0, 0, 0, 0, :2] = torch.tensor([0, 1])
    drawn = draw_voxels(target, 2, 500, torch.Generator().manual_seed(0), ignore=3)
    assert set(map(tuple, drawn[:, 0].reshape(-1, 3).tolist())) == {(0, 0, 0), (0, 0, 1)}
    assert len(set(map(tuple, drawn[:, 1].reshape(-1, 3).tolist()))) > 50  # nothing is annotated there: anything goes
