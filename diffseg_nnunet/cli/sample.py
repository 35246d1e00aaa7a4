"""``diffseg sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffseg_nnunet.cli.arguments import Configuration, DatasetOption, Device, Fold, Seed, Workspace
from diffseg_nnunet.cli.console import open_project

SAMPLERS = ("ddim", "ddpm")


def sample(
    dataset_id: DatasetOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the samples.", show_default=False)],
    configuration: Configuration = "3d_fullres",
    fold: Fold = "0",
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A checkpoint of `diffseg pretrain`, in place of that of -c and -f.", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of samples.")] = 4,
    sampler: Annotated[str, typer.Option(help="ddim (deterministic after the first noise) or ddpm.")] = "ddim",
    steps: Annotated[int, typer.Option(min=1, help="Steps from noise to image; more are truer to the data.")] = 50,
    seed: Seed = 0,
    size: Annotated[
        list[int] | None,
        typer.Option(
            metavar="Z Y X",
            min=1,
            help="Voxels per axis, Y X in 2d, in the plan's order of axes; else the pretraining's patch.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    workspace: Workspace = None,
) -> None:
    """Draw patches, or slices in 2d, from a pretrained network, as NIfTI and as a sheet of pictures."""
    with open_project(workspace, dataset_id) as project:
        from diffseg_nnunet.cli.arguments import check_choice, parse_fold

        check_choice("--sampler", sampler, SAMPLERS)
        chosen = parse_fold(fold)
        from diffseg_nnunet.diffusion.sampling import SamplerSettings
        from diffseg_nnunet.pipeline.sampling import SHEET, SamplingRequest
        from diffseg_nnunet.pipeline.sampling import sample as sample_stage

        request = SamplingRequest(
            configuration=configuration,
            fold=chosen,
            checkpoint=checkpoint,
            count=count,
            sampler=SamplerSettings(sampler, steps),
            size=tuple(size) if size else None,
            seed=seed,
        )
        record = sample_stage(project, request, output, device)
        units = [channel["unit"] for channel in record["channels"]]
        project.reporter.info(f"samples: {output}, intensities: {', '.join(units)}; see {output / SHEET}")
        if "normalised" in units:
            schemes = sorted({c["scheme"] for c in record["channels"] if c["unit"] == "normalised"})
            project.reporter.warn(f"{', '.join(schemes)} cannot be undone without an image: values stay normalised")
