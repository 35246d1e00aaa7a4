"""Names and values of labels, as users write them down: JSON in either direction, or a table of two columns."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.raw_dataset import read_json_object
from diffseg_nnunet.verification import listed

from .description import BACKGROUND, IGNORE

DELIMITERS = ";,\t"


def read_label_names(path: Path) -> dict[str, int]:
    """Label names of a JSON file, or of a table (CSV): name and value in either order, with or without a header.

    Raises:
        BadInputError: the file is missing, damaged or empty, or as :func:`named_values`.
    """
    pairs = list(read_json_object(path).items()) if path.suffix.lower() == ".json" else _table(path)
    if not pairs:
        raise BadInputError(f"{path} names no label.", 'Write {"background": 0, "liver": 1, ...}.')
    return _named(pairs, path)


def named_values(content: Mapping[str, Any], where: Path | str) -> dict[str, int]:
    """``{"liver": 1}`` or ``{"1": "liver"}`` -> ``{"background": 0, "liver": 1}``, sorted by value.

    The value 0 is named 'background', also where it is not listed; the others may have gaps (see :func:`numbered`).

    Raises:
        BadInputError: an entry is neither, or a name or a value occurs twice.
    """
    return _named(content.items(), where)


def numbered(names: Iterable[str]) -> dict[str, int]:
    """Names -> 0, 1, 2, ... as nnU-Net wants them: 'background' first, 'ignore' last, the others in their order."""
    names = list(dict.fromkeys(names))
    others = [name for name in names if name not in (BACKGROUND, IGNORE)]
    last = [IGNORE] if IGNORE in names else []
    return {name: value for value, name in enumerate([BACKGROUND, *others, *last])}


def renumbering(values: Mapping[str, int], labels: Mapping[str, int]) -> list[str]:
    """A note where the values of a source have gaps, which its `labels` do not have; else nothing."""
    if labels == values:
        return []
    return [f"The label values {listed(sorted(values.values()))} became 0 to {len(labels) - 1}, by their names."]


def _named(pairs: Iterable[tuple[str, Any]], where: Path | str) -> dict[str, int]:
    named: dict[str, int] = {}
    for key, entry in pairs:
        name, number = (entry, key) if isinstance(entry, str) and not entry.strip().isdigit() else (key, entry)
        if isinstance(number, bool | float) or not str(number).strip().isdigit():
            raise BadInputError(
                f"{where}: the label {key!r}: {entry!r} does not pair a name with a whole number.",
                'Write {"background": 0, "liver": 1, ...}.',
            )
        # nnU-Net knows the value 0 by this name only
        name = BACKGROUND if int(number) == 0 else name
        if name in named:
            raise BadInputError(f"{where}: two labels are called '{name}'.", "Give each value a name of its own.")
        named[name] = int(number)
    values = list(named.values())
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise BadInputError(f"{where}: several labels have the value {listed(twice)}.", "Give each value one name.")
    return {BACKGROUND: 0, **dict(sorted(named.items(), key=lambda item: item[1]))}


def _table(path: Path) -> list[tuple[str, str]]:
    """(name, value) of each row; which column holds the values is seen from the rows."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise BadInputError(f"{path} is missing.", "Check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(
            f"{path} cannot be read: {error}.", "Check its permissions, and save it as UTF-8."
        ) from error
    delimiter = max(DELIMITERS, key="\n".join(lines).count)
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
    rows = [row for row in rows if any(row)]
    if rows and not any(cell.isdigit() for cell in rows[0]):
        rows = rows[1:]
    columns = [column for column in (0, 1) if all(len(row) == 2 and row[column].isdigit() for row in rows)]
    if len(columns) != 1:
        raise BadInputError(
            f"{path} is no table of label names: each row must have one name and one whole number.",
            "Write rows such as 1,liver (a header, semicolons and liver,1 are fine), or JSON in a .json file.",
        )
    return [(row[1 - columns[0]], row[columns[0]]) for row in rows]
