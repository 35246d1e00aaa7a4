"""The options several commands share."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

Workspace = Annotated[
    Path | None,
    typer.Option(
        help="Folder of nnUNet_raw, nnUNet_preprocessed and nnUNet_results; else $DIFFSEG_WORKSPACE, else "
        "./diffseg_workspace. Exported nnU-Net variables win.",
        show_default=False,
    ),
]
_DATASET = "Id of the data set, 1 to 999, or its name DatasetXXX_Name."
DatasetId = Annotated[str, typer.Argument(metavar="ID", help=_DATASET, show_default=False)]
DatasetOption = Annotated[str, typer.Option("--dataset", "-d", metavar="ID", help=_DATASET, show_default=False)]
Configuration = Annotated[
    str, typer.Option("--configuration", "-c", help="nnU-Net configuration: 2d, 3d_fullres, 3d_lowres, …")
]
Configurations = Annotated[
    list[str] | None,
    typer.Option("--configuration", "-c", help="nnU-Net configuration; may be repeated.", show_default=False),
]
Fold = Annotated[str, typer.Option("--fold", "-f", help="Fold, or 'all' for every case.")]
Folds = Annotated[list[str] | None, typer.Option("--fold", "-f", help="Fold; may be repeated.", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random generator.")]
Precision = Annotated[str, typer.Option(help="On the CPU: auto, float32 or bfloat16.")]
STRATEGIES = {
    "finetune": "all of a pretrained network",
    "scratch": "its twin from random weights",
    "decoder": "the decoder on a frozen pretrained encoder",
    "linear": "a linear probe of frozen features",
    "nonlinear": "a non-linear probe of them",
    "pixel-ensemble": "perceptrons that vote on each voxel by them",
}
"""What `diffseg train` trains, by the trainers' registered names."""
Strategy = Annotated[str, typer.Option(help="; ".join(f"{name}: {words}" for name, words in STRATEGIES.items()) + ".")]

_CONFIGURATIONS, _FOLDS = ("-c", "--configuration"), ("-f", "--fold")
_LISTS = {
    "plan": ("--unlabeled", *_CONFIGURATIONS),
    "preprocess": _CONFIGURATIONS,
    "run": ("--unlabeled", *_CONFIGURATIONS, *_FOLDS),
    "predict": (*_CONFIGURATIONS, *_FOLDS),
    "export": _FOLDS,
    "sample": ("--size",),
    "evaluate": ("--cases", "--tolerance"),
    "benchmark": ("--strategies", "--budgets", "--seeds", "--fold", "--test-cases", "--unlabeled"),
}
_WITHOUT_POSITIONAL = ("predict", "sample", "evaluate")


def expand_lists(arguments: list[str]) -> list[str]:
    """Let ``--unlabeled 7 8`` stand for ``--unlabeled 7 --unlabeled 8``, after the positional argument.

    Click's options take a fixed number of values; users of argparse's tools, nnU-Net's among them, expect lists.

    Raises:
        BadInputError: a list stands before the positional argument, which then looks like one more of it.
    """
    if not arguments or arguments[0] not in _LISTS:
        return arguments
    first = 1 if arguments[0] in _WITHOUT_POSITIONAL else 2
    if first == 2 and len(arguments) > 1 and arguments[1].startswith("-"):
        _refuse_list_first(arguments)
        return arguments
    if len(arguments) < first:
        return arguments
    expanded: list[str] = arguments[:first]
    current, values = None, 0
    for argument in arguments[first:]:
        if argument.startswith("-") and not argument.lstrip("-").replace(".", "").isdigit():
            current, values = (argument, 0) if argument in _LISTS[arguments[0]] else (None, 0)
        elif current is not None:
            if values:
                expanded.append(current)
            values += 1
        expanded.append(argument)
    return expanded


def _refuse_list_first(arguments: list[str]) -> None:
    from diffseg_nnunet.errors import BadInputError

    option, values = None, 0
    for argument in arguments[1:]:
        if argument.startswith("-"):
            option, values = argument, 0
        elif option in _LISTS[arguments[0]]:
            values += 1
        if values > 2:  # one is the option's, one may be the positional
            raise BadInputError(
                f"{option} has several values, and the data set does not stand before them.",
                f"Put it first: `diffseg {arguments[0]} ID {option} …`.",
            )


def parse_fold(text: str) -> int | str:
    """A fold's number, or "all".

    Raises:
        BadInputError: it is neither.
    """
    from diffseg_nnunet.errors import BadInputError

    if text == "all":
        return text
    if not text.isdecimal():
        raise BadInputError(f"'{text}' is no fold.", "Give a number from 0, or 'all'.")
    return int(text)


def check_choice(option: str, value: str, choices: Collection[str]) -> str:
    """`value` if it is one of `choices`.

    Raises:
        BadInputError: it is not; the message lists them.
    """
    from diffseg_nnunet.errors import BadInputError

    if value not in choices:
        raise BadInputError(f"{option} {value} is not known.", f"Choose one of: {', '.join(choices)}.")
    return value


def dataset_ids(datasets: Collection[str] | None) -> tuple[int, ...]:
    """Of data sets that are called by id or by folder name.

    Raises:
        BadInputError: one is called neither.
    """
    from diffseg_nnunet.workspace import as_id

    return tuple(map(as_id, datasets or ()))


def given(**options: object) -> dict[str, object]:
    """The options that were given: those that are not None."""
    return {name: value for name, value in options.items() if value is not None}
