"""``diffseg train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffseg_nnunet.cli.arguments import (
    STRATEGIES,
    Configuration,
    DatasetId,
    Device,
    Fold,
    Precision,
    Seed,
    Strategy,
    Workspace,
)
from diffseg_nnunet.cli.console import is_first, open_project
from diffseg_nnunet.cli.labels import Labels, LabelSeed
from diffseg_nnunet.cli.pretrain import OPTIMIZERS, InitialRate, Iterations, Optimizer, Resume, Workers


def train(
    dataset_id: DatasetId,
    configuration: Configuration = "3d_fullres",
    fold: Fold = "0",
    strategy: Strategy = "finetune",
    iterations: Iterations = 250_000,
    seed: Seed = 0,
    device: Device = "auto",
    pretrained: Annotated[
        Path | None, typer.Option(help="Checkpoint to start from; else this data set's own.", show_default=False)
    ] = None,
    transfer: Annotated[
        str | None,
        typer.Option(
            metavar="all|encoder",
            help="finetune, decoder: start from all pretrained weights but the output layers, or from the encoder's "
            "alone. Not given: finetune from the encoder's, decoder from all.",
            show_default=False,
        ),
    ] = None,
    fold_timestep: Annotated[
        int | None,
        typer.Option(
            metavar="T",
            min=0,
            help="finetune, decoder: fold the pretrained network's conditioning at this time step, not the plan's.",
            show_default=False,
        ),
    ] = None,
    labels: Labels = None,
    label_seed: LabelSeed = 0,
    npz: Annotated[bool, typer.Option("--npz", help="Also store softmax outputs of the validation cases.")] = False,
    probe_time_steps: Annotated[
        str | None,
        typer.Option(
            metavar="T,T,…|folded",
            help="Probes read the features of the pretrained network at these time steps of its diffusion, joined, or "
            "of the network as it was folded. Not given: at 5, 15 and 25 % of its time steps; as it is where it is "
            "no pretraining of ours, or adapted to the plan.",
            show_default=False,
        ),
    ] = None,
    probe_clean: Annotated[
        bool | None,
        typer.Option(
            "--probe-clean/--probe-noisy",
            help="At their time steps probes read the image as it is, or noised as far as in pretraining. Not given: "
            "as it is, pixel-ensemble noised.",
            show_default=False,
        ),
    ] = None,
    augment: Annotated[
        bool | None,
        typer.Option(
            "--augment/--no-augment",
            help="Probes learn from augmented patches, or (their default) from windows of the scans as they are, the "
            "features of which are computed once.",
            show_default=False,
        ),
    ] = None,
    keep_coordinates: Annotated[
        float,
        typer.Option(
            metavar="WEIGHT",
            min=0.0,
            help="finetune, decoder, scratch: go on learning where in the body each voxel lies, by this much beside "
            "nnU-Net's loss (in pretraining 1); 0: do not. The head goes on from the pretrained checkpoint's, else, as "
            "the twin's, from random weights. The planned memory is without it: it takes up to a fifth more.",
        ),
    ] = 0.0,
    optimizer: Optimizer = "sgd",
    initial_lr: InitialRate = None,
    precision: Precision = "auto",
    workers: Workers = None,
    resume: Resume = True,
    workspace: Workspace = None,
) -> None:
    """Train one fold by nnU-Net's recipe, from a pretrained network or from scratch, and score its validation cases.
    Resumes."""
    from diffseg_nnunet.errors import EXIT_BAD_INPUT, BadInputError

    if label_seed and labels is None:
        raise BadInputError("--label-seed draws the labels of a budget, and none is given.", "Give --labels, too.")
    with open_project(workspace, dataset_id, several=True) as project:
        from diffseg_nnunet.cli.arguments import check_choice, given, parse_fold

        check_choice("--strategy", strategy, STRATEGIES)
        check_choice("--optimizer", optimizer, OPTIMIZERS)
        if transfer is not None:
            check_choice("--transfer", transfer, ("all", "encoder"))
        check_choice("--precision", precision, ("auto", "float32", "bfloat16"))
        time_steps = None if probe_time_steps is None else _time_steps(probe_time_steps)
        chosen = parse_fold(fold)
        if labels is not None:
            from diffseg_nnunet.pipeline.label_budgets import fold_of_budget

            chosen = fold_of_budget(project, configuration, chosen, labels, label_seed)
        from diffseg_nnunet.pipeline.evaluating import evaluate_validation
        from diffseg_nnunet.pipeline.stages import train as train_stage

        checkpoint = train_stage(
            project,
            configuration,
            chosen,
            device,
            strategy,
            pretrained,
            npz,
            resume=resume,
            **given(
                iterations=iterations,
                seed=seed,
                optimizer=optimizer,
                initial_lr=initial_lr,
                precision=precision,
                workers=workers,
                time_steps=time_steps,
                noisy=None if probe_clean is None else not probe_clean,
                augment=augment,
                keep_coordinates=keep_coordinates or None,
                transfer=transfer,
                fold_timestep=fold_timestep,
            ),
        )
        if not is_first():
            return
        from diffseg_nnunet.evaluation.tables import summary_table

        evaluation = evaluate_validation(project, strategy, configuration, chosen)
        project.reporter.info(f"model: {checkpoint}")
        if evaluation is None:
            return
        project.reporter.console.print(summary_table(evaluation))
        for failure in evaluation.failures:
            project.reporter.warn(f"{failure.case} was not scored: {failure.reason}")
        if evaluation.failures:
            raise typer.Exit(EXIT_BAD_INPUT)


def _time_steps(text: str) -> tuple[int, ...]:
    """Of a list like 50,150,250; none for "folded". Raises BadInputError if it is neither."""
    from diffseg_nnunet.errors import BadInputError
    from diffseg_nnunet.probing.settings import ProbeSettings

    if text == "folded":
        return ()
    try:
        return ProbeSettings(time_steps=tuple(int(step) for step in text.split(","))).time_steps
    except ValueError as error:
        raise BadInputError(
            f"--probe-time-steps {text} is no list of different time steps.", "Give numbers like 50,150,250, or folded."
        ) from error
