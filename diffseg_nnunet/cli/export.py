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
        from diffseg_nnunet.pipeline.exporting import export_stock, postprocessing_of

        exported = export_stock(project, configuration, stock, strategy, folds)
        project.reporter.info(f"{stock}: {', '.join(exported)}")
        project.reporter.info(f"install it with: nnUNetv2_install_pretrained_model_from_zip {stock}")
        if (chosen := postprocessing_of(project, configuration, strategy, exported)) is not None:
            project.reporter.info(
                "the postprocessing that these folds' validation cases speak for is not in it: after predicting, "
                f"nnUNetv2_apply_postprocessing with -pp_pkl_file {chosen}"
            )
