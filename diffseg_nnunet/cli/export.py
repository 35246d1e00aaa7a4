"""``diffseg export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffseg_nnunet.cli.arguments import STRATEGIES, Configuration, DatasetId, Folds, Strategy, Workspace
from diffseg_nnunet.cli.console import open_project


def export(
    dataset_id: DatasetId,
    stock: Annotated[Path, typer.Option(metavar="OUT.zip", help="Zip to write.", show_default=False)],
    configuration: Configuration = "3d_fullres",
    fold: Folds = None,
    strategy: Strategy = "finetune",
    workspace: Workspace = None,
) -> None:
    """Export a model that stock nnU-Net installs and runs, without diffseg_nnunet: all of its folds but those of label
    budgets, or those that -f names."""
    with open_project(workspace, dataset_id) as project:
        from diffseg_nnunet.cli.arguments import check_choice, parse_fold

        check_choice("--strategy", strategy, STRATEGIES)
        folds = [parse_fold(text) for text in fold or ()]
        from diffseg_nnunet.pipeline.exporting import export_stock

        exported = export_stock(project, configuration, stock, strategy, folds)
        project.reporter.info(f"{stock}: {', '.join(exported)}")
        project.reporter.info(f"install it with: nnUNetv2_install_pretrained_model_from_zip {stock}")
