"""``diffseg labels``, and the options of ``diffseg train`` that do the same on the way."""

from __future__ import annotations

from typing import Annotated

import typer

from diffseg_nnunet.cli.arguments import Configuration, DatasetId, Fold, Seed, Workspace
from diffseg_nnunet.cli.console import open_project

Labels = Annotated[
    str | None,
    typer.Option(
        metavar="BUDGET",
        help="Learn from a part of the fold's labels, 2cases, 10%, 4slices or 0.5%voxels, as a further fold.",
        show_default=False,
    ),
]
LabelSeed = Annotated[int, typer.Option(min=0, help="Decides which labels a budget holds.")]


def labels(
    dataset_id: DatasetId,
    budgets: Annotated[
        list[str],
        typer.Argument(
            metavar="BUDGET...",
            help="2cases, 10% (of the fold's training cases, at least one), 4slices (in all) or 0.5%voxels (of each "
            "training case).",
            show_default=False,
        ),
    ],
    configuration: Configuration = "3d_fullres",
    fold: Fold = "0",
    seed: Seed = 0,
    workspace: Workspace = None,
) -> None:
    """Draw parts of a fold's labels, small ones within large ones, and add each to the splits as a further fold."""
    with open_project(workspace, dataset_id) as project:
        from diffseg_nnunet.budgets.budget import LabelBudget
        from diffseg_nnunet.cli.arguments import parse_fold
        from diffseg_nnunet.pipeline.label_budgets import fold_of_budget

        chosen = parse_fold(fold)
        for text in budgets:
            LabelBudget.parse(text)  # before the first of several is written
        for text in budgets:
            fold_of_budget(project, configuration, chosen, text, seed)
