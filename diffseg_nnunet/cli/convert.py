"""``diffseg convert``: one subcommand a registered format, made of what its converter says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from diffseg_nnunet.cli import conversion_options as common

AUTO = "auto"


class ConverterGroup(TyperGroup):
    """Knows the formats by the names of their entry points; a converter is imported when its command runs, or when help
    says what it converts."""

    _is_described = False

    def list_commands(self, ctx: Any) -> list[str]:
        from diffseg_nnunet import registry

        return [AUTO, *(name for name in registry.names("converters") if name != AUTO)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        return own or common.named_only(cmd_name, common.title_of(cmd_name) if self._is_described else "")

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._is_described = True
        super().format_help(ctx, formatter)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name == AUTO else common.command_of(name), rest


def _list(wanted: bool) -> None:
    if wanted:
        from diffseg_nnunet.cli.conversion import print_formats

        print_formats()
        raise typer.Exit


app = typer.Typer(cls=ConverterGroup, no_args_is_help=True)


@app.callback()
def convert(
    listed: Annotated[
        bool,
        typer.Option("--list", callback=_list, is_eager=True, help="What each format is, and the tree it expects."),
    ] = False,
) -> None:
    """Convert a downloaded data set into an nnU-Net raw data set.

    Exit codes: 0 done, 1 done with something mended, left out or worth a look, 2 refused: nothing was written.
    """


@app.command(AUTO)
def auto(
    source: Annotated[Path, typer.Argument(help="The download: a folder, or an archive with --extract.")],
    dataset_id: common.Id,
    name: common.Name = None,
    workspace: common.Workspace = None,
    copy: common.Copy = False,
    dry_run: common.DryRun = False,
    keep_labels: Annotated[str | None, common.KEEP_LABELS] = None,
    cases: common.Cases = None,
    splits: common.Splits = None,
    skip_bad: common.SkipBad = False,
    no_repair: common.NoRepair = False,
    no_verify: common.NoVerify = False,
    report: common.Report = None,
    extract: common.Extract = False,
    yes: common.Yes = False,
) -> None:
    """Recognise the format, ask, and convert."""
    from diffseg_nnunet.cli.conversion import Request, convert_automatically

    given = {key: value for key, value in locals().items() if key in Request.__dataclass_fields__}
    convert_automatically(source, Request(**given))
