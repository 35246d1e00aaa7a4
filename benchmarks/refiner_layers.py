"""What a refiner's layers should speak of: of the flip, as HiDiff's released code has it, or of the mask.

Usage: python benchmarks/refiner_layers.py TASK_FOLDER [--seeds 0 1 2] [--iterations 200]

Slices of the Decathlon's hippocampus, 2D: a segmentor learns from three cases; then a refiner of either kind from the
same cases, draws and initial weights, the segmentor left as it is; tested on eight other cases. Both kinds say the
same at first, the prior; for the mask, the layers' output is added to the log-odds of y_0, for the flip to those of
y_t XOR y_0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from results import table, write_section
from torch import Tensor, nn
from torch.nn import functional

from diffseg_nnunet.diffusion.bernoulli import BernoulliDiffusion, BernoulliSettings, flip_signs
from diffseg_nnunet.refinement.losses import refiner_loss
from diffseg_nnunet.refinement.network import Refiner
from diffseg_nnunet.refinement.sampling import refine
from diffseg_nnunet.refinement.sizing import planned_refiner
from diffseg_nnunet.training.ema import ExponentialMovingAverage
from diffseg_nnunet.training.refining import Collaboration, RefinementSettings, Targets
from diffseg_nnunet.training.schedules import warmup_poly

SIZE, CLASSES, BATCH, WIDTH = 56, 3, 8, 8
FEATURES = (8, 16, 32, 32)
PLANNED = {"strides": [[1, 1], *[[2, 2]] * 3], "kernel_sizes": [[3, 3]] * 4, "features_per_stage": list(FEATURES)}
TRAINING, TEST, EVERY = slice(0, 3), slice(20, 28), 4
SEGMENTOR_ITERATIONS, SEGMENTOR_RATE = 750, 4e-3
SAMPLING = ((1, 1), (1, 4), (2, 4), (10, 8))
"""Steps and samples."""

Slices = tuple[Tensor, Tensor]


class SpeaksOfTheFlip(Refiner):
    """The other kind: what the layers compute is added to the log-odds of the flip."""

    def forward(self, noisy: Tensor, t: Tensor, prior: Tensor, image: Tensor, features: Sequence[Tensor]) -> Tensor:
        sign, spoken_for = flip_signs(noisy), prior.float().clamp(self.prior_margin, 1 - self.prior_margin).logit()
        layers = sign * super().forward(noisy, t, prior, image, features) - spoken_for
        return layers + sign * spoken_for


KINDS: dict[str, type[Refiner]] = {"the mask": Refiner, "the flip": SpeaksOfTheFlip}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Task04_Hippocampus")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=200, help="of a refiner")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [read(path) for path in sorted((options.source / "labelsTr").glob("hippocampus_*.nii.gz"))]
    training = tuple(torch.cat(part) for part in zip(*cases[TRAINING], strict=True))
    test = [(image[::EVERY], label[::EVERY]) for image, label in cases[TEST]]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in KINDS}
    for seed in options.seeds:
        segmentor = trained_segmentor(training, seed)
        before = dsc([segmentor(image).argmax(1, keepdim=True) for image, _ in test], test)
        for name, kind in KINDS.items():
            found[name].append(
                {"before": before, **measured(kind, segmentor, training, test, seed, options.iterations)}
            )
            print(seed, name, {key: round(value, 4) for key, value in found[name][-1].items()}, flush=True)
    write_section("refiner-layers", report(options, found))


def read(label_path: Path) -> Slices:
    """All slices of a case, (n, 1, SIZE, SIZE): the image standardised, cropped or padded; the labels whole numbers."""
    image_path = label_path.parents[1] / "imagesTr" / label_path.name
    image, label = (sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in (image_path, label_path))
    image = (image - image.mean()) / image.std()
    image, label = (volume[:, :SIZE, :SIZE] for volume in (image, label))
    padding = [(0, 0), *((0, SIZE - side) for side in image.shape[1:])]
    image, label = np.pad(image, padding).astype(np.float32), np.pad(label, padding).astype(np.int64)
    return torch.from_numpy(image)[:, None], torch.from_numpy(label)[:, None]


def batches(training: Slices, seed: int) -> Callable[[], Slices]:
    """Drawn slices, moved and changed in brightness a little."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Slices:
        chosen = torch.randint(len(training[0]), (BATCH,), generator=generator)
        shift = torch.randint(-6, 7, (2,), generator=generator).tolist()
        image, label = (torch.roll(part[chosen], shift, (2, 3)) for part in training)
        scale, offset = torch.randn(2, BATCH, 1, 1, 1, generator=generator)
        return image * (1 + 0.2 * scale) + 0.2 * offset, label

    return draw


