"""Planners, trainers and converters by name, through entry points: third parties add theirs without a fork."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from diffseg_nnunet.errors import BadInputError, StageFailedError

GROUPS = ("planners", "fingerprints", "trainers", "converters")


def names(group: str) -> list[str]:
    """The registered names of `group` (one of GROUPS), sorted."""
    return sorted({entry.name for entry in _entries(group)})


def load(group: str, name: str) -> Any:
    """The object registered as `name` in `group`; nothing else is imported.

    Raises:
        BadInputError: the name is unknown; the message lists the known ones.
        StageFailedError: two packages registered the same name.
    """
    found = [entry for entry in _entries(group) if entry.name == name]
    if not found:
        raise BadInputError(f"Unknown {group[:-1]} '{name}'.", f"Known {group}: {', '.join(names(group)) or 'none'}.")
    if len({entry.value for entry in found}) > 1:
        where = ", ".join(sorted(entry.value for entry in found))
        raise StageFailedError(f"The {group[:-1]} '{name}' is registered more than once: {where}.", "Uninstall one.")
    return found[0].load()


def _entries(group: str):
    if group not in GROUPS:
        raise ValueError(f"unknown group {group!r}, known: {GROUPS}")
    return entry_points(group=f"diffseg_nnunet.{group}")
