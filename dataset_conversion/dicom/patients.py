"""Whom a series shows: by PatientID, or where that tells nothing by the study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .index import Series


def patients_of(series: Sequence[Series]) -> tuple[list[str], list[str]]:
    """What tells the patient of each series from others, and notes.

    De-identification leaves PatientID empty, or gives all patients the same: then a study is taken for a patient.
    """
    identities = {each.first.patient for each in series} - {""}
    studies = [each.first.study or each.uid for each in series]
    placeholder = len(identities) == 1 and len(set(studies)) > 1
    patients, notes = [], []
    for each, study in zip(series, studies, strict=True):
        patients.append(study if placeholder else each.first.patient or study)
    if placeholder:
        notes.append(
            f"All {len(series)} series have one PatientID or none, which is taken for a placeholder: each of their "
            f"{len(set(studies))} studies counts as a patient."
        )
    if several := [count for count in Counter(patients).values() if count > 1]:
        notes.append(
            f"{len(several)} patient(s) have several series or stacks, {sum(several)} in all, up to {max(several)} "
            "each: they stay on one side of each fold."
        )
    return patients, notes
