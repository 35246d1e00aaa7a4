"""``diffseg run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffseg_nnunet.cli.arguments import STRATEGIES, Configurations, DatasetId, Device, Folds, Workspace
from diffseg_nnunet.cli.console import open_project
from diffseg_nnunet.cli.pretrain import OPTIMIZERS, Workers

_KEPT = "Not given: as in the data set's last run, else the default."


def run(
    dataset_id: DatasetId,
    configuration: Configurations = None,
    fold: Folds = None,
    strategy: Annotated[str | None, typer.Option(help=f"{', '.join(STRATEGIES)}, as in `train`. {_KEPT}")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help=f"Training length. {_KEPT}")] = None,
    pretrain_iterations: Annotated[int | None, typer.Option(min=1, help=f"Pretraining length. {_KEPT}")] = None,
    pretrained: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint to start from, in place of a pretraining; none: pretrain. Not given: the one of "
            "`plan --from-checkpoint`, if the data set was planned so, else as in its last run.",
            show_default=False,
        ),
    ] = None,
    pretrain_on: Annotated[
        str | None,
        typer.Option(help=f"fold: each fold's own training cases. all: once, on the images of all cases. {_KEPT}"),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="BUDGET|all",
            help=f"Learn from a part of each fold's labels, as in `train`. {_KEPT}",
            show_default=False,
        ),
    ] = None,
    label_seed: Annotated[
        int | None, typer.Option(min=0, help=f"Decides which labels a budget holds. {_KEPT}", show_default=False)
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help=f"Of the training: sgd or adamw. {_KEPT}")] = None,
    initial_lr: Annotated[
        float | None, typer.Option(min=0.0, help=f"Initial learning rate of the training. {_KEPT}", show_default=False)
    ] = None,
    refine: Annotated[
        bool | None,
        typer.Option(
            "--refine/--no-refine",
            help="Train a refiner on each fold (`diffseg refine`), and use it for the structures whose validation "
            f"cases it improves. {_KEPT}",
        ),
    ] = None,
    refine_iterations: Annotated[int | None, typer.Option(min=1, help=f"Refiner's training length. {_KEPT}")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help=f"Seed. {_KEPT}")] = None,
    workers: Workers = None,
    device: Device = "auto",
    gpu_memory: Annotated[str | None, typer.Option(metavar="auto|GIB", help=f"As in `plan`. {_KEPT}")] = None,
    backbone: Annotated[str | None, typer.Option(help=f"As in `plan`. {_KEPT}")] = None,
    base_features: Annotated[int | None, typer.Option(min=1, help=f"As in `plan`. {_KEPT}")] = None,
    spacing: Annotated[
        tuple[float, float, float] | None, typer.Option(metavar="Z Y X", help=f"As in `plan`. {_KEPT}")
    ] = None,
    unlabeled: Annotated[list[str] | None, typer.Option(metavar="ID ...", help=f"As in `plan`. {_KEPT}")] = None,
    no_test: Annotated[bool, typer.Option("--no-test", help="Do not segment imagesTs at the end.")] = False,
    workspace: Workspace = None,
) -> None:
    """Everything after convert: verify, plan, preprocess, pretrain, train, evaluate, refine
    (--refine), select, predict imagesTs.

    Run it again after an interruption: what is finished and unchanged is not done twice. `diffseg plan ID --explain`
    says what was planned, and why.
    """
    with open_project(workspace, dataset_id) as project:
        from diffseg_nnunet.cli.arguments import check_choice, dataset_ids, given, parse_fold
        from diffseg_nnunet.errors import EXIT_BAD_INPUT
        from diffseg_nnunet.evaluation.tables import summary_table
        from diffseg_nnunet.pipeline.reporting import write_project_report
        from diffseg_nnunet.pipeline.run import run as run_stages
        from diffseg_nnunet.pipeline.run_request import NO_CHECKPOINT, RunRequest

        if optimizer is not None:
            check_choice("--optimizer", optimizer, OPTIMIZERS)
        unlabelled = dataset_ids(unlabeled) or None
        request = RunRequest(
            configurations=tuple(configuration) if configuration else None,
            folds=tuple(parse_fold(text) for text in fold) if fold else None,
            labels=labels,
            label_seed=label_seed,
            pretrained=pretrained if pretrained in (None, NO_CHECKPOINT) else pretrained.absolute(),
            strategy=strategy and check_choice("--strategy", strategy, STRATEGIES),
            pretrain_on=pretrain_on and check_choice("--pretrain-on", pretrain_on, ("fold", "all")),
            plan=given(
                gpu_memory=gpu_memory,
                backbone=backbone,
                base_features=base_features,
                spacing=spacing,
                unlabelled=unlabelled,
            ),
            pretraining=given(iterations=pretrain_iterations, seed=seed),
            training=given(iterations=iterations, seed=seed, optimizer=optimizer, initial_lr=initial_lr),
            refine=refine,
            refining=given(iterations=refine_iterations, seed=seed),
            workers=workers,
            device=device,
            predict_test=not no_test,
        )
        result = run_stages(project, request)
        for (name, number), evaluation in result.evaluations.items():
            project.reporter.info(f"\n{name}, fold {number}, validation cases:")
            project.reporter.console.print(summary_table(evaluation))
            for failure in evaluation.failures:
                project.reporter.warn(f"{failure.case} was not scored: {failure.reason}")
        if result.predicted is not None:
            command = result.predicted.command(project.id, workspace)
            project.reporter.info(f"to predict with what was selected: {command}")
        project.reporter.info(f"manifest: {project.manifest.path}")
        project.reporter.info(f"report: {write_project_report(project)}")
        for case in result.failed:
            project.reporter.warn(f"{case.case} was set aside: {case.reason}")
        if result.failed or any(evaluation.failures for evaluation in result.evaluations.values()):
            raise typer.Exit(EXIT_BAD_INPUT)
