"""The commands, and how their errors reach the user."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import Annotated

import typer

from diffseg_nnunet import __version__
from diffseg_nnunet.atomic import DISK_FULL
from diffseg_nnunet.cli import (
    benchmark,
    convert,
    coordinates,
    dataset,
    demo,
    doctor,
    evaluate,
    export,
    labels,
    plan,
    predict,
    preprocess,
    pretrain,
    refine,
    report,
    sample,
    train,
    verify,
)
from diffseg_nnunet.cli import (
    run as run_command,
)
from diffseg_nnunet.cli.arguments import expand_lists
from diffseg_nnunet.cli.nnunet_spellings import understood
from diffseg_nnunet.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_OK, DiffSegError

DEBUG = "--debug"
_INTERRUPTED = 130
_PLACE_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)

app = typer.Typer(
    name="diffseg",
    help="Self-configuring medical image segmentation: nnU-Net v2 with label-free diffusion pretraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(doctor.doctor)
app.add_typer(convert.app, name="convert")
app.command()(verify.verify)
app.command()(dataset.dataset)
app.command()(plan.plan)
app.command()(preprocess.preprocess)
app.command()(pretrain.pretrain)
app.command()(sample.sample)
app.command()(labels.labels)
app.command()(train.train)
app.command()(refine.refine)
app.command()(predict.predict)
app.command()(coordinates.coordinates)
app.command()(evaluate.evaluate)
app.command()(run_command.run)
app.command()(report.report)
app.command()(benchmark.benchmark)
app.command()(export.export)
app.command()(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diffseg_nnunet {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Self-configuring medical image segmentation: nnU-Net v2 with label-free diffusion pretraining.

    Exit codes: 0 done, 1 a failure of ours, 2 usage or data to mend; `convert` and `verify` end with 1
    on warnings, too.
    """


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code; every error becomes one message."""
    debug = DEBUG in arguments
    try:
        app(expand_lists(understood([argument for argument in arguments if argument != DEBUG])))
    except SystemExit as finished:
        if finished.code == _INTERRUPTED:  # typer's answer to Ctrl-C
            _complain("Interrupted.", "Run the same command again to go on.")
        return finished.code if isinstance(finished.code, int) else EXIT_OK if finished.code is None else EXIT_FAILURE
    except DiffSegError as error:
        _complain(error.message, error.mend)
        if debug:
            traceback.print_exc()
        return error.exit_code
    except OSError as error:
        explained = _explain(error)
        if explained is None:
            return _fail(error, debug)
        _complain(*explained)
        if debug:
            traceback.print_exc()
        return EXIT_BAD_INPUT
    except Exception as error:
        return _fail(error, debug)
    return EXIT_OK


def _explain(error: OSError) -> tuple[str, str] | None:
    """Message and mend of an error of the system that the user can mend, else None."""
    if error.errno in DISK_FULL:
        return (
            f"The disk is full: {error.filename or 'a file'} could not be written.",
            "Free some space, or choose another --workspace; run the same command again to go on.",
        )
    if error.errno in _PLACE_ERRORS and error.filename is not None:
        return (
            f"{os.fsdecode(error.filename)} cannot be used: {error.strerror}.",
            "Check the path and its permissions, or choose another.",
        )
    return None


def _fail(error: Exception, debug: bool) -> int:
    _complain(f"{type(error).__name__}: {error}", None if debug else "Run again with --debug for the traceback.")
    if debug:
        traceback.print_exc()
    return EXIT_FAILURE


def _complain(message: str, mend: str | None) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble(("Error: ", "bold red"), message.rstrip(), *(["\n", mend] if mend else []))
    Console(file=sys.stderr, soft_wrap=True).print(text)
