"""``diffseg train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffseg_nnunet.cli.arguments import Configuration, DatasetId, Device, Fold, Precision, Seed, Strategy, Workspace
from diffseg_nnunet.cli.console import is_first, open_project
from diffseg_nnunet.cli.labels import Labels, LabelSeed
from diffseg_nnunet.cli.pretrain import OPTIMIZERS, InitialRate, Iterations, Optimizer, Resume, Workers

STRATEGIES = ("finetune", "scratch")


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
    labels: Labels = None,
    label_seed: LabelSeed = 0,
    npz: Annotated[bool, typer.Option("--npz", help="Also store softmax outputs of the validation cases.")] = False,
    optimizer: Optimizer = "sgd",
    initial_lr: InitialRate = None,
    precision: Precision = "auto",
    workers: Workers = None,
    resume: Resume = True,
    workspace: Workspace = None,
) -> None:
    """Train one fold by nnU-Net's recipe, pretrained or from scratch, and score its validation cases. Resumes."""
    with open_project(workspace, dataset_id, several=True) as project:
        from diffseg_nnunet.cli.arguments import check_choice, given, parse_fold
        from diffseg_nnunet.errors import EXIT_BAD_INPUT

        check_choice("--strategy", strategy, STRATEGIES)
        check_choice("--optimizer", optimizer, OPTIMIZERS)
        check_choice("--precision", precision, ("auto", "float32", "bfloat16"))
        chosen = parse_fold(fold)
        if labels is not None:
            from diffseg_nnunet.cli.labels import fold_of_budget

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
            ),
        )
        if not is_first():
            return
        from diffseg_nnunet.evaluation.tables import summary_table

        evaluation = evaluate_validation(project, strategy, configuration, chosen)
        project.reporter.console.print(summary_table(evaluation))
        project.reporter.info(f"model: {checkpoint}")
        for failure in evaluation.failures:
            project.reporter.warn(f"{failure.case} was not scored: {failure.reason}")
        if evaluation.failures:
            raise typer.Exit(EXIT_BAD_INPUT)
