"""Who learns from which half-step, and that learning helps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffseg_nnunet.diffusion.bernoulli import BernoulliDiffusion, BernoulliSettings
from diffseg_nnunet.refinement.losses import SEGMENTOR_WEIGHT, refiner_loss, segmentor_loss
from diffseg_nnunet.refinement.masks import masks_of
from diffseg_nnunet.refinement.network import Refiner, RefinerArchitecture

PROCESS = BernoulliDiffusion(BernoulliSettings())


class Segmentor(nn.Module):
    """Two scales: features at stride 2, a prior at stride 1."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse, self.fine = nn.Conv2d(1, 5, 3, 2, 1), nn.Conv2d(5, 2, 3, 1, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = self.coarse(image)
        logits = self.fine(functional.interpolate(features, image.shape[2:]))
        return logits.softmax(1), [features]


def refiner(binary: bool, trained: bool = True) -> Refiner:
    torch.manual_seed(0)
    network = Refiner(
        RefinerArchitecture(1, 2, (4, 8), ((1, 1), (2, 2)), ((3, 3), (3, 3)), (5,), binary=binary, heads=2)
    )
    for parameter in network.parameters() if trained else ():
        if not parameter.any():  # zero at first, and then nothing behind it is heard
            nn.init.normal_(parameter, std=0.1)
    return network


def scene() -> dict[str, Any]:
    torch.manual_seed(1)
    segmentor, image = Segmentor(), torch.randn(2, 1, 8, 8)
    prior, features = segmentor(image)
    clean = masks_of((image > 0).long(), range(2))
    return {"segmentor": segmentor, "clean": clean, "prior": prior, "features": features, "image": image}


def loss_of(half_step: Any, network: nn.Module, given: dict[str, Any], seed: int = 0, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = (given[name] for name in ("clean", "prior", "features", "image"))
    return half_step(network, PROCESS, *parts, generator, **options)


@pytest.mark.parametrize("binary", [True, False])
def test_the_refiners_half_step_teaches_the_refiner_alone(binary: bool) -> None:
    network, given = refiner(binary), scene()
    loss_of(refiner_loss, network, given).backward()
    assert all(parameter.grad is None for parameter in given["segmentor"].parameters())
    assert all(parameter.grad.any() for parameter in network.parameters())


@pytest.mark.parametrize("binary", [True, False])
def test_the_segmentors_half_step_teaches_the_segmentor_alone(binary: bool) -> None:
    network, given = refiner(binary), scene()
    loss_of(segmentor_loss, network, given).backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
    for parameter in given["segmentor"].parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


@pytest.mark.parametrize("binary", [True, False])
def test_the_segmentor_learns_through_its_features_too(binary: bool) -> None:
    network, given = refiner(binary), scene()
    given["prior"] = given["prior"].detach()
    loss_of(segmentor_loss, network, given).backward()
    assert given["segmentor"].coarse.weight.grad.any()
    assert given["segmentor"].fine.weight.grad is None


def test_certain_priors_give_finite_gradients() -> None:
    network, given = refiner(True), scene()
    certain = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1).repeat(2, 1, 8, 8).requires_grad_()
    given["prior"] = certain
    loss_of(segmentor_loss, network, given).backward()
    assert certain.grad.isfinite().all()


def test_both_half_steps_are_one_loss() -> None:
    network, given = refiner(True), scene()
    refining, segmenting = (loss_of(half, network, given) for half in (refiner_loss, segmentor_loss))
    torch.testing.assert_close(segmenting, SEGMENTOR_WEIGHT * refining)
    torch.testing.assert_close(loss_of(segmentor_loss, network, given, weight=1.0), refining)
    assert not torch.allclose(loss_of(refiner_loss, network, given, seed=1), refining)


def test_invalid_voxels_do_not_count() -> None:
    network, given = refiner(True, trained=False), scene()
    valid = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    assert loss_of(refiner_loss, network, given, valid=valid) == 0
    valid[:, :, :4] = True
    half = loss_of(refiner_loss, network, given, valid=valid)
    given["clean"][:, :, 4:] = 1 - given["clean"][:, :, 4:]
    # the first four rows are drawn as before, and a new network sees nothing of the others
    torch.testing.assert_close(loss_of(refiner_loss, network, given, valid=valid), half)


def test_unknown_voxels_are_noised_as_they_are_in_prediction() -> None:
    """At every time step their y_t is a draw from the prior, whatever is written there; all others are as before."""
    size, seen = (12, 2, 40, 50), []
    prior = torch.tensor([0.3, 0.9]).reshape(1, 2, 1, 1).expand(size)
    valid = torch.zeros(12, 1, 40, 50, dtype=torch.bool)
    valid[..., :10] = True

    def network(noisy: Tensor, *_: object) -> Tensor:
        seen.append(noisy)
        return torch.zeros_like(noisy)

    masks = [masks_of(labels, range(2)) for labels in (torch.where(valid, 1, 9), torch.ones_like(valid).long())]
    for clean, counts in (*((clean, valid) for clean in masks), (masks[1], None)):
        given = {"clean": clean, "prior": prior, "features": [], "image": prior}
        loss_of(refiner_loss, network, given, valid=counts)
    ignored, mislabelled, all_known = seen
    assert torch.equal(ignored, mislabelled)
    where = valid.expand(size)
    assert torch.equal(ignored[where], all_known[where])
    unknown = ~valid[0, 0]
    for sample in range(12):  # each of its own time step
        for channel, p in enumerate((0.3, 0.9)):
            draws = ignored[sample, channel][unknown]
            assert abs(draws.mean() - p) < 4.5 * (p * (1 - p) / draws.numel()) ** 0.5


@pytest.mark.parametrize("binary", [True, False])
def test_a_refiner_learns_what_the_image_shows_and_the_prior_does_not(binary: bool) -> None:
    network, given = refiner(binary, trained=False), scene()
    given["prior"] = torch.full_like(given["prior"], 0.5)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        loss = loss_of(refiner_loss, network, given, seed=step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
