"""The stage *sample*: images drawn from a pretrained network, to see what it has learned."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray

from diffseg_nnunet import __version__
from diffseg_nnunet.atomic import full_disk_named, write_json
from diffseg_nnunet.diffusion.sampling import SamplerSettings
from diffseg_nnunet.diffusion.sampling import sample as draw_images
from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.inference.export import partial_folder, publish
from diffseg_nnunet.inference.intensities import channel_intensities, limits
from diffseg_nnunet.inference.patch_images import patch_images, patch_spacing
from diffseg_nnunet.inference.pretrained import PretrainedModel, load_pretrained
from diffseg_nnunet.pipeline.device import prepare_device
from diffseg_nnunet.pipeline.project import Project
from diffseg_nnunet.pipeline.starting import FINAL, Fold
from diffseg_nnunet.report.denoising import Panel, denoising_png
from diffseg_nnunet.training.checkpoint import file_digest
from diffseg_nnunet.training.seeding import derived_seed

RECORD, SHEET = "samples.json", "samples.png"
_STAGE = "sample"
_SAMPLE_FILE = re.compile(r"sample_\d{3,}(_\d{4})?\.nii\.gz")
_PER_ROW, _MAX_PICTURED = 4, 16


@dataclass(frozen=True)
class SamplingRequest:
    """What to sample.

    Attributes:
        configuration, fold: of the pretraining.
        checkpoint: another pretrained checkpoint, in place of theirs.
        count: number of samples.
        sampler: how.
        size: voxels per axis, in the plan's order of axes; None: the pretraining's patch.
        seed: sample k depends on the seed and k alone, on one device.
    """

    configuration: str = "3d_fullres"
    fold: Fold = 0
    checkpoint: Path | None = None
    count: int = 4
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    size: tuple[int, ...] | None = None
    seed: int = 0


def sample(project: Project, request: SamplingRequest, output: Path, device_name: str) -> dict[str, Any]:
    """Draw samples into `output`: ``sample_000.nii.gz`` …, with several channels ``sample_000_0000.nii.gz`` …; a sheet
    of their middle slices; and a record. Earlier samples there are replaced.

    Returns:
        The record: settings, seed, checkpoint, units and files.

    Raises:
        BadInputError: the network is not pretrained, the size or the number of steps does not fit it, or `output`
            holds something else.
        StageFailedError: the memory does not suffice, or the samples are not finite.
    """
    checkpoint = request.checkpoint or _find_checkpoint(project, request)
    _refuse_foreign(output)
    device = prepare_device(device_name)
    with project.log(_STAGE):
        model = load_pretrained(checkpoint, device)
    size = _fitting_size(model, request.size)
    steps_there = model.settings.diffusion.timesteps
    if request.sampler.steps > steps_there:
        raise BadInputError(
            f"{request.sampler.steps} steps are more than the {steps_there} of the pretraining.",
            f"Give --steps {steps_there} or fewer.",
        )
    channels = channel_intensities(model.plans, model.configuration, model.channels)
    record = {
        "diffseg_nnunet": __version__,
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": file_digest(checkpoint),
        "dataset": model.plans.dataset_name,
        "configuration": model.configuration_name,
        "coordinates": model.settings.coordinates.mode,
        "diffusion": model.settings.diffusion.to_json(),
        "sampler": request.sampler.to_json(),
        "seed": request.seed,
        "count": request.count,
        "size": list(size),
        "spacing_mm": list(patch_spacing(model.plans, model.configuration)),
        "channels": [channel.to_json() for channel in channels],
        "files": [name for index in range(request.count) for name in _names(index, model.channels)],
        "device": device.type,
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RECORD, {**record, "finished": False})
    _discard(output)
    pictured = []
    for index in range(request.count):
        patch = _draw(project, model, request, index, size, limits(channels, len(size)))
        patch = np.stack([c.restored(values) for c, values in zip(channels, patch, strict=True)])
        _write(patch, model, output, _names(index, model.channels))
        if index < _MAX_PICTURED:
            pictured.append(patch if patch.ndim == 3 else patch[:, patch.shape[1] // 2])
    _draw_sheet(output / SHEET, pictured, [c.unit for c in channels], request)
    write_json(output / RECORD, {**record, "finished": True})
    return record


def _find_checkpoint(project: Project, request: SamplingRequest) -> Path:
    folder = project.model_folder("pretrain", request.configuration)
    path = folder / f"fold_{request.fold}" / FINAL
    if not path.is_file():
        there = ", ".join(sorted(p.parent.name for p in folder.glob(f"fold_*/{FINAL}"))) or "none"
        raise BadInputError(
            f"There is no pretrained network {path} (pretrained there: {there}).",
            f"Run `diffseg pretrain {project.id} -c {request.configuration} -f {request.fold}` first, choose another "
            "with -f or -c, or give a --checkpoint.",
        )
    return path


def _refuse_foreign(output: Path) -> None:
    """Samples are replaced by samples, and nothing else is."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())) or _is_record(output / RECORD):
        return
    raise BadInputError(f"{output} holds something other than samples.", "Choose another folder with -o.")


