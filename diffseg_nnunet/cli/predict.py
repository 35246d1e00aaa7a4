"""``diffseg predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffseg_nnunet.cli.arguments import STRATEGIES, DatasetOption, Device, Strategy, Workspace
from diffseg_nnunet.cli.console import open_project

_FULL = "3d_fullres"


def predict(
    dataset_id: DatasetOption,
    source: Annotated[
        Path, typer.Option("--input", "-i", help="Folder of images CASE_0000.nii.gz.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the segmentations.", show_default=False)],
    configuration: Annotated[
        list[str] | None,
        typer.Option("--configuration", "-c", help="nnU-Net configuration; several are averaged.", show_default=_FULL),
    ] = None,
    fold: Annotated[
        list[str] | None,
        typer.Option(
            "--fold", "-f", help="Fold, or 'all'; several are averaged.", show_default="all folds that are trained"
        ),
    ] = None,
    strategy: Strategy = "finetune",
    checkpoint: Annotated[
        str, typer.Option(help="File name of the folds' checkpoints, e.g. checkpoint_best.pth.")
    ] = "checkpoint_final.pth",
    no_mirroring: Annotated[bool, typer.Option("--no-mirroring", help="No test-time mirroring: faster.")] = False,
    step_size: Annotated[
        float,
        typer.Option(
            help="From one window to the next, as a share of the patch, above 0 and at most 1. Volumes much larger "
            "than it take a third of the windows with 0.75."
        ),
    ] = 0.5,
    postprocessing: Annotated[
        Path | None, typer.Option(help="nnU-Net's postprocessing.pkl to apply.", show_default=False)
    ] = None,
    npz: Annotated[
        bool,
        typer.Option("--npz", "--save_probabilities", help="Also write probabilities, .npz and .pkl as nnU-Net does."),
    ] = False,
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty",
            help="Also write a map of each voxel's uncertainty: the entropy of the probabilities in bits; of a pixel "
            "ensemble how much the voters disagree, 0 to 1.",
        ),
    ] = False,
    refine: Annotated[
        bool, typer.Option("--refine", help="Refine with the folds' refiners (`diffseg refine`).")
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --refine: masks drawn and averaged; else as in the validation.", show_default=False
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --refine: steps of the reverse process; else as in the validation.", show_default=False
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="With --refine: ddim or ancestral; else as in the validation.", show_default=False),
    ] = None,
    refine_threshold: Annotated[
        float | None,
        typer.Option(
            metavar="BITS",
            help="With --refine: only voxels whose probabilities have a larger entropy; else all.",
            show_default=False,
        ),
    ] = None,
    refine_structures: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,…",
            help="With --refine: these structures alone are the refined segmentation's; else all.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="With --refine: of the draws.")] = 0,
    device: Device = "auto",
    workspace: Workspace = None,
) -> None:
    """Segment a folder of images; several folds or configurations are averaged. Goes on where it was interrupted."""
    with open_project(workspace, dataset_id) as project:
        from diffseg_nnunet.cli.arguments import check_choice, parse_fold
        from diffseg_nnunet.errors import EXIT_BAD_INPUT, BadInputError
        from diffseg_nnunet.inference.refining import RefineOptions

        check_choice("--strategy", strategy, STRATEGIES)
        if not 0 < step_size <= 1:
            raise BadInputError(
                f"--step-size {step_size:g} is not above 0 and at most 1: windows would stand still or leave gaps.",
                "Give 0.5, nnU-Net's, or a larger one to be faster.",
            )
        if Path(checkpoint).name != checkpoint:
            raise BadInputError(f"--checkpoint {checkpoint} is no file name.", "Give one like checkpoint_best.pth.")
        if sampler is not None:
            check_choice("--sampler", sampler, ("ddim", "ancestral"))
        options = RefineOptions(steps, samples, sampler, refine_threshold, seed)
        structures = tuple(refine_structures.split(",")) if refine_structures else None
        if not refine and (structures or options != RefineOptions()):
            raise BadInputError(
                "--samples, --steps, --sampler, --refine-threshold, --refine-structures and --seed tell how to refine.",
                "Add --refine.",
            )
        from diffseg_nnunet.pipeline.folds import trained_folds
        from diffseg_nnunet.pipeline.prediction import predict as predict_stage
        from diffseg_nnunet.pipeline.prediction_request import PredictionRequest
        from diffseg_nnunet.pipeline.refining import REFINE

        configurations = tuple(configuration or (_FULL,))
        folds = tuple(parse_fold(text) for text in fold or ())
        if not folds:
            folds = trained_folds(project, REFINE if refine else strategy, configurations) or (0,)
            project.reporter.info(f"folds: {' '.join(map(str, folds))}")
        request = PredictionRequest(
            configurations=configurations,
            folds=folds,
            strategy=strategy,
            mirroring=not no_mirroring,
            step_size=step_size,
            postprocessing=postprocessing,
            probabilities=npz,
            uncertainty=uncertainty,
            checkpoint=checkpoint,
            refine=options if refine else None,
            refined_structures=structures,
        )
        failed = predict_stage(project, request, source, output, device)
        project.reporter.info(f"segmentations: {output}")
        for case in failed:
            project.reporter.warn(f"{case.case} was set aside: {case.reason}")
        if failed:
            raise typer.Exit(EXIT_BAD_INPUT)
