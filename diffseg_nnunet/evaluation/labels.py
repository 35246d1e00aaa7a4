"""Names of labels: which values belong to a structure, and which structures are scored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffseg_nnunet.errors import BadInputError

Labels = Mapping[str, int | Sequence[int]]
"""Name to value or values, without the background."""

IGNORE = "ignore"
_LABELS_MEND = (
    'Give a JSON file such as {"liver": 1, "kidneys": [2, 3]}, {"1": "liver"}, or nnU-Net\'s dataset.json, '
    "with whole numbers above 0 for every structure."
)


def read_label_names(path: Path | str) -> dict[str, int | tuple[int, ...]]:
    """Read the names of labels; a list of values (nnU-Net's regions) is a structure that is their union.

    Args:
        path: JSON with {"name": value}, {"value": "name"}, or either under "labels" (dataset.json).

    Returns:
        Name to value, or to values, in the order of the file. Background (0) is left out; nnU-Net's "ignore" is kept,
        because the comparison must know its value, and is never scored (`scored_structures`).

    Raises:
        BadInputError: the file cannot be read or has another content.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last: brackets within brackets
        raise BadInputError(f"The labels cannot be read from {path}: {error}.", _LABELS_MEND) from error
    nested = content.get("labels") if isinstance(content, dict) else None
    labels = nested if isinstance(nested, dict) else content
    if not isinstance(labels, dict):
        raise BadInputError(f"{path} has no labels.", _LABELS_MEND)
    by_value = bool(labels) and all(key.isdecimal() and isinstance(name, str) for key, name in labels.items())
    names: dict[str, int | tuple[int, ...]] = {}
    for name, value in ((name, int(key)) for key, name in labels.items()) if by_value else labels.items():
        if name in names:
            raise BadInputError(f"'{name}' stands for more than one label in {path}.", _LABELS_MEND)
        if value != 0 or isinstance(value, bool):
            names[name] = tuple(value) if isinstance(value, list) else value
    check_labels(names, str(path))
    return names


def scored_structures(labels: Labels) -> dict[str, tuple[int, ...]]:
    """Name to label values of the structures to score: all but background (0) and "ignore"."""
    structures = {name: (value,) if isinstance(value, int) else tuple(value) for name, value in labels.items()}
    return {name: values for name, values in structures.items() if values != (0,) and name != IGNORE}


def check_labels(labels: Labels, where: str) -> None:
    """Raises BadInputError unless every value is valid and a structure is left to score; `where` is for the message."""
    for name, value in labels.items():
        values = [value] if isinstance(value, int) else value
        is_list = isinstance(values, (list, tuple)) and len(values) > 0
        if not is_list or any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in values):
            raise BadInputError(f"'{name}' has no valid label value in {where}: {value!r}.", _LABELS_MEND)
        if len(values) > 1 and 0 in values:
            raise BadInputError(f"The region '{name}' in {where} contains the background (0).", _LABELS_MEND)
    ignore = labels.get(IGNORE, 1)
    if not isinstance(ignore, int) or ignore < 1:
        raise BadInputError(f"'{IGNORE}' must be one value above 0 in {where}, not {ignore!r}.", _LABELS_MEND)
    if not scored_structures(labels):
        raise BadInputError(f"There is no structure to score in {where}.", _LABELS_MEND)
