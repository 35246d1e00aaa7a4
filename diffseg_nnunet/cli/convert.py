"""``diffseg convert``: one subcommand a format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffseg_nnunet.cli.arguments import Workspace

if TYPE_CHECKING:
    from diffseg_nnunet.workspace import Workspace as Location

app = typer.Typer(no_args_is_help=True, help="Convert a downloaded data set into an nnU-Net raw data set.")

Id = Annotated[int, typer.Option("--id", min=1, max=999, help="Id of the new data set.", show_default=False)]
Copy = Annotated[bool, typer.Option("--copy", help="Copy files whose voxels do not change, instead of hard-linking.")]


@app.command()
def msd(
    source: Annotated[Path, typer.Argument(help="Task folder of the Medical Segmentation Decathlon.")],
    dataset_id: Id,
    name: Annotated[str | None, typer.Option(help="Name; else that of dataset.json.", show_default=False)] = None,
    copy: Copy = False,
    workspace: Workspace = None,
) -> None:
    """A task of the Medical Segmentation Decathlon (TaskXX_Name with imagesTr, labelsTr, dataset.json)."""
    from diffseg_nnunet import registry

    plan = registry.load("converters", "msd")().plan(source, name=name)
    _execute(plan, dataset_id, copy, workspace)


@app.command()
def folder(
    images: Annotated[Path, typer.Option(help="Folder of images, CASE.nii.gz.", show_default=False)],
    modality: Annotated[str, typer.Option(help="Channel name(s), e.g. CT, or T1,FLAIR.", show_default=False)],
    dataset_id: Id,
    name: Annotated[str, typer.Option(help="Name of the data set.", show_default=False)],
    labels: Annotated[
        Path | None, typer.Option(help="Folder of labels of the same names; none: an unlabelled pool.")
    ] = None,
    label_names: Annotated[Path | None, typer.Option(help='JSON {"background": 0, "liver": 1, …}.')] = None,
    rest_unlabelled: Annotated[
        bool, typer.Option("--rest-unlabelled", help="Images without a label join the unlabelled pool.")
    ] = False,
    copy: Copy = False,
    workspace: Workspace = None,
) -> None:
    """Plain folders of images and, if there are any, labels, paired by file name."""
    from diffseg_nnunet import registry

    converter = registry.load("converters", "folder")()
    _execute(converter.plan(images, labels, label_names, modality, name, rest_unlabelled), dataset_id, copy, workspace)


def _execute(plan: Any, dataset_id: int, copy: bool, workspace: Path | None) -> None:
    from diffseg_nnunet.cli.console import ConsoleReporter
    from diffseg_nnunet.planning.hardware import worker_count
    from diffseg_nnunet.workspace import Workspace as Location

    active: Location = Location.locate(workspace)
    with ConsoleReporter().live() as reporter:
        report = plan.execute(
            dataset_id=dataset_id,
            workspace=active,
            copy=copy,
            workers=worker_count(),
            progress=lambda done, total: reporter.progress("convert", done, total),
        )
        counts = ", ".join(f"{count} {role}" for role, count in report.cases.items() if count)
        files = ", ".join(f"{count} {how}" for how, count in report.files.items())
        reporter.info(f"{report.folder}: {counts} case(s); files: {files}")
        for note in report.notes:
            reporter.info(note)
        for finding in report.warnings:
            reporter.warn(str(finding))
        reporter.info(f"next: diffseg run {dataset_id}")
