"""``diffseg plan``."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffseg_nnunet.cli.arguments import Configurations, DatasetId, Workspace
from diffseg_nnunet.cli.console import news_to_standard_error, open_project

if TYPE_CHECKING:
    from rich.table import Table

    from diffseg_nnunet.pipeline.planning import PlanRequest
    from diffseg_nnunet.pipeline.project import Project
    from diffseg_nnunet.planning.decisions import Decision

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
    list[str] | None,
    typer.Option(metavar="ID ...", help="Data sets whose images join the pretraining pool.", show_default=False),
]
Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Then take a few real steps of both stages on the GPU, note their peak memory in the plan, and lower "
        "the batches that do not fit; of the configurations named with -c, else of those with both stages.",
    ),
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
Explain = Annotated[bool, typer.Option("--explain", help="Print every decision of the plan, and why.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="The same as one JSON object on standard output; news go to standard error.")
]

_NOT_PLANNED_WITH = ("dataset_id", "explain", "as_json", "measure", "configuration", "workspace")


def plan(
    context: typer.Context,
    dataset_id: DatasetId,
    gpu_memory: GpuMemory = "auto",
    backbone: Backbone = "resenc",
    base_features: BaseFeatures = 32,
    spacing: Spacing = None,
    unlabeled: Unlabeled = None,
    coordinates: Coordinates = "auxiliary",
    from_checkpoint: FromCheckpoint = None,
    explain: Explain = False,
    as_json: AsJson = False,
    measure: Measure = False,
    configuration: Configurations = None,
    workspace: Workspace = None,
) -> None:
    """Extract the fingerprint and plan both stages: patch, batch and topology.

    Without an option that says how to plan, it is planned as last time, and only if the data have changed. With some,
    the others have their defaults.
    """
    answer = None
    with (
        news_to_standard_error(as_json),
        open_project(workspace, dataset_id, news=sys.stderr if as_json else None) as project,
    ):
        from diffseg_nnunet.cli.arguments import check_choice, dataset_ids
        from diffseg_nnunet.errors import BadInputError
        from diffseg_nnunet.pipeline import measuring
        from diffseg_nnunet.pipeline.planning import PlanRequest, explained, last_request
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
            unlabelled=dataset_ids(unlabeled),
            coordinates=check_choice("--coordinates", coordinates, ("auxiliary", "guidance", "none")),
            from_checkpoint=None if from_checkpoint is None else str(from_checkpoint.absolute()),
        )
        last = last_request(project)
        if not (asked := _given(context)):
            request = last
        elif lost := _back_to_default(last, request, asked):
            project.reporter.warn(f"not given, so as by default: {lost}")
        plans = plan_stage(project, request)
        if measure:
            plans = measuring.measure(project, configuration)
        if as_json:
            answer = json.dumps(_machine_readable(project, explained(project)), indent=2)
        else:
            _tell(project, plans, request, explained(project) if explain else None)
    if answer is not None:
        sys.stdout.write(answer + "\n")


def _tell(
    project: Project, plans: Mapping[str, Any], request: PlanRequest, decisions: Sequence[Decision] | None
) -> None:
    """The plan for people: every decision, or without those its patches and batches."""
    from diffseg_nnunet.pipeline.planning import several_gpus_note

    if decisions is None:
        project.reporter.console.print(plan_table(plans))
    else:
        # cells are to be wrapped, lines of news are not
        project.reporter.console.print(explanation_table(plans["dataset_name"], decisions), soft_wrap=False)
    _tell_source(project, plans, request)
    mirroring = plans["diffseg"]["mirroring"]
    project.reporter.info(f"mirroring: {mirroring['reason']}")
    if mirroring["warning"]:
        project.reporter.warn(mirroring["warning"])
    if note := several_gpus_note(plans):
        project.reporter.info(note)
    project.reporter.info(f"plans: {project.plans_path}")


def _tell_source(project: Project, plans: Mapping[str, Any], request: PlanRequest) -> None:
    """What the plan took over from a checkpoint; nothing where it was made without."""
    source = plans["diffseg"].get("source")
    if source is None:
        return
    for sentence in source["adopted"]:
        project.reporter.info(f"from {source['checkpoint']}: {sentence}")
    project.reporter.console.print(transfer_table(source))
    for name, used in source["used"].items():
        project.reporter.info(f"{name} uses {used:.1%} of the checkpoint's parameters")
    left_out = set(plans["configurations"]) - set(source["transfer"])
    if left_out:
        project.reporter.info(f"not from {source['checkpoint']}: {', '.join(sorted(left_out))}")
    start = f"`diffseg train {project.id} --pretrained {request.from_checkpoint}`"
    project.reporter.info(f"start from it with {start}")


def _given(context: typer.Context) -> set[str]:
    """The options of the command line that a plan depends on, by PlanRequest's names."""
    sources = {name: context.get_parameter_source(name) for name in context.params if name not in _NOT_PLANNED_WITH}
    found = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    return {"unlabelled" if name == "unlabeled" else name for name in found}


def _back_to_default(last: PlanRequest, request: PlanRequest, asked: Collection[str]) -> str:
    """What the last plan was asked for and this one is not, in words."""
    known = {*asked, "checkpoint_sha256"}
    if "from_checkpoint" in asked:  # whose plan it is
        known |= {"backbone", "base_features"}
    changes = [
        (field.name, getattr(last, field.name), getattr(request, field.name))
        for field in fields(request)
        if field.name not in known
    ]
    return ", ".join(
        f"--{'unlabeled' if name == 'unlabelled' else name.replace('_', '-')} {_word(now)} (was {_word(before)})"
        for name, before, now in changes
        if before != now
    )


def _word(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{each:g}" for each in value) or "none"
    return "none" if value is None else str(value)


def _machine_readable(project: Project, decisions: Sequence[Decision]) -> dict[str, Any]:
    return {
        "dataset": project.name,
        "plans": str(project.plans_path),
        "decisions": [decision.to_json() for decision in decisions],
    }


def explanation_table(dataset: str, decisions: Sequence[Decision]) -> Table:
    """A row for each decision, in sections by scope."""
    from rich.table import Table
    from rich.text import Text

    table = Table("for", "decision", "value", "why", title=f"{dataset}: what was planned, and why")
    scope = None
    for decision in decisions:
        if scope not in (None, decision.scope):
            table.add_section()
        scope = decision.scope
        # names of labels and files may hold what rich takes for markup
        table.add_row(*map(Text, (decision.scope, decision.what, decision.text, decision.why)))
    return table


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


def transfer_table(source: dict) -> Table:
    """What of each configuration's network is loaded, adapted or skipped, in shares of its parameters."""
    from rich.table import Table

    title = f"what starts from {source['checkpoint']} (output layers, which never do, are not counted)"
    table = Table("configuration", "", "how", "tensors", "share of parameters", title=title)
    for name, rows in source["transfer"].items():
        for row in rows:
            table.add_row(name, row["kind"], row["how"], str(row["tensors"]), f"{row['share']:.1%}")
    return table
