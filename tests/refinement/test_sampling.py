"""Refining: what a refiner that says nothing, one that knows everything, and one that guesses lead to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from diffseg_nnunet.diffusion.bernoulli import BernoulliDiffusion, BernoulliSettings, exclusive_or, flip_signs
from diffseg_nnunet.refinement.masks import labels_of
from diffseg_nnunet.refinement.network import Refiner, RefinerArchitecture
from diffseg_nnunet.refinement.sampling import BERNOULLI_SAMPLERS, Refined, entropy_bits, refine

T = 10
SHAPES = [(2, 4, 6, 5), (2, 3, 3, 4, 5)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def softmax_prior(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return (2 * torch.randn(shape, generator=seeded(seed))).softmax(1)


def knowing(clean: Tensor) -> Callable[..., Tensor]:
    """A network that sees every flip, whatever number of samples it is shown at once."""
    return lambda noisy, *_: (
        200 * exclusive_or(noisy, clean.repeat(len(noisy) // len(clean), *(1,) * (clean.ndim - 1))) - 100
    )


def estimating(probability: Tensor) -> Callable[..., Tensor]:
    """A network whose estimate of y_0 is always this."""
    return lambda noisy, t, prior, image, features: flip_signs(noisy) * probability.logit()


def refined(prior: Tensor, network: Callable[..., Tensor], steps: int = T, samples: int = 1, **options) -> Refined:
    process = BernoulliDiffusion(BernoulliSettings(timesteps=T))
    return refine(prior, [], prior, network, process, steps, samples, options.pop("generator", seeded()), **options)


@pytest.mark.parametrize("sampler", BERNOULLI_SAMPLERS)
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("exclusive", [True, False])
def test_a_new_refiner_leaves_the_label_map_unchanged(sampler: str, binary: bool, exclusive: bool) -> None:
    plan = RefinerArchitecture(1, 3, (4, 8), ((1, 1), (2, 2)), ((3, 3), (3, 3)), (5,), binary=binary)
    prior = softmax_prior((2, 3, 8, 7)) if exclusive else torch.rand(2, 3, 8, 7, generator=seeded())
    prior[:, :, 0] = torch.tensor([0.0, 1.0, 0.0])[:, None]  # certain
    network = Refiner(plan).eval()
    features, image = [torch.randn(2, 5, 4, 4)], torch.randn(2, 1, 8, 7)
    process = BernoulliDiffusion(BernoulliSettings())
    found = refine(prior, features, image, network, process, 4, 2, seeded(), sampler=sampler, exclusive=exclusive)
    order = None if exclusive else (1, 2, 3)
    assert torch.equal(labels_of(found.probability, order), labels_of(prior, order))
    torch.testing.assert_close(found.probability, prior, atol=4e-4, rtol=0)


@pytest.mark.parametrize("sampler", BERNOULLI_SAMPLERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_one_that_knows_every_flip_gives_the_mask(sampler: str, shape: tuple[int, ...], steps: int) -> None:
    labels = torch.randint(0, shape[1], (shape[0], 1, *shape[2:]), generator=seeded(3))
    clean = torch.zeros(shape).scatter(1, labels, 1.0)
    found = refined(softmax_prior(shape), knowing(clean), steps, samples=2, sampler=sampler)
    torch.testing.assert_close(found.probability, clean)
    assert found.entropy.max() < 1e-5
    assert found.share.tolist() == [1, 1]


@pytest.mark.parametrize("sampler", BERNOULLI_SAMPLERS)
def test_estimates_of_exclusive_classes_sum_to_one_and_regions_stay(sampler: str) -> None:
    estimate = torch.rand(2, 3, 5, 4, generator=seeded(1))
    prior = softmax_prior((2, 3, 5, 4))
    found = refined(prior, estimating(estimate), sampler=sampler)
    torch.testing.assert_close(found.probability, estimate / estimate.sum(1, keepdim=True))
    found = refined(prior, estimating(estimate), sampler=sampler, exclusive=False)
    torch.testing.assert_close(found.probability, estimate)


@pytest.mark.parametrize("sampler", BERNOULLI_SAMPLERS)
def test_results_repeat_with_the_seed_and_differ_without(sampler: str) -> None:
    prior = softmax_prior((1, 3, 6, 6))

    def follows(noisy: Tensor, *_: object) -> Tensor:
        return torch.full_like(noisy, -2.0)  # "nothing was flipped"

    one, same, other = (
        refined(prior, follows, samples=2, generator=seeded(seed), sampler=sampler) for seed in (0, 0, 1)
    )
    assert torch.equal(one.probability, same.probability)
    assert torch.equal(one.entropy, same.entropy)
    assert not torch.equal(one.probability, other.probability)


def test_samples_that_agree_with_the_drawn_mask_average_to_the_prior() -> None:
    # "nothing was flipped": each sample is one draw, and every channel's mean is its prior
    prior = torch.rand(1, 2, 4, 4, generator=seeded())
    found = refined(prior, lambda noisy, *_: torch.full_like(noisy, -100.0), 1, samples=4000, exclusive=False)
    tolerance = 4.5 * (prior * (1 - prior) / 4000).sqrt() + 1e-3
    assert ((found.probability - prior).abs() < tolerance).all()
    torch.testing.assert_close(found.entropy, entropy_bits(prior, exclusive=False), atol=0.1, rtol=0)


@pytest.mark.parametrize("samples", [1, 9])
def test_one_draw_of_the_posterior_is_worse_than_its_most_probable_value_and_the_mean_of_several_is_not(
    samples: int,
) -> None:
    """Of voxels that are 1 with probability 0.7, the most probable value is right in 70 %, a draw of the same in 58 %;
    that of several draws by the binomial's tail."""
    truth = torch.bernoulli(torch.full((1, 1, 200, 200), 0.7), generator=seeded(1))
    found = refined(
        torch.full_like(truth, 0.7),
        lambda noisy, *_: torch.full_like(noisy, -100.0),  # "nothing was flipped": each sample is a draw
        1,
        samples=samples,
        exclusive=False,
    )
    right = ((found.probability > 0.5) == truth.bool()).float().mean().item()
    one = float(stats.binom.sf(samples // 2, samples, 0.7))
    expected = 0.7 * one + 0.3 * (1 - one)
    assert expected == pytest.approx(0.58 if samples == 1 else 0.66, abs=0.005)
    assert abs(right - expected) < 4.5 * (expected * (1 - expected) / truth.numel()) ** 0.5


def test_certain_voxels_keep_the_prior_to_the_last_bit() -> None:
    prior = softmax_prior((2, 4, 6, 5))
    prior[0] = torch.tensor([1.0, 0, 0, 0])[:, None, None]
    estimate = torch.full_like(prior, 0.25)
    found = refined(prior, estimating(estimate), threshold_bits=1.0)
    doubtful = (entropy_bits(prior, exclusive=True) > 1.0).expand_as(prior)
    assert 0 < doubtful.float().mean() < 1
    assert torch.equal(found.probability[~doubtful], prior[~doubtful])
    torch.testing.assert_close(found.probability[doubtful], estimate[doubtful])
    torch.testing.assert_close(found.share, doubtful.flatten(1).float().mean(1))
    assert found.share[0] == 0


def test_a_batch_without_a_doubt_costs_no_forward_pass() -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError("the network was run")

    prior = softmax_prior((1, 4, 6, 5))
    found = refined(prior, never, threshold_bits=2.0)  # log2 of 4 classes, which no prior passes
    assert torch.equal(found.probability, prior)
    assert found.share.tolist() == [0]


def test_the_network_is_told_the_time_steps_it_was_trained_with() -> None:
    told: list[int] = []

    def records(noisy: Tensor, t: Tensor, *_: object) -> Tensor:
        told.append(t.item())
        return torch.zeros_like(noisy)

    refined(softmax_prior((1, 2, 3, 3)), records, steps=5)
    assert told == [9, 7, 5, 3, 1]


def test_nothing_is_drawn_from_what_is_not_finite() -> None:
    prior = softmax_prior((1, 2, 3, 3))
    generator = seeded()
    before = generator.get_state()
    broken = prior.clone()
    broken[0, :, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="the prior is not finite in 1 voxels"):
        refined(broken, estimating(prior), generator=generator)
    assert torch.equal(generator.get_state(), before)
    with pytest.raises(ValueError, match="the refiner's estimate is not finite in 9 voxels"):
        refined(prior, lambda noisy, *_: torch.full_like(noisy, torch.nan))


def test_entropy_in_bits() -> None:
    even, certain = torch.full((1, 4, 2, 2), 0.25), torch.eye(4)[:1].reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
    assert torch.equal(entropy_bits(even, exclusive=True), torch.full((1, 1, 2, 2), 2.0))
    assert not entropy_bits(certain, exclusive=True).any()
    assert not entropy_bits(certain, exclusive=False).any()
    torch.testing.assert_close(entropy_bits(torch.full((1, 3, 2, 2), 0.5), exclusive=False), torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "0 samples are fewer than one"),
        ({"steps": 11}, "11 steps are not within 1"),
        ({"sampler": "ddpm"}, "ddpm is none of ddim, ancestral"),
    ],
)
def test_refining_that_cannot_be(changes: dict[str, object], message: str) -> None:
    prior = softmax_prior((1, 2, 3, 3))
    with pytest.raises(ValueError, match=message):
        refined(prior, estimating(prior), **changes)
