"""One-step denoising of held-out scans by pretrained networks, total variation and non-local means.

Usage: python benchmarks/denoising.py WORKSPACE DATA [--modes auxiliary] [--seed 0] [--iterations 600] [--picture PNG]
       python benchmarks/denoising.py WORKSPACE DATA --checkpoint CHECKPOINT

Pretrains where the workspace has no such pretraining (see abdomen.py). All methods get the same noised patches and
know the noise level; total variation and non-local means are tuned for it, on training scans.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from abdomen import DATASETS, HeldOut, add_arguments, describe, held_out, prepare, pretrain, training_scans
from numpy.typing import NDArray
from results import cached, interval, table, write_section
from scans import Window, padded, read_scan, span, window
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle

from diffseg_nnunet.inference.pretrained import PretrainedModel, load_pretrained
from diffseg_nnunet.report.denoising import Panel, denoising_png
from diffseg_nnunet.training.checkpoint import file_digest

LEVELS = (0.9, 0.5, 0.2)  # ᾱ: share of the signal's variance that is left
TUNING_SCANS, TUNING_SIDE = 2, 48  # of each data set; side of the crop of each that is tuned on, voxels
NLM_WINDOWS = ((3, 3), (3, 4), (5, 3), (5, 4), (5, 5), (7, 4))  # side of the patches compared, how far to look
FIRST_STEP, LAST_STEP = 2.0, 1.15  # factors of the search for the best strength
LEAST, MOST = 1e-3, 1e3  # of a strength
INPUT, TV, NLM = "input / √ᾱ", "total variation", "non-local means"
CLASSICAL = {INPUT: "input", TV: "tv", NLM: "nlm"}
_TUNING_SEED = 10_000  # keeps the noise that is tuned on apart from the noise that is measured on


@dataclass(frozen=True)
class Noised:
    """A patch and its noised twin.

    Attributes:
        case: of which scan.
        clean: float32 (C, ...), padded to the size the network reads.
        noised: likewise, the padding noised too, as in the pretraining.
        place: where in it the scan's voxels lie.
        t: the time step.
        alpha_bar: what is left of the signal's variance at t.
    """

    case: str
    clean: NDArray[np.float32]
    noised: NDArray[np.float32]
    place: Window
    t: int
    alpha_bar: float

    @property
    def reference(self) -> NDArray[np.float32]:
        return self.clean[0][self.place]

    @cached_property
    def scaled(self) -> NDArray[np.float32]:
        """The noised voxels of the scan, scaled so that their mean is the clean image's."""
        return self.noised[0][self.place] / np.float32(np.sqrt(self.alpha_bar))

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise in `scaled`."""
        return float(np.sqrt((1 - self.alpha_bar) / self.alpha_bar))


Method = Callable[[Noised], NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--modes", nargs="+", default=["auxiliary"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--checkpoint", type=Path, help="of another pretraining, in place of the modes")
    parser.add_argument("--cases", type=int, help="only so many scans of each data set, to try the script")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    parser.add_argument("--picture-of", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    prepare(options.workspace, options.data)
    checkpoints = _checkpoints(options)
    models = {name: load_pretrained(path, torch.device(options.device)) for name, path in checkpoints.items()}
    keys = {name: file_digest(path)[:12] for name, path in checkpoints.items()}
    tuned = _tune(options, next(iter(models.values())))
    records = {name: _measure(options, name, models, keys, tuned) for name in DATASETS}
    if options.picture:
        _picture(options, models, tuned)
    write_section("denoising", _report(options, list(models), tuned, records))


def _checkpoints(options: argparse.Namespace) -> dict[str, Path]:
    if options.checkpoint:
        return {f"network ({options.checkpoint.parents[2].name})": options.checkpoint}
    return {
        f"network ({mode})": pretrain(options.workspace, mode, options.seed, options.iterations).checkpoint
        for mode in options.modes
    }


def noised_patch(model: PretrainedModel, source: HeldOut, level: float, seed: int) -> Noised:
    """A random patch of a scan, the same at all levels, noised; a function of case, level, plan and seed."""
    scan = read_scan(model, source)
    digits = int("".join(filter(str.isdigit, source.case)))
    centre = np.random.default_rng([seed, digits]).uniform(0, scan.shape)
    box = window(centre, model.patch_size, scan.shape)
    clean, place = padded(scan.voxels[(slice(None), *box)], model.patch_size)
    diffusion = model.assembly.denoiser.diffusion
    t = int((diffusion.alpha_bar - level).abs().argmin())
    generator = np.random.default_rng([seed, digits, round(1000 * level)])
    noise = torch.from_numpy(generator.standard_normal(clean.shape, dtype=np.float32))
    noised = diffusion.add_noise(torch.from_numpy(clean)[None], noise[None], torch.tensor([t]))[0].numpy()
    return Noised(source.case, clean, noised, place, t, float(diffusion.alpha_bar[t]))


def by_network(model: PretrainedModel, patch: Noised) -> NDArray[np.float32]:
    """The one-step estimate of the clean patch; guidance gets no map, which would be made of the clean patch."""
    noised = torch.from_numpy(patch.noised)[None].to(model.device)
    estimate = model.assembly.denoiser.denoised(noised, torch.tensor([patch.t], device=model.device))
    return estimate[0, 0].cpu().numpy()[patch.place]


def by_total_variation(strength: float, patch: Noised) -> NDArray[np.float32]:
    """Chambolle's, with weight = strength × noise."""
    return denoise_tv_chambolle(patch.scaled, weight=strength * patch.sigma)