def trained_segmentor(training: Slices, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    norm = {"norm_op": nn.InstanceNorm2d, "norm_op_kwargs": {"affine": True}}
    shape = (1, len(FEATURES), FEATURES, nn.Conv2d, 3, (1, 2, 2, 2), 1, CLASSES, 1)
    network = PlainConvUNet(*shape, conv_bias=True, **norm, nonlin=nn.LeakyReLU)
    optimizer, draw = torch.optim.AdamW(network.parameters(), SEGMENTOR_RATE), batches(training, seed)
    for iteration in range(SEGMENTOR_ITERATIONS):
        rate(optimizer, SEGMENTOR_RATE, iteration, SEGMENTOR_ITERATIONS)
        image, label = draw()
        logits = network(image)
        mask = functional.one_hot(label[:, 0], CLASSES).movedim(-1, 1)
        probability = logits.softmax(1)
        overlap = 2 * (probability * mask).sum((0, 2, 3)) / ((probability + mask).sum((0, 2, 3)) + 1e-5)
        optimizer.zero_grad()
        (functional.cross_entropy(logits, label[:, 0]) - overlap[1:].mean()).backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


def rate(optimizer: torch.optim.Optimizer, initial: float, iteration: int, iterations: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = initial * warmup_poly(iteration, iterations, max(1, iterations // 20))


def measured(
    kind: type[Refiner], segmentor: nn.Module, training: Slices, test: Sequence[Slices], seed: int, iterations: int
) -> dict[str, float]:
    """Losses in bits, and DSC by steps and samples, of a refiner by the command's settings."""
    settings, diffusion = RefinementSettings(dice_weight=0, start_share=0), BernoulliDiffusion(BernoulliSettings())
    torch.manual_seed(seed)
    refiner = kind(planned_refiner(PLANNED, 1, CLASSES, WIDTH, False))
    collaboration = Collaboration(segmentor, refiner, diffusion, Targets(CLASSES, False, False), settings)
    optimizer = torch.optim.AdamW(refiner.parameters(), settings.initial_lr, weight_decay=settings.weight_decay)
    average = ExponentialMovingAverage({"refiner": refiner}, settings.ema_decay)
    draw, (noise, worsening) = batches(training, seed), (torch.Generator().manual_seed(seed + k) for k in (1000, 2000))
    losses = []
    for iteration in range(iterations):
        rate(optimizer, settings.initial_lr, iteration, iterations)
        image, label = draw()
        with torch.no_grad():
            said = collaboration.shows(image, settings.degrade, worsening)
        loss = collaboration.refiner_loss(said, image, label, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(refiner.parameters(), settings.gradient_clip)
        optimizer.step()
        average.update()
        losses.append(loss.item())
    average.keep()
    refiner.eval()
    return {
        "training loss": float(np.mean(losses[-50:])),
        "held-out loss": held_out_loss(refiner, collaboration, test),
        **{f"{n} × {m}": refined_dsc(refiner, collaboration, test, n, m) for n, m in SAMPLING},
    }


@torch.no_grad()
def held_out_loss(refiner: Refiner, collaboration: Collaboration, test: Sequence[Slices]) -> float:
    generator, losses = torch.Generator().manual_seed(9), []
    for image, label in test:
        said, (clean, _) = collaboration.says(image), collaboration.targets.masks(label)
        losses.append(
            refiner_loss(refiner, collaboration.diffusion, clean, said.prior, said.features, image, generator).item()
        )
    return float(np.mean(losses))


@torch.no_grad()
def refined_dsc(
    refiner: Refiner, collaboration: Collaboration, test: Sequence[Slices], steps: int, samples: int
) -> float:
    labels = []
    for image, _ in test:
        said, generator = collaboration.says(image), torch.Generator().manual_seed(0)
        refined = refine(said.prior, said.features, image, refiner, collaboration.diffusion, steps, samples, generator)
        labels.append(refined.probability.argmax(1, keepdim=True))
    return dsc(labels, test)


def dsc(labels: Sequence[Tensor], test: Sequence[Slices]) -> float:
    """Mean over structures and cases."""
    scores: list[Any] = []
    for found, (_, truth) in zip(labels, test, strict=True):
        for value in range(1, CLASSES):
            one, other = found == value, truth == value
            scores.append(2 * (one & other).sum().item() / max(1, (one.sum() + other.sum()).item()))
    return float(np.mean(scores))


def report(options: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> str:
    columns = list(found["the mask"][0])
    rows = []
    for name, runs in found.items():
        cells = [[run[column] for run in runs] for column in columns]
        rows.append([name, *(f"{np.mean(cell):.4f} ({min(cell):.4f} to {max(cell):.4f})" for cell in cells)])
    header = ["the layers speak of", "DSC before", "training loss", "held-out loss"]
    header += [f"DSC, {steps} step(s) × {samples}" for steps, samples in SAMPLING]
    return (
        "## What a refiner's layers speak of\n\nScript: `benchmarks/refiner_layers.py`. Slices of the hippocampus, 2D; "
        f"segmentors of three cases ({SEGMENTOR_ITERATIONS} iterations), refiners of the same cases "
        f"({options.iterations} iterations, width {WIDTH}, full precision, the segmentor frozen), tested on eight "
        f"others; seeds {', '.join(map(str, options.seeds))}: mean (lowest to highest). Within a seed both kinds have "
        "the same initial weights, batches and draws. Losses in bits; steps × samples of the reverse process.\n\n"
        + table(header, rows)
    )


if __name__ == "__main__":
    main()
