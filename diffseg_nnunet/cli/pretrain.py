"""``diffseg pretrain``."""

from __future__ import annotations

from typing import Annotated

import typer

from diffseg_nnunet.cli.arguments import Configuration, DatasetId, Device, Precision, Seed, Workspace
from diffseg_nnunet.cli.console import open_project

Iterations = Annotated[int, typer.Option(min=1, help="Training length; nnU-Net's is 250 × 1000.")]
PretrainingFold = Annotated[
    str | None,
    typer.Option(
        "--fold",
        "-f",
        help="Pretrain on this fold's training cases and the unlabelled pool, or on 'all' cases. Default: 0, or all "
        "where there are no labels.",
        show_default=False,
    ),
]
InitialRate = Annotated[
    float | None, typer.Option("--initial-lr", min=0.0, help="Initial learning rate.", show_default=False)
]
Optimizer = Annotated[
    str, typer.Option(help="sgd (nnU-Net's) or adamw, which learns much faster when training is short.")
]
OPTIMIZERS = ("sgd", "adamw")
Resume = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Go on where it was interrupted, or set earlier results aside.")
]
Workers = Annotated[int | None, typer.Option(min=0, help="Augmentation processes.", show_default=False)]


def pretrain(
    dataset_id: DatasetId,
    configuration: Configuration = "3d_fullres",
    fold: PretrainingFold = None,
    iterations: Iterations = 250_000,
    seed: Seed = 0,
    device: Device = "auto",
    initial_lr: InitialRate = None,
    precision: Precision = "auto",
    workers: Workers = None,
    resume: Resume = True,
    workspace: Workspace = None,
) -> None:
    """Train the planned network to denoise and to tell where in the body it looks, without labels. Resumes."""
    with open_project(workspace, dataset_id) as project:
        from diffseg_nnunet.cli.arguments import check_choice, given, parse_fold

        check_choice("--precision", precision, ("auto", "float32", "bfloat16"))
        chosen = parse_fold(fold or ("0" if project.raw().labelled_cases() else "all"))
        from diffseg_nnunet.pipeline.stages import pretrain as pretrain_stage

        checkpoint = pretrain_stage(
            project,
            configuration,
            chosen,
            device,
            resume=resume,
            **given(iterations=iterations, seed=seed, initial_lr=initial_lr, precision=precision, workers=workers),
        )
        project.reporter.info(f"pretrained network, in stock nnU-Net's format: {checkpoint}")
