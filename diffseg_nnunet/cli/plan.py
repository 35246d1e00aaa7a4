"""``diffseg plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffseg_nnunet.cli.arguments import DatasetId, Workspace
from diffseg_nnunet.cli.console import open_project

if TYPE_CHECKING:
    from rich.table import Table

GpuMemory = Annotated[
    str, typer.Option(metavar="auto|GIB", help="GPU memory to plan for; auto: free memory of the smallest visible GPU.")
]
Backbone = Annotated[str, typer.Option(help="resenc (residual encoder) or plain.")]
BaseFeatures = Annotated[int, typer.Option(min=1, help="Channels of the first stage; 16 makes a light model.")]
Spacing = Annotated[
    tuple[float, float, float] | None,
    typer.Option(metavar="Z Y X", help="Target spacing of 3d_fullres in mm; else nnU-Net's choice."),
]
Unlabeled = Annotated[
    list[int] | None,
    typer.Option(metavar="ID ...", help="Data sets whose images join the pretraining pool.", show_default=False),
]
FromCheckpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="CHECKPOINT",
        help="Plan a network that can start from this checkpoint (of `pretrain`, `train` or stock nnU-Net), with its "
        "backbone and features.",
        show_default=False,
    ),
]
Coordinates = Annotated[str, typer.Option(help="Coordinates in the pretraining: auxiliary, guidance or none.")]


def plan(
    dataset_id: DatasetId,
    gpu_memory: GpuMemory = "auto",
    backbone: Backbone = "resenc",
    base_features: BaseFeatures = 32,
    spacing: Spacing = None,
    unlabeled: Unlabeled = None,
    coordinates: Coordinates = "auxiliary",
    from_checkpoint: FromCheckpoint = None,
    workspace: Workspace = None,
) -> None:
    """Extract the fingerprint and plan both stages: patch, batch and topology."""
    with open_project(workspace, dataset_id) as project:
        from diffseg_nnunet.cli.arguments import check_choice
        from diffseg_nnunet.pipeline.planning import PlanRequest
        from diffseg_nnunet.pipeline.planning import plan as plan_stage

        request = PlanRequest(
            gpu_memory=gpu_memory,
            backbone=backbone,
            base_features=base_features,
            spacing=spacing,
            unlabelled=tuple(unlabeled or ()),
            coordinates=check_choice("--coordinates", coordinates, ("auxiliary", "guidance", "none")),
            from_checkpoint=None if from_checkpoint is None else str(from_checkpoint.absolute()),
        )
        plans = plan_stage(project, request)
        project.reporter.console.print(plan_table(plans))
        if (source := plans["diffseg"].get("source")) is not None:
            for sentence in source["adopted"]:
                project.reporter.info(f"from {source['checkpoint']}: {sentence}")
            project.reporter.console.print(transfer_table(source))
            for name, used in source["used"].items():
                project.reporter.info(f"{name} uses {used:.1%} of the checkpoint's parameters")
            left_out = set(plans["configurations"]) - set(source["transfer"])
            if left_out:
                project.reporter.info(f"not from {source['checkpoint']}: {', '.join(sorted(left_out))}")
            project.reporter.info(f"start from it with `diffseg train {dataset_id} --pretrained {from_checkpoint}`")
        mirroring = plans["diffseg"]["mirroring"]
        project.reporter.info(f"mirroring: {mirroring['reason']}")
        if mirroring["warning"]:
            project.reporter.warn(mirroring["warning"])
        project.reporter.info(f"plans: {project.plans_path}")


def plan_table(plans: dict) -> Table:
    """Patch, batch and predicted memory of both stages for each configuration."""
    from rich.table import Table

    memory = plans["diffseg"]["memory"]
    title = f"{plans['dataset_name']}, planned for {memory['budget_gib']:g} GiB"
    table = Table("configuration", "stage", "patch", "batch", "GiB", title=title)
    for name, stages in plans["diffseg"]["configurations"].items():
        for stage, chosen in sorted(stages.items()):
            patch = " × ".join(str(size) for size in chosen["patch_size"])
            table.add_row(name, stage, patch, str(chosen["batch_size"]), f"{chosen['predicted_peak_gib']:.2f}")
    return table


def transfer_table(source: dict) -> Table:
    """What of each configuration's network is loaded, adapted or skipped, in shares of its parameters."""
    from rich.table import Table

    title = f"what starts from {source['checkpoint']} (output layers, which never do, are not counted)"
    table = Table("configuration", "", "how", "tensors", "share of parameters", title=title)
    for name, rows in source["transfer"].items():
        for row in rows:
            table.add_row(name, row["kind"], row["how"], str(row["tensors"]), f"{row['share']:.1%}")
    return table
