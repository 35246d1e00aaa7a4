"""Which scans show one patient: dataset.json's entry ``same_patient``, and what follows from it.

nnU-Net knows cases alone. Where a patient has several scans, some of them would train a fold and others validate it, or
be pretrained on unlabelled, and the scores would tell less of a new patient than they seem to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from diffseg_nnunet.errors import BadInputError

SAME_PATIENT = "same_patient"
Groups = Sequence[Sequence[str]]


def same_patient(dataset_json: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Groups of case identifiers, each of one patient; cases in no group are patients of their own.

    Raises:
        BadInputError: the entry is no list of lists of names, or names a case twice.
    """
    groups = dataset_json.get(SAME_PATIENT, [])
    shaped = isinstance(groups, list) and all(isinstance(group, list) for group in groups)
    named = [case for group in groups for case in group] if shaped else []
    if not shaped or not all(isinstance(case, str) for case in named) or len(set(named)) < len(named):
        raise BadInputError(
            f"'{SAME_PATIENT}' in dataset.json is no list of groups, or names a case twice.",
            f'Write "{SAME_PATIENT}": [["case_a", "case_b"], ...], each group the scans of one patient.',
        )
    return tuple(tuple(group) for group in groups)


def by_patient(cases: Collection[str], groups: Groups) -> list[list[str]]:
    """The cases, patient by patient: each sorted, and in the order of their first cases."""
    there, alone = set(cases), set(cases) - {case for group in groups for case in group}
    shared = [sorted(there.intersection(group)) for group in groups]
    return sorted([group for group in shared if group] + [[case] for case in alone])


def others_of(cases: Iterable[str], groups: Groups) -> set[str]:
    """The other scans of the patients whom `cases` show."""
    shown = set(cases)
    return {case for group in groups if not shown.isdisjoint(group) for case in group} - shown
