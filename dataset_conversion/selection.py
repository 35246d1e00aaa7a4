"""What users choose of a conversion: labels, cases, and a division into training and validation; pure functions."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.patients import Groups, others_of
from diffseg_nnunet.verification import listed

from . import splits as schemes
from .description import BACKGROUND, IGNORE, ConversionPlan, SourceCase, SplitScheme
from .partial import PartialLabel

FIVE_FOLD = "5-fold"
_FEW = re.compile(r"n=(\d+)")


def prepared(
    plan: ConversionPlan, *, labels: Sequence[str] = (), cases: Sequence[str] = (), splits: str | None = None
) -> ConversionPlan:
    """The plan as a user wants it; what is empty or None stays as the format has it.

    Raises:
        BadInputError: a label, a case or a scheme that there is not; the message lists those there are.
    """
    if cases:
        plan = select_cases(plan, cases)
    if labels:
        plan = select_labels(plan, labels)
    return choose_splits(plan, splits) if splits else plan


def select_labels(plan: ConversionPlan, names: Collection[str]) -> ConversionPlan:
    """Keep these labels, numbered 1, 2, ... in the order of their values; all others become background.

    The ignore label stays where label files hold it, or where a kept structure was not looked for in some case.

    Raises:
        BadInputError: a name is unknown, or only the background would be left.
    """
    known = [name for name in _by_value(plan.labels) if name not in (BACKGROUND, IGNORE)]
    _refuse_unknown("label", [name for name in names if name not in (*known, BACKGROUND, IGNORE)], known)
    kept = [name for name in known if name in set(names)]
    if not kept:
        raise BadInputError("No label would be left.", f"Choose some of: {', '.join(known) or 'none'}.")
    cases = tuple(
        replace(
            case,
            unannotated=tuple(name for name in case.unannotated if name in kept),
            label=case.label.keeping(kept) if isinstance(case.label, PartialLabel) else case.label,
        )
        for case in plan.cases
    )
    held = any(case.label and plan.labels.get(IGNORE) in _values(plan, case) for case in cases)
    if IGNORE in plan.labels and (held or any(case.unannotated for case in cases)):
        kept.append(IGNORE)
    return replace(
        plan,
        labels={name: value for value, name in enumerate([BACKGROUND, *kept])},
        cases=cases,
        # what is not kept becomes background, and is still a known value
        source_labels=plan.source_labels or plan.labels,
    )


def select_cases(plan: ConversionPlan, identifiers: Collection[str]) -> ConversionPlan:
    """Keep these cases, and the splits as far as these cases go.

    Raises:
        BadInputError: a case is unknown.
    """
    known = [case.identifier for case in plan.cases]
    _refuse_unknown("case", [identifier for identifier in identifiers if identifier not in set(known)], known)
    return keep(plan, set(identifiers))


def keep(plan: ConversionPlan, identifiers: Collection[str]) -> ConversionPlan:
    """The plan with these of its cases; of its splits, those that name no other: with fewer cases, they are others."""
    cases = tuple(case for case in plan.cases if case.identifier in identifiers)
    splits, lacking = schemes.divided(plan.splits, identifiers)
    note = f"Splits that name cases which are left out were dropped: {listed(lacking)}."
    extra = dict(plan.extra)
    if made := extra.get(schemes.PSEUDO_LABELLED):
        extra[schemes.PSEUDO_LABELLED] = {**made, "cases": [case for case in made["cases"] if case in identifiers]}
    return replace(plan, cases=cases, extra=extra, splits=tuple(splits), notes=(*plan.notes, *[note] * bool(lacking)))


def choose_splits(plan: ConversionPlan, name: str) -> ConversionPlan:
    """The plan with the scheme `name` as its first, hence the one that is written.

    Args:
        plan: its own schemes are known by their names.
        name: one of them, with fewer labels where ``:n=6`` is appended (`splits.chosen`); "5-fold", nnU-Net's own rule,
            which divides no patient; or "n=6", a few-label list: of the training cases, sorted by identifier, the first
            6 train and all others validate. Such lists are nested (n=3 is a part of n=6), but no two of them validate
            on the same cases.

    Raises:
        BadInputError: there is no such scheme, or there are too few training cases for it.
    """
    training = schemes.labelled_by_people(plan)
    few = _FEW.fullmatch(name)
    if few is not None:
        scheme = _first(int(few[1]), training, plan.same_patient)
    else:
        own = {each.name for each in plan.splits}
        rule = schemes.k_fold(training, groups=plan.same_patient)
        by_rule = tuple(replace(each, name=FIVE_FOLD) for each in rule if FIVE_FOLD not in own)
        if name == FIVE_FOLD and FIVE_FOLD not in own and not by_rule:
            raise _too_few(name, training)
        scheme = schemes.chosen(replace(plan, splits=(*plan.splits, *by_rule)), name)
    return replace(plan, splits=(scheme, *(each for each in plan.splits if each.name != scheme.name)))


def label_table(plan: ConversionPlan) -> list[tuple[int, str, int, str]]:
    """(value in the label files, name, value that is written, its name), of all cases, sorted and each once."""
    written = {value: name for name, value in plan.labels.items()}
    rows = set()
    for case in plan.cases:
        if case.label is not None:
            source = case.source_labels or plan.source_labels or plan.labels
            named = {value: name for name, value in source.items()}
            rows |= {
                (value, named.get(value, BACKGROUND), new, written[new]) for value, new in plan.values(case).items()
            }
    return sorted(rows)


def names_given(text: str, option: str) -> tuple[str, ...]:
    """``"liver, spleen"`` -> ("liver", "spleen"); ``"@file"``: the names in a text file, by lines or commas.

    Raises:
        BadInputError: there is no such file, or no name.
    """
    if text.startswith("@"):
        path = Path(text[1:]).expanduser()
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInputError(
                f"{option} {path} cannot be read: {error}.", "Give a text file, one name a line."
            ) from (error)
    names = tuple(dict.fromkeys(name.strip() for name in re.split(r"[,\n]", text) if name.strip()))
    if not names:
        raise BadInputError(f"{option} names nothing.", f"Give names separated by commas, or {option} @file.")
    return names


def _first(count: int, training: list[str], groups: Groups) -> SplitScheme:
    first = training[:count]
    patients = others_of(first, groups)
    rest = [case for case in training[count:] if case not in patients]
    if not (first and rest):
        raise _too_few(f"n={count}", training)
    source = f"few-label list: the first {count} training case(s) by identifier train, the other {len(rest)} validate"
    if left_out := len(training) - count - len(rest):
        source += f" but for {left_out} of the same patients"
    return SplitScheme(f"n={count}", ({"train": tuple(first), "val": tuple(rest)},), source)


def _too_few(name: str, training: list[str]) -> BadInputError:
    return BadInputError(
        f"There are {len(training)} training case(s): too few for the splits '{name}'.",
        "A fold needs at least one case to train and one, of another patient, to validate.",
    )


def _by_value(labels: Mapping[str, int]) -> list[str]:
    return sorted(labels, key=labels.__getitem__)


def _refuse_unknown(kind: str, unknown: Sequence[str], known: Sequence[str]) -> None:
    if not unknown:
        return
    near = get_close_matches(unknown[0], known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise BadInputError(f"There is no {kind} {listed(unknown)}.{hint}", f"There are: {listed(known, 120)}.")


def _values(plan: ConversionPlan, case: SourceCase) -> set[int]:
    """The values that this case's label file brings, without what is made of its background."""
    return set(plan.values(replace(case, unannotated=())).values())
