"""``diffseg coordinates``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffseg_nnunet.cli.arguments import Configuration, DatasetOption, Device, Fold, Workspace
from diffseg_nnunet.cli.console import open_project


def coordinates(
    dataset_id: DatasetOption,
    source: Annotated[
        Path, typer.Option("--input", "-i", help="Folder of images CASE_0000.nii.gz.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the maps and ranges.", show_default=False)],
    configuration: Configuration = "3d_fullres",
    fold: Fold = "0",
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Pretrained checkpoint; else this data set's own of -c and -f.", show_default=False),
    ] = None,
    landmarks: Annotated[
        bool,
        typer.Option(
            "--landmarks",
            help="Name the structures each scan covers, by where the labelled training cases of -f have them.",
        ),
    ] = False,
    device: Device = "auto",
    workspace: Workspace = None,
) -> None:
    """Where in the body each voxel of a scan lies, and which part of the body the scan shows, by a pretrained network.

    CASE.nii.gz holds three components a voxel, in mm along the patient's left, posterior and superior (LPS), from an
    origin common to all scans. body_ranges.json and .csv give the range over each body, and how well the map's scale
    agrees with the scan's own millimetres. Goes on where it was interrupted.
    """
    with open_project(workspace, dataset_id) as project:
        from diffseg_nnunet.cli.arguments import parse_fold
        from diffseg_nnunet.errors import EXIT_BAD_INPUT

        number = parse_fold(fold)
        from diffseg_nnunet.pipeline.coordinates import predict_body_coordinates, pretrained_checkpoint

        chosen = checkpoint or pretrained_checkpoint(project, configuration, number)
        landmarks_of = (configuration, number) if landmarks else None
        failed = predict_body_coordinates(project, chosen, source, output, device, landmarks_of)
        project.reporter.info(f"coordinates: {output}")
        for case in failed:
            project.reporter.warn(f"{case.case} was set aside: {case.reason}")
        if failed:
            raise typer.Exit(EXIT_BAD_INPUT)