def by_non_local_means(strength: float, patch_size: int, distance: int, patch: Noised) -> NDArray[np.float32]:
    """With h = strength × noise."""
    return denoise_nl_means(
        patch.scaled,
        patch_size=patch_size,
        patch_distance=distance,
        h=strength * patch.sigma,
        sigma=patch.sigma,
        fast_mode=True,
    )


def line_search(error: Callable[[float], float], start: float = 1.0) -> tuple[float, float]:
    """The strength of least error and that error: by ever smaller factors, until both neighbours are worse."""
    known: dict[float, float] = {}

    def at(value: float) -> float:
        if value not in known:
            known[value] = error(value)
        return known[value]

    best, step = start, FIRST_STEP
    while True:
        nearest = min((max(best / step, LEAST), best, min(best * step, MOST)), key=at)
        if nearest != best:
            best = nearest
        elif step <= LAST_STEP:
            return best, at(best)
        else:
            step = max(LAST_STEP, step**0.5)


def psnr(mean_square_error: float, data_range: float) -> float:
    """Peak signal-to-noise ratio in dB."""
    return float(10 * np.log10(data_range**2 / mean_square_error))


def _tune(options: argparse.Namespace, model: PretrainedModel) -> dict[str, dict[str, Any]]:
    """Level -> the settings of least squared error on training scans, kept in the workspace."""
    path = _kept(options, model) / "tuned.json"
    sources = [scan for name in DATASETS for scan in training_scans(options.workspace, name)[:TUNING_SCANS]]
    return cached(path, lambda: {str(level): _tune_level(model, sources, level) for level in LEVELS})


def _tune_level(model: PretrainedModel, sources: Sequence[HeldOut], level: float) -> dict[str, Any]:
    patches = [_cropped(noised_patch(model, source, level, _TUNING_SEED)) for source in sources]

    def error(method: Method) -> float:
        return float(np.mean([np.mean((method(patch) - patch.reference) ** 2) for patch in patches]))

    strength, _ = line_search(lambda s: error(partial(by_total_variation, s)))
    found = []
    for size, distance in NLM_WINDOWS:
        h, least = line_search(lambda s, w=(size, distance): error(partial(by_non_local_means, s, *w)))
        found.append((least, h, size, distance))
    print(f"ᾱ = {level}: total variation {strength:.3g} σ, non-local means (error, h / σ, patch, distance) {found}")
    return {"tv": strength, "nlm": list(min(found)[1:])}


def _cropped(patch: Noised) -> Noised:
    """The middle of a patch."""
    place = tuple(span((p.start + p.stop - 1) / 2, TUNING_SIDE, p.start, p.stop) for p in patch.place)
    return replace(patch, place=place)


def _classical(tuned: dict[str, dict[str, Any]], level: float) -> dict[str, Method]:
    settings = tuned[str(level)]
    return {
        INPUT: lambda patch: patch.scaled,
        TV: partial(by_total_variation, settings["tv"]),
        NLM: partial(by_non_local_means, *settings["nlm"]),
    }


def _measure(
    options: argparse.Namespace,
    dataset: str,
    models: dict[str, PretrainedModel],
    keys: dict[str, str],
    tuned: dict[str, Any],
) -> list[dict[str, Any]]:
    """One record a scan, level and method: its mean squared error, and the clean patch's range; kept as they come."""
    model, records = next(iter(models.values())), []
    folder = _kept(options, model)
    for source in held_out(options.workspace, dataset)[: options.cases]:
        for level in LEVELS:
            patch = lru_cache(partial(noised_patch, model, source, level, options.seed))
            methods = _classical(tuned, level) | {name: partial(by_network, each) for name, each in models.items()}
            for name, method in methods.items():
                key = keys.get(name) or CLASSICAL[name]
                path = folder / f"{key}_seed{options.seed}" / f"{source.case}_{level}.json"
                record = cached(path, partial(_record, patch, method))
                records.append({"case": source.case, "level": level, "method": name, **record})
        print(f"{dataset} {source.case} measured", flush=True)
    return records