def _is_record(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        return False
    return isinstance(content, dict) and "sampler" in content


def _discard(output: Path) -> None:
    for path in list(output.iterdir()):
        if _SAMPLE_FILE.fullmatch(path.name) or path.name == SHEET:
            path.unlink()


def _fitting_size(model: PretrainedModel, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """The size to draw.

    Raises:
        BadInputError: the network cannot read such a size; the message names the nearest it can.
    """
    if wanted is None:
        return model.patch_size
    wanted = tuple(wanted)
    axes = len(model.patch_size)
    shown = _shown(wanted)
    if len(wanted) != axes:
        raise BadInputError(
            f"--size {shown} has {len(wanted)} axes, {model.configuration_name} has {axes}.",
            f"Give {axes} numbers, like the pretraining's patch: --size {_shown(model.patch_size)}.",
        )
    strides = [math.prod(axis) for axis in zip(*model.configuration.pool_op_kernel_sizes, strict=True)]
    nearest = [max(1, math.floor(n / stride + 0.5)) for n, stride in zip(wanted, strides, strict=True)]
    if math.prod(nearest) == 1:  # norms need more than one voxel at the lowest resolution
        nearest[-1] = 2
    fitting = tuple(n * stride for n, stride in zip(nearest, strides, strict=True))
    if wanted != fitting:
        raise BadInputError(
            f"--size {shown} does not fit the network, which reduces the axes by {_shown(strides)} "
            "and needs more than one voxel there.",
            f"The nearest size that fits is --size {_shown(fitting)}.",
        )
    return wanted


def _shown(size: Sequence[int]) -> str:
    return " ".join(str(n) for n in size)


def _names(index: int, channels: int) -> list[str]:
    if channels == 1:
        return [f"sample_{index:03d}.nii.gz"]
    return [f"sample_{index:03d}_{channel:04d}.nii.gz" for channel in range(channels)]


def _draw(
    project: Project,
    model: PretrainedModel,
    request: SamplingRequest,
    index: int,
    size: tuple[int, ...],
    clipped_to: tuple[torch.Tensor, torch.Tensor] | None,
) -> NDArray[np.float32]:
    """One normalised patch, (C, *size). One at a time: it then depends on no other, and needs the least memory."""
    denoiser = model.assembly.denoiser
    generator = torch.Generator(device=model.device).manual_seed(derived_seed(request.seed, index))
    total = request.count * request.sampler.steps
    try:
        patch = draw_images(
            denoiser.diffusion,
            denoiser,
            (1, model.channels, *size),
            generator,
            request.sampler,
            clipped_to,
            lambda done, steps: project.reporter.progress(_STAGE, index * steps + done, total),
        )[0]
    except torch.OutOfMemoryError as error:
        raise StageFailedError(
            f"The GPU's memory does not suffice for {_shown(size)} voxels.",
            "Give a smaller --size, or --device cpu.",
        ) from error
    if not torch.isfinite(patch).all():
        raise StageFailedError(
            f"Sample {index} is not finite: the denoiser's errors grow from step to step.",
            "Pretrain longer, or give more --steps.",
        )
    return patch.cpu().numpy()


def _write(patch: NDArray[np.float32], model: PretrainedModel, output: Path, names: Sequence[str]) -> None:
    with partial_folder(output) as partial:
        for image, name in zip(patch_images(patch, model.plans, model.configuration), names, strict=True):
            with full_disk_named(output / name):
                sitk.WriteImage(image, str(partial / name), True)
                publish(partial / name, output)


def _draw_sheet(
    path: Path, slices: Sequence[NDArray[np.float32]], units: Sequence[str], request: SamplingRequest
) -> None:
    """Middle slices, (C, h, w) each, in rows of one channel."""
    rows = []
    for start in range(0, len(slices), _PER_ROW):
        chosen = range(start, min(start + _PER_ROW, len(slices)))
        for channel, unit in enumerate(units):
            names = {index: _names(index, len(units))[channel].removesuffix(".nii.gz") for index in chosen}
            rows.append([Panel(f"{names[index]}, {unit}", slices[index][channel]) for index in chosen])
    sampler = request.sampler
    denoising_png(path, rows, f"{sampler.sampler}, {sampler.steps} steps, seed {request.seed}: middle slices")
