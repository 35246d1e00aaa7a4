"""Which format a folder is: every registered converter is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffseg_nnunet import registry
from diffseg_nnunet.errors import BadInputError

from .converter import Converter, Recognition

GROUP = "converters"
_EQUAL = 1e-9


@dataclass(frozen=True)
class Unusable:
    """A converter that could not be asked.

    Attributes:
        name: its entry point's.
        reason: why.
    """

    name: str
    reason: str


def load(name: str) -> Converter:
    """The converter that is registered as `name`.

    Raises:
        BadInputError: there is none; the message lists the known ones.
    """
    return registry.load(GROUP, name)()


def converters() -> Iterator[Converter | Unusable]:
    """All that are registered, sorted by name; one that cannot be imported never hides the others."""
    yield from map(tried, registry.names(GROUP))


def tried(name: str) -> Converter | Unusable:
    """As :func:`load`, and what keeps it from being used."""
    try:
        return load(name)
    except Exception as error:  # whatever somebody else's module does while it is imported
        return Unusable(name, f"{type(error).__name__}: {error}")


def recognised(source: Path) -> tuple[list[Recognition], list[Unusable]]:
    """What the folder may be, the most certain first; and the converters that could not say."""
    found: list[Recognition] = []
    unusable: list[Unusable] = []
    for converter in converters():
        if isinstance(converter, Unusable):
            unusable.append(converter)
            continue
        try:
            recognition = converter.recognise(source)
        except Exception as error:  # as above
            unusable.append(Unusable(converter.format_name, str(error)))
            continue
        if recognition is not None:
            found.append(recognition)
    return sorted(found, key=lambda each: (-each.certainty, each.format_name)), unusable


def best(source: Path, found: list[Recognition]) -> Recognition:
    """The most certain one.

    Args:
        found: sorted as by `recognised`.

    Raises:
        BadInputError: there is none, or two are equally certain.
    """
    if not found:
        raise BadInputError(
            f"No format recognises {source}.", "See `diffseg convert --list` for the trees they expect."
        )
    first, *rest = found
    equal = [each.format_name for each in rest if first.certainty - each.certainty < _EQUAL]
    if equal:
        names = " and ".join(f"'{name}'" for name in (first.format_name, *equal))
        raise BadInputError(f"{source} looks equally like {names}.", "Name the format: `diffseg convert FORMAT ...`.")
    return first
