"""``diffseg pretrain``."""

from __future__ import annotations

from typing import Annotated

import typer

from diffseg_nnunet.cli.arguments import Configuration, DatasetId, Device, Precision, Seed, Workspace
from diffseg_nnunet.cli.console import is_first, open_project

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
POOLS = ("unlabeled", "training", "all")
Pool = Annotated[
    str,
    typer.Option(help="What to pretrain on: unlabeled images, these and the fold's training cases, or all images."),
]
_PLANNED = "Not given: as planned."
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
    pool: Pool = "training",
    balance: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="0: every case is drawn alike. 1: every data set of the pool alike.")
    ] = 0.5,
    coordinates: Annotated[str | None, typer.Option(help=f"auxiliary, guidance or none. {_PLANNED}")] = None,
    coordinate_objective: Annotated[
        str | None, typer.Option(help=f"relative (positions) or distance (APE's). {_PLANNED}")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help=f"Noise: linear_beta, scaled_linear_beta, sigmoid_beta or cosine. {_PLANNED}")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help=f"What is predicted: epsilon, sample or v_prediction. {_PLANNED}")
    ] = None,
    loss_weighting: Annotated[str | None, typer.Option(help=f"uniform or min_snr. {_PLANNED}")] = None,
    timesteps: Annotated[int | None, typer.Option(min=2, help=f"T of the diffusion. {_PLANNED}")] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches whose gradients make one iteration.")] = 1,
    augment: Annotated[bool, typer.Option("--augment/--no-augment", help="Turn, scale, brighten patches.")] = True,
    initial_lr: InitialRate = None,
    precision: Precision = "auto",
    workers: Workers = None,
    resume: Resume = True,
    workspace: Workspace = None,
) -> None:
    """Train the planned network to denoise and to tell where in the body it looks, without labels. Resumes."""
    with open_project(workspace, dataset_id, several=True) as project:
        from diffseg_nnunet.cli.arguments import check_choice, given, parse_fold

        check_choice("--precision", precision, ("auto", "float32", "bfloat16"))
        check_choice("--pool", pool, POOLS)
        for option, value, choices in (
            ("--coordinates", coordinates, ("auxiliary", "guidance", "none")),
            ("--coordinate-objective", coordinate_objective, ("relative", "distance")),
            ("--schedule", schedule, ("linear_beta", "scaled_linear_beta", "sigmoid_beta", "cosine")),
            ("--target", target, ("epsilon", "sample", "v_prediction")),
            ("--loss-weighting", loss_weighting, ("uniform", "min_snr")),
        ):
            if value is not None:
                check_choice(option, value, choices)
        chosen = parse_fold(fold or ("0" if project.raw().labelled_cases() else "all"))
        from diffseg_nnunet.pipeline.stages import pretrain as pretrain_stage

        checkpoint = pretrain_stage(
            project,
            configuration,
            chosen,
            device,
            resume=resume,
            diffusion=given(schedule=schedule, prediction=target, loss_weighting=loss_weighting, timesteps=timesteps),
            coordinates=given(mode=coordinates, objective=coordinate_objective),
            **given(
                iterations=iterations,
                seed=seed,
                pool=pool,
                balance=balance,
                accumulate=accumulate,
                augment=augment,
                initial_lr=initial_lr,
                precision=precision,
                workers=workers,
            ),
        )
        if is_first():
            project.reporter.info(f"pretrained network, in stock nnU-Net's format: {checkpoint}")
