"""A decision of a plan, and what has to be read of a plan to explain it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FULLRES, LOWRES = "3d_fullres", "3d_lowres"


@dataclass(frozen=True)
class Decision:
    """One decision of a plan.

    Attributes:
        scope: "data set", or the configuration it belongs to.
        what: what was decided, with its unit.
        value: what JSON can hold: a number, a text, a truth value, a list or an object of these; None for no value.
        why: a phrase for the user.
    """

    scope: str
    what: str
    value: Any
    why: str

    @property
    def text(self) -> str:
        """The value, for people."""
        return shown(self.value)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PlanView:
    """What an explanation reads of a plan, an older version's as well.

    Attributes:
        plans: nnU-Net's plans.
        section: our section of them.
        fingerprint: nnU-Net's, or None.
        training_cases: labelled cases, or None where the number is not known.
    """

    plans: Mapping[str, Any]
    section: Mapping[str, Any]
    fingerprint: Mapping[str, Any] | None
    training_cases: int | None

    @property
    def configurations(self) -> list[str]:
        return list(self.plans["configurations"])

    @property
    def transposition(self) -> list[int]:
        return list(self.plans.get("transpose_forward", (0, 1, 2)))

    @property
    def source(self) -> Mapping[str, Any]:
        """The checkpoint the plan was made to start from; empty without."""
        return self.section.get("source", {})

    def adopted(self, name: str, what: str) -> str | None:
        """What a configuration has of its source's "spacing" or "topology", in the planner's words; None where it has
        no source."""
        begin = f"{name}, {what}: "
        said = (sentence for sentence in self.source.get("adopted", ()) if sentence.startswith(begin))
        return next((sentence.removeprefix(begin) for sentence in said), None)

    @property
    def budget_gib(self) -> float | None:
        return self.section.get("memory", {}).get("budget_gib")

    def configuration(self, name: str) -> dict[str, Any]:
        """A configuration, with what it inherits."""
        own, names = dict(self.plans["configurations"].get(name, {})), {name}
        while (parent := own.pop("inherits_from", None)) is not None and parent not in names:
            names.add(parent)
            own = {**self.plans["configurations"].get(parent, {}), **own}
        return own

    def stages(self, name: str) -> Mapping[str, Any]:
        return self.section.get("configurations", {}).get(name, {})

    def reasons(self, name: str) -> Mapping[str, str]:
        """The planner's own."""
        return self.stages(name).get("reasons", {})

    def full_spacing(self) -> list[float] | None:
        """Target spacing of 3d_fullres in the order of the files, mm."""
        spacing = self.configuration(FULLRES).get("spacing")
        if spacing is None:
            return None
        return [float(spacing[self.transposition.index(axis)]) for axis in range(3)]

    def median_voxels(self, name: str) -> float | None:
        """Voxels of the median image of a configuration after resampling; for 2d those of all its slices."""
        full = self.configuration(FULLRES)
        if "median_image_size_in_voxels" not in full or "spacing" not in full:
            shape = self.configuration(name).get("median_image_size_in_voxels")
            return None if shape is None else math.prod(shape)
        voxels = math.prod(full["median_image_size_in_voxels"])
        own = self.configuration(name).get("spacing", ())
        return voxels if len(own) != 3 else voxels * math.prod(full["spacing"]) / math.prod(own)


def shown(value: Any) -> str:
    """A value, for people."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        nested = any(isinstance(part, (list, tuple)) for part in value)
        parts = [joined(part) if nested else shown(part) for part in value]
        return ", ".join(parts) or "none"
    return str(value)


def joined(sizes: Sequence[Any]) -> str:
    """Sizes along the axes."""
    return "×".join(shown(size) for size in sizes)
