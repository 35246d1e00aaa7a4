"""The options of every format's command, and the command made of them and of a converter's own."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffseg_nnunet.cli.arguments import Workspace

if TYPE_CHECKING:
    from diffseg_nnunet.dataset_conversion.converter import Converter, Option

__all__ = ["Workspace", "command_of", "named_only", "title_of"]

_SELECTION, _FORMAT = "What to take", "Of this format"
KEEP_LABELS = typer.Option(
    "--labels",
    "--keep-labels",
    help="Keep these labels, liver,spleen,…, renumbered; the others become background.",
    show_default=False,
    rich_help_panel=_SELECTION,
)
Id = Annotated[int, typer.Option("--id", min=1, max=999, help="Id of the new data set.", show_default=False)]
Name = Annotated[str | None, typer.Option("--name", help="Name; else the format's.", show_default=False)]
Cases = Annotated[
    str | None,
    typer.Option("--cases", help="These cases only: a,b,… or @file.", show_default=False, rich_help_panel=_SELECTION),
]
Splits = Annotated[
    str | None,
    typer.Option(
        "--splits",
        help="A published division by its name (--dry-run lists them; with :n=6, six labels of it), 5-fold (nnU-Net's "
        "rule), or n=6 (the first six training cases train, the rest validate).",
        show_default=False,
        rich_help_panel=_SELECTION,
    ),
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out cases with errors, and report them.", rich_help_panel=_SELECTION)
]
Copy = Annotated[bool, typer.Option("--copy", help="Copy files whose voxels do not change, instead of hard-linking.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and write nothing.")]
NoRepair = Annotated[
    bool, typer.Option("--no-repair", help="Refuse what would be mended: slightly different headers, labels as floats.")
]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Link without reading; run `diffseg verify` before you train.")
]
Report = Annotated[
    Path | None,
    typer.Option("--report", help="Folder for conversion.json and .csv, on refusal too.", show_default=False),
]
Extract = Annotated[bool, typer.Option("--extract", help="Unpack SRC, a .zip or .tar, beside itself first.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

_COMMON: dict[str, tuple[Any, Any]] = {
    "dataset_id": (Id, inspect.Parameter.empty),
    "name": (Name, None),
    "workspace": (Workspace, None),
    "copy": (Copy, False),
    "dry_run": (DryRun, False),
    "cases": (Cases, None),
    "splits": (Splits, None),
    "skip_bad": (SkipBad, False),
    "no_repair": (NoRepair, False),
    "no_verify": (NoVerify, False),
    "report": (Report, None),
    "extract": (Extract, False),
    "yes": (Yes, False),
}
# of a converter's own options, which may be called like one of the above
_OWN = "own_"


def named_only(name: str, title: str = "") -> Any:
    """A command that has a name, and words on what it converts, and does nothing: for listings."""
    return _as_command(name, lambda: None, [], title)


def title_of(name: str) -> str:
    """What the converter that is registered as `name` says it converts, as help takes it; of one that cannot be used,
    why not."""
    from rich.markup import escape

    from diffseg_nnunet.dataset_conversion.recognition import Unusable, tried

    converter = tried(name)
    return escape(f"cannot be used: {converter.reason}" if isinstance(converter, Unusable) else converter.title)


def command_of(name: str) -> Any:
    """The command of the converter that is registered as `name`.

    Raises:
        BadInputError: there is none.
        StageFailedError: it has an option of a name that all formats have.
    """
    from diffseg_nnunet.dataset_conversion.recognition import load

    converter = load(name)

    def run(**given: Any) -> None:
        from diffseg_nnunet.cli.conversion import Request, convert

        own = {key.removeprefix(_OWN): value for key, value in given.items() if key.startswith(_OWN)}
        many = {option.name for option in converter.options if option.many}
        own = {key: tuple(value or ()) if key in many else value for key, value in own.items()}
        shared = {key: given[key] for key in (*_COMMON, "keep_labels")}
        convert(converter, given.get("source"), own, Request(**shared))

    parameters = [_parameter("source", *_source_argument(converter))]
    parameters += [_own_parameter(option) for option in converter.options]
    parameters += [_parameter(key, annotation, default) for key, (annotation, default) in _COMMON.items()]
    parameters.append(_parameter("keep_labels", Annotated[str | None, _keep_labels(converter)], None))
    _refuse_taken_options(converter)
    return _as_command(name, run, parameters, _help(converter))


def flag(name: str) -> str:
    """``pseudo_labels`` -> ``--pseudo-labels``."""
    return f"--{name.replace('_', '-')}"


def _as_command(name: str, function: Any, parameters: list[inspect.Parameter], text: str) -> Any:
    """What typer makes of a function with these parameters."""

    def call(**given: Any) -> None:
        function(**given)

    required_first = sorted(parameters, key=lambda each: each.default is not inspect.Parameter.empty)
    call.__signature__ = inspect.Signature(required_first)
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    single = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    single.command(name, help=text)(call)
    return typer.main.get_command(single)


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _source_argument(converter: Converter) -> tuple[Any, ...]:
    """Its annotation, and its default where it has one."""
    text = "The download: a folder, or an archive with --extract."
    if converter.needs_source:
        return (Annotated[Path, typer.Argument(metavar="SRC", help=text)],)
    return Annotated[Path | None, typer.Argument(metavar="SRC", help=text, show_default=False)], None


def _own_parameter(option: Option) -> inspect.Parameter:
    info = typer.Option(flag(option.name), help=option.help, show_default=False, rich_help_panel=_FORMAT)
    if option.kind is bool:
        return _parameter(_OWN + option.name, Annotated[bool, info], False)
    kind = list[option.kind] if option.many else option.kind
    if option.required:
        return _parameter(_OWN + option.name, Annotated[kind, info])
    return _parameter(_OWN + option.name, Annotated[kind | None, info], None)


def _keep_labels(converter: Converter) -> Any:
    """The choice of labels; a format whose files of labels are called --labels leaves it --keep-labels."""
    if any(option.name == "labels" for option in converter.options):
        return typer.Option(
            "--keep-labels", help=KEEP_LABELS.help, show_default=False, rich_help_panel=KEEP_LABELS.rich_help_panel
        )
    return KEEP_LABELS


def _refuse_taken_options(converter: Converter) -> None:
    from diffseg_nnunet.errors import StageFailedError

    taken = {"--keep-labels", *(one for info, _ in _COMMON.values() for one in _flags(info))}
    if both := sorted(taken & {flag(option.name) for option in converter.options}):
        raise StageFailedError(
            f"The converter '{converter.format_name}' has the option {', '.join(both)}, which every format has.",
            "Tell its authors to rename it.",
        )


def _flags(annotation: Any) -> list[str]:
    """The flags of a declared option; in an annotation, typer keeps the first one as the default."""
    info = annotation.__metadata__[0]
    declared = [each for each in (info.default, *(info.param_decls or ())) if isinstance(each, str)]
    return declared or ["--workspace"]


def _help(converter: Converter) -> str:
    """Title, licence, and the tree; typer keeps the line breaks of a paragraph that begins with a backspace."""
    from rich.markup import escape

    title = converter.title[:1].upper() + converter.title[1:]
    licence = f"\n\nLicence of the data: {converter.licence}" if converter.licence else ""
    return escape(f"{title.rstrip('.')}.{licence}\n\n\b\nExpected is\n{converter.expects}")
