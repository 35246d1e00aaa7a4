"""One spelling a structure, so that the structures of different data sets match by name.

The side comes first (``left_kidney``), words are joined by underscores, and names are those of the field's label files
where these agree. Converters number these names; they never spell their own.
"""

from __future__ import annotations

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.evaluation.names import canonical_name


def canonical(name: str) -> str:
    """The one spelling of a structure's name; a name that is not known comes back in small letters and underscores.

    ``"Gall Bladder"`` gives ``gallbladder``, ``kidney_right`` and ``R kidney`` give ``right_kidney``, AMOS22's
    ``arota`` gives ``aorta``.
    """
    return "_".join(canonical_name(name).split())


def numbered(*names: str) -> dict[str, int]:
    """Name -> value of a label file with the values 1, 2, 3, ... in this order; ValueError for another spelling."""
    others = [name for name in names if canonical(name) != name]
    if others:
        raise ValueError(f"not the spelling of dataset_conversion.anatomy: {', '.join(others)}")
    return {name: value for value, name in enumerate(names, start=1)}


def structure(text: str, labels: dict[str, int], where: str) -> str:
    """The structure of `labels` that a user's listing means by a name or a value.

    Raises:
        BadInputError: there is none.
    """
    by_value = {str(value): name for name, value in labels.items()}
    name = by_value.get(text.strip(), canonical(text))
    if name not in labels:
        raise BadInputError(f"{where}: there is no structure '{text}'.", f"Known are {', '.join(labels)}.")
    return name
