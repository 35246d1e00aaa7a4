"""Which structure of the reference is which of the prediction, and how near its surfaces must come: matched by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.evaluation.labels import Labels, scored_structures
from diffseg_nnunet.evaluation.names import match_names
from diffseg_nnunet.evaluation.protocols import Protocol

DEFAULT_TOLERANCE_MM = 1.0


@dataclass(frozen=True)
class Structure:
    """What is scored under one name.

    Attributes:
        name: the protocol's, or the reference's where the protocol names none.
        reference: its values in the reference; the structure is their union.
        prediction: likewise, in the prediction.
        tolerance_mm: tolerance of NSD in mm.
    """

    name: str
    reference: tuple[int, ...]
    prediction: tuple[int, ...]
    tolerance_mm: float


@dataclass(frozen=True)
class Matching:
    """What is scored, and what is not.

    Attributes:
        structures: in the protocol's order, or the reference's.
        unmatched_reference: names of the reference's labels that are not scored.
        unmatched_prediction: names of the prediction's labels that are not scored.
        missing: structures of the protocol that are not in both.
    """

    structures: tuple[Structure, ...]
    unmatched_reference: tuple[str, ...]
    unmatched_prediction: tuple[str, ...]
    missing: tuple[str, ...]

    def unmatched(self) -> dict[str, list[str]]:
        """The names that are not scored, by where they come from."""
        return {
            "reference": list(self.unmatched_reference),
            "prediction": list(self.unmatched_prediction),
            "protocol": list(self.missing),
        }


def match_structures(
    labels: Labels,
    prediction_labels: Labels | None,
    protocol: Protocol,
    tolerance_mm: float | None = None,
    tolerances_mm: Mapping[str, float] | None = None,
) -> Matching:
    """Match the structures of reference, prediction and protocol by name (`names.match_names`).

    Args:
        labels: of the references.
        prediction_labels: of the predictions; None: those of the references.
        protocol: what is to be scored.
        tolerance_mm: tolerance of NSD in mm; None: the protocol's, or 1 mm.
        tolerances_mm: other tolerances, by name of structure.

    Raises:
        BadInputError: nothing matches, a tolerance is below 0, names no structure, or the protocol fixes it.
    """
    reference = scored_structures(labels)
    prediction = reference if prediction_labels is None else scored_structures(prediction_labels)
    pairs = match_names(list(reference), prediction)
    wanted = protocol.structures or tuple(reference)
    named = match_names(wanted, reference) if protocol.structures else {name: name for name in reference}
    found = {name: (named[name], pairs[named[name]]) for name in wanted if named.get(name) in pairs}
    if not found:
        sides = {"the reference": reference, "the prediction": prediction, "the protocol": protocol.structures}
        lists = "; ".join(f"{side} has {', '.join(names)}" for side, names in sides.items() if names)
        raise BadInputError(f"No structure is matched by name: {lists}.", "Name at least one structure alike.")
    tolerances = _tolerances(tuple(found), protocol, tolerance_mm, tolerances_mm or {})
    structures = tuple(
        Structure(name, reference[of_reference], prediction[of_prediction], tolerances[name])
        for name, (of_reference, of_prediction) in found.items()
    )
    scored_reference, scored_prediction = ({pair[side] for pair in found.values()} for side in (0, 1))
    return Matching(
        structures,
        tuple(name for name in reference if name not in scored_reference),
        tuple(name for name in prediction if name not in scored_prediction),
        tuple(name for name in protocol.structures if name not in found),
    )


def settings_of(matching: Matching) -> dict[str, Any]:
    """What a report says about names, values and tolerances."""
    structures = matching.structures
    tolerances = {structure.tolerance_mm for structure in structures}
    return {
        "tolerance_mm": tolerances.pop() if len(tolerances) == 1 else None,
        "structures": {
            structure.name: {
                "reference": list(structure.reference),
                "prediction": list(structure.prediction),
                "tolerance_mm": structure.tolerance_mm,
            }
            for structure in structures
        },
        "unmatched": matching.unmatched(),
    }


def parse_tolerances(texts: Iterable[str]) -> tuple[float | None, dict[str, float]]:
    """Read "2" (for all structures) and "liver=5" (for one).

    Returns:
        The tolerance for all, None where none is given, and the others by name; mm.

    Raises:
        BadInputError: a text is neither, or there are two for all.
    """
    for_all, by_name = None, {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        try:
            tolerance = float(number)
        except ValueError:
            raise BadInputError(f"'{text}' is no tolerance.", "Give mm, as 2, or as liver=5.") from None
        if equals:
            by_name[name.strip()] = tolerance
        elif for_all is not None:
            raise BadInputError("Two tolerances are given for all structures.", "Give one, or name the structures.")
        else:
            for_all = tolerance
    return for_all, by_name


def _tolerances(
    names: tuple[str, ...], protocol: Protocol, tolerance_mm: float | None, others: Mapping[str, float]
) -> dict[str, float]:
    if protocol.tolerances_mm:
        if tolerance_mm is not None or others:
            raise BadInputError(f"The protocol '{protocol.name}' fixes the tolerances.", "Leave the tolerance out.")
        return {name: protocol.tolerances_mm[name] for name in names}
    default = DEFAULT_TOLERANCE_MM if tolerance_mm is None else float(tolerance_mm)
    pairs = match_names(list(others), names)
    if unknown := sorted(others.keys() - pairs.keys()):
        raise BadInputError(
            f"A tolerance is given for {', '.join(unknown)}, which is not scored.", f"Scored: {', '.join(names)}."
        )
    tolerances = dict.fromkeys(names, default) | {pairs[name]: float(mm) for name, mm in others.items()}
    if wrong := next((mm for mm in tolerances.values() if not mm >= 0), None):
        raise BadInputError(f"The tolerance {wrong:g} mm is below 0.", "Give 0 mm or more.")
    return tolerances
