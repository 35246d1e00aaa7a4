"""What a refiner learns by beside the diffusion loss, against MONAI's Dice and plain sums."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from monai.losses import DiceLoss
from torch import Tensor

from diffseg_nnunet.training.refining import RefinementSettings, Targets
from tests.process_state import environment_restored

LABELS, REGIONS = Targets(4, regions=False, ignore=True), Targets(3, regions=True, ignore=False)


def drawn(targets: Targets, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-odds of an estimate of y_0, and y_0."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, targets.classes, 6, 5, 4)
    log_odds = 2 * torch.randn(shape, generator=generator)
    if targets.regions:
        return log_odds, torch.bernoulli(torch.full(shape, 0.3), generator=generator)
    labels = torch.randint(0, targets.classes, (2, 1, 6, 5, 4), generator=generator)
    return log_odds, torch.zeros(shape).scatter(1, labels, 1.0)


@pytest.mark.parametrize("targets", [LABELS, REGIONS])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_the_dice_loss_is_monais_of_the_probabilities_that_refining_gives(targets: Targets, batch_dice: bool) -> None:
    log_odds, clean = drawn(targets)
    probability = log_odds.sigmoid()
    if not targets.regions:
        probability = probability / probability.sum(1, keepdim=True)
    monai = DiceLoss(include_background=targets.regions, batch=batch_dice, smooth_nr=1e-5, smooth_dr=1e-5)
    found = targets.dice_loss(1.0, batch_dice)(log_odds, clean, None)
    torch.testing.assert_close(found, monai(probability, clean) / targets.classes)
    torch.testing.assert_close(targets.dice_loss(3.0, batch_dice)(log_odds, clean, None), 3 * found)


def test_the_dice_loss_does_not_see_what_is_not_annotated() -> None:
    log_odds, clean = drawn(LABELS)
    valid = torch.zeros(2, 1, 6, 5, 4, dtype=torch.bool)
    valid[..., :2] = True
    log_odds.requires_grad_()
    loss = LABELS.dice_loss(1.0, False)(log_odds, clean, valid)
    torch.testing.assert_close(loss, LABELS.dice_loss(1.0, False)(log_odds[..., :2], clean[..., :2], None))
    loss.backward()
    assert not log_odds.grad[..., 2:].any()
    assert log_odds.grad[..., :2].any()


def test_what_is_never_sure_is_in_no_voxel_the_likeliest_but_in_overlap() -> None:
    """A structure that is somewhere in a region, each voxel of it with probability 0.4: the likeliest label of every
    voxel is the background, and yet the whole region overlaps with it best."""
    generator = torch.Generator().manual_seed(0)
    inside = torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    inside[..., 10:20, 10:20] = True
    truth = (inside & (torch.rand(1, 1, 40, 40, generator=generator) < 0.4)).long()
    clean = torch.cat([1 - truth, truth], dim=1).float()

    def settled(weight: float) -> float:
        """The probability that a model of one number, that of the region, ends with."""
        number = torch.zeros(()).requires_grad_()
        optimizer = torch.optim.Adam([number], 0.1)
        dice = Targets(2, regions=False, ignore=False).dice_loss(weight, False)
        for _ in range(300):
            log_odds = torch.where(inside, number, -9.0)
            both = torch.cat([-log_odds, log_odds], dim=1)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(both, clean) + dice(both, clean, None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return number.sigmoid().item()

    assert settled(0.0) == pytest.approx(truth[inside].float().mean().item(), abs=0.01)
    assert settled(1.0) > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dice_weight": -0.5}, "dice_weight -0.5 is negative"),
        ({"start_share": 1.5}, "start_share 1.5 is not in 0..1"),
        ({"segmentor": "thawed"}, "thawed is none of frozen, alternate"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RefinementSettings(**changes)


def test_the_dice_loss_of_a_shared_batch_teaches_what_that_of_the_whole_does(tmp_path: Path) -> None:
    log_odds, clean = drawn(LABELS)
    slope = torch.nn.Parameter(torch.tensor([0.5, 1.0, 1.5, 2.0]).reshape(1, 4, 1, 1, 1))
    torch.save({"log_odds": log_odds, "clean": clean, "slope": slope.detach()}, tmp_path / "given.pth")
    program = Path(__file__).with_name("parallel_dice.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with environment_restored():
        done = subprocess.run(
            [*command, program, tmp_path / "given.pth", tmp_path / "found.pth"],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    LABELS.dice_loss(1.0, batch_dice=True)(slope * log_odds, clean, None).backward()
    torch.testing.assert_close(torch.load(tmp_path / "found.pth", weights_only=True), slope.grad)
    apart = sum(
        torch.autograd.grad(LABELS.dice_loss(1.0, True)(slope * log_odds[[n]], clean[[n]], None), slope)[0]
        for n in (0, 1)
    )
    assert not torch.allclose(apart / 2, slope.grad, rtol=1e-3)