def _record(patch: Callable[[], Noised], method: Method) -> dict[str, Any]:
    clean = patch().reference
    error = float(np.mean((method(patch()) - clean) ** 2))
    return {"t": patch().t, "low": float(clean.min()), "high": float(clean.max()), "error": error}


def _kept(options: argparse.Namespace, model: PretrainedModel) -> Path:
    """Where results are kept, by the size of the patches."""
    return options.workspace / "benchmarks" / "denoising" / "x".join(str(side) for side in model.patch_size)


def _report(
    options: argparse.Namespace,
    networks: list[str],
    tuned: dict[str, dict[str, Any]],
    measured: dict[str, list[dict[str, Any]]],
) -> str:
    rows, differences, ranges, steps = [], [], [], {}
    for dataset, records in measured.items():
        data_range = max(record["high"] for record in records) - min(record["low"] for record in records)
        ranges.append(f"{dataset} {data_range:.2f}")
        for level in LEVELS:
            own = [record for record in records if record["level"] == level]
            steps[level] = own[0]["t"]
            values = {
                name: np.array([psnr(record["error"], data_range) for record in own if record["method"] == name])
                for name in dict.fromkeys(record["method"] for record in own)
            }
            rows += [(dataset, level, name, interval(of_scans, 2)) for name, of_scans in values.items()]
            for network in networks:
                for other in (TV, NLM):
                    gain = values[network] - values[other]
                    won = f"{(gain > 0).sum()} of {len(gain)}"
                    differences.append((dataset, level, f"{network} − {other}", interval(gain, 2), won))
    levels = "; ".join(
        f"ᾱ = {level} (t = {steps[level]}): TV weight {tuned[str(level)]['tv']:.2f} σ, "
        "NLM h {:.2f} σ, patch {}, distance {}".format(*tuned[str(level)]["nlm"])
        for level in LEVELS
    )
    count = ", ".join(f"{len({r['case'] for r in records})} {name}" for name, records in measured.items())
    length = "a given checkpoint" if options.checkpoint else f"{options.iterations} iterations of pretraining"
    return (
        f"## Denoising\n\nScript: `benchmarks/denoising.py`, seed {options.seed}, {length}. "
        f"{describe(options.workspace)} One patch of each of the held-out scans ({count}), "
        "noised in the normalised space; all methods get the same "
        "noised patch and its noise level. The network estimates the clean patch in one step, in float32; one with "
        "guidance gets no coordinate map here, which would be made from the clean patch. Total variation (Chambolle) "
        "and non-local means (scikit-image, 3D, given σ) are tuned for each level on "
        f"{TUNING_SCANS} training scans of each data set: {levels}; σ is the noise's standard deviation in the input "
        "scaled by 1/√ᾱ, which is all they read.\n\nPSNR in dB, mean over scans [95 % CI]; its peak is the range of "
        f"the data set's clean patches in normalised units: {', '.join(ranges)}.\n\n"
        + table(("data", "ᾱ", "method", "PSNR dB"), rows)
        + "\n\nPaired differences, scan by scan:\n\n"
        + table(("data", "ᾱ", "difference", "dB", "scans won"), differences)
    )


def _picture(options: argparse.Namespace, models: dict[str, PretrainedModel], tuned: dict[str, Any]) -> None:
    """The middle slices of the first held-out scan of each data set, at every level."""
    model, rows = next(iter(models.values())), []
    for dataset in options.picture_of:
        source = held_out(options.workspace, dataset)[0]
        for level in LEVELS:
            patch = noised_patch(model, source, level, options.seed)
            methods = _classical(tuned, level) | {n: partial(by_network, m) for n, m in models.items()}
            panels = [Panel(f"{source.case}, clean", _middle(patch.reference))]
            panels += [Panel(f"{name}, ᾱ = {level:g}", _middle(method(patch))) for name, method in methods.items()]
            rows.append(panels)
    denoising_png(options.picture, rows, "held-out scans, one step")


def _middle(volume: NDArray) -> NDArray:
    """The middle slice of the first axis."""
    return volume[len(volume) // 2]


if __name__ == "__main__":
    main()
