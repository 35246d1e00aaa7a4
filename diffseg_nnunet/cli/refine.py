"""``diffseg refine``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffseg_nnunet.cli.arguments import Configuration, DatasetId, Device, Fold, Precision, Seed, Strategy, Workspace
from diffseg_nnunet.cli.console import is_first, open_project
from diffseg_nnunet.cli.pretrain import InitialRate, Resume, Workers


def refine(
    dataset_id: DatasetId,
    configuration: Configuration = "3d_fullres",
    fold: Fold = "0",
    strategy: Strategy = "finetune",
    iterations: Annotated[int, typer.Option(min=1, help="Training length.")] = 40_000,
    segmentor: Annotated[
        str, typer.Option(help="frozen: it stays as it is. alternate: a copy learns in turn with the refiner.")
    ] = "frozen",
    segmentor_weight: Annotated[
        float | None,
        typer.Option(min=0.0, help="Of the diffusion loss beside the segmentor's own.", show_default="0.1"),
    ] = None,
    binary: Annotated[bool, typer.Option("--binary", help="1-bit weights and activations.")] = False,
    width: Annotated[
        int | None,
        typer.Option(min=2, help="Channels of the refiner's first stage; else the widest of 32, 24, 16, 8 that fits."),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="T: time steps of the diffusion.")] = 10,
    schedule: Annotated[str, typer.Option(help="Noise: cosine, linear_beta or linear_alpha_bar.")] = "cosine",
    focal_gamma: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="γ of the focal loss beside the variational bound; 0: cross entropy, which makes refiners surer of "
            "what they say.",
        ),
    ] = 2.0,
    dice_weight: Annotated[
        float,
        typer.Option(
            min=0.0, help="Of the soft Dice loss beside the diffusion loss; 0: the published loss, which has none."
        ),
    ] = 1.0,
    start_share: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Share of the samples at the last time step, where refining starts; else any."
        ),
    ] = 0.5,
    degrade: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of the samples of which the segmentor is shown a worse view: it is too sure of training cases.",
        ),
    ] = 0.6,
    samples: Annotated[
        int, typer.Option(min=1, help="Masks drawn and averaged in the validation, and by default in predictions.")
    ] = 4,
    sampling_steps: Annotated[
        int,
        typer.Option(
            min=1, help="Of the reverse process there. Each takes the refiner once over all samples of a window."
        ),
    ] = 1,
    sampler: Annotated[str, typer.Option(help="Of these steps: ddim or ancestral.")] = "ddim",
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Another segmentor of this plan and fold, e.g. stock nnU-Net's.", show_default=False),
    ] = None,
    npz: Annotated[bool, typer.Option("--npz", help="Also store probabilities of the validation cases.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    initial_lr: InitialRate = None,
    precision: Precision = "auto",
    workers: Workers = None,
    resume: Resume = True,
    workspace: Workspace = None,
) -> None:
    """Train a Bernoulli-diffusion refiner (HiDiff) on a finished fold, and score its validation cases. Resumes."""
    with open_project(workspace, dataset_id, several=True) as project:
        from diffseg_nnunet.cli.arguments import STRATEGIES, check_choice, given, parse_fold
        from diffseg_nnunet.errors import EXIT_BAD_INPUT, BadInputError

        check_choice("--strategy", strategy, STRATEGIES)
        check_choice("--segmentor", segmentor, ("frozen", "alternate"))
        check_choice("--schedule", schedule, ("cosine", "linear_beta", "linear_alpha_bar"))
        check_choice("--sampler", sampler, ("ddim", "ancestral"))
        if sampling_steps > steps:
            raise BadInputError(
                f"--sampling-steps {sampling_steps} are more than the {steps} time steps of the training.",
                f"Give --sampling-steps 1 to {steps}.",
            )
        check_choice("--precision", precision, ("auto", "float32", "bfloat16"))
        chosen = parse_fold(fold)
        from diffseg_nnunet.inference.folders import SEGMENTOR_ALONE
        from diffseg_nnunet.pipeline.evaluating import evaluate_validation
        from diffseg_nnunet.pipeline.refining import REFINE
        from diffseg_nnunet.pipeline.refining import refine as refine_stage

        model = refine_stage(
            project,
            configuration,
            chosen,
            device,
            strategy,
            checkpoint,
            width,
            npz,
            resume=resume,
            **given(
                iterations=iterations,
                segmentor=segmentor,
                segmentor_weight=segmentor_weight,
                binary=binary,
                diffusion={"timesteps": steps, "schedule": schedule, "focal_gamma": focal_gamma},
                dice_weight=dice_weight,
                start_share=start_share,
                degrade=degrade,
                samples=samples,
                sampling_steps=sampling_steps,
                sampler=sampler,
                seed=seed,
                initial_lr=initial_lr,
                precision=precision,
                workers=workers,
            ),
        )
        if not is_first():
            return
        from diffseg_nnunet.evaluation.tables import summary_table

        evaluation = evaluate_validation(project, REFINE, configuration, chosen)
        project.reporter.console.print(summary_table(evaluation))
        if checkpoint is None:
            before = evaluate_validation(project, strategy, configuration, chosen)
            means = (
                f"mean DSC of the segmentor {before.overall.dsc.mean:.3f}, refined {evaluation.overall.dsc.mean:.3f}"
            )
            if (model.parent / SEGMENTOR_ALONE).is_dir():
                alone = evaluate_validation(project, REFINE, configuration, chosen, SEGMENTOR_ALONE)
                means += f"; of the copy that learnt in turn, without the refiner, {alone.overall.dsc.mean:.3f}"
            project.reporter.info(means)
        project.reporter.info(f"model: {model}")
        for failure in evaluation.failures:
            project.reporter.warn(f"{failure.case} was not scored: {failure.reason}")
        if evaluation.failures:
            raise typer.Exit(EXIT_BAD_INPUT)
