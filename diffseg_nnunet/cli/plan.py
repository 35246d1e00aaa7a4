"""``diffseg plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from diffseg_nnunet.cli.arguments import Configurations, DatasetId, Workspace
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
Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Then take a few real steps of both stages on the GPU, note their peak memory in the plan, and step down "
        "what does not fit; of the configurations named with -c, else of those with both stages.",
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
    measure: Measure = False,
    configuration: Configurations = None,
    workspace: Workspace = None,
) -> None:
    """Extract the fingerprint and plan both stages: patch, batch and topology."""
    with open_project(workspace, dataset_id) as project:
        from diffseg_nnunet.cli.arguments import check_choice
        from diffseg_nnunet.errors import BadInputError
        from diffseg_nnunet.pipeline import measuring
        from diffseg_nnunet.pipeline.planning import PlanRequest, several_gpus_note
        from diffseg_nnunet.pipeline.planning import plan as plan_stage

        if measure:
            measuring.require_gpu()  # before the minutes that planning may take
        elif configuration:
            raise BadInputError("-c names what --measure measures; planning plans all.", "Leave it out.")
        request = PlanRequest(
            gpu_memory=gpu_memory,
            backbone=backbone,
            base_features=base_features,
            spacing=spacing,
            unlabelled=tuple(unlabeled or ()),
            coordinates=check_choice("--coordinates", coordinates, ("auxiliary", "guidance", "none")),
        )
        plans = plan_stage(project, request)
        if measure:
            plans = measuring.measure(project, configuration)
        project.reporter.console.print(plan_table(plans))
        mirroring = plans["diffseg"]["mirroring"]
        project.reporter.info(f"mirroring: {mirroring['reason']}")
        if mirroring["warning"]:
            project.reporter.warn(mirroring["warning"])
        if note := several_gpus_note(plans):
            project.reporter.info(note)
        project.reporter.info(f"plans: {project.plans_path}")


def plan_table(plans: dict) -> Table:
    """Patch, batch and predicted memory of both stages for each configuration."""
    from rich.table import Table

    from diffseg_nnunet.planning.section import STAGES

    memory = plans["diffseg"]["memory"]
    title = f"{plans['dataset_name']}, planned for {memory['budget_gib']:g} GiB"
    table = Table("configuration", "stage", "patch", "batch", "GiB", title=title)
    for name, stages in plans["diffseg"]["configurations"].items():
        for stage in (stage for stage in STAGES if stage in stages):
            chosen = stages[stage]
            patch = " × ".join(str(size) for size in chosen["patch_size"])
            table.add_row(name, stage, patch, str(chosen["batch_size"]), f"{chosen['predicted_peak_gib']:.2f}")
    return table
