"""Which axes may be mirrored, in training and at test time.

Where left and right organs have labels of their own, a mirrored image shows a left kidney that is labelled right:
nnU-Net's default of mirroring all axes then teaches, and averages, contradictions. The axis that runs left-right in the
patient is found from the direction cosines and followed through nnU-Net's transposition.

Names are read generously: taking two labels for a pair by mistake costs some augmentation, missing a pair costs Dice.
So the heart's left and right ventricle are a pair, though their walls tell them apart in a mirrored image as well, and
so are a vertebra and a rib that are called no more than 'L5' and 'R5'. A label of one side alone is none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ALL_AXES = (0, 1, 2)
_CASES_NAMED = 5

_LEFT, _RIGHT = "left", "right"
_WORDS = {
    _LEFT: re.compile(r"left|lt|lft|lh|lhs|sin|sinist(er|ra|rum|ri|rae)"),
    _RIGHT: re.compile(r"right|rt|rgt|rh|rhs|dext?|dext(er|ra|rum|ri|rae)"),
}
_LETTERS = {_LEFT: "l", _RIGHT: "r"}
# a side written into a word, at its beginning or its end: 'leftkidney', 'kidneylt', 'lkid', 'LUL', 'Eye_AL', 'rib_L1'
_GLUED_FIRST = {_LEFT: re.compile(r"left|l"), _RIGHT: re.compile(r"right|r")}
_GLUED_LAST = {_LEFT: re.compile(r"(left|lt|l)(?=\d*$)"), _RIGHT: re.compile(r"(right|rt|r)(?=\d*$)")}
# a word of small or capital letters, an acronym, digits; an acronym ends before the capital of the next word (LKidney)
_TOKEN = re.compile(r"[^\W\d_]?[^\W\d_A-Z]+\d*|[A-Z]+(?=[A-Z][a-z])|[A-Z]+\d*|\d+")

_Reading = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class MirrorDecision:
    """Which axes of the transposed 3D array (as nnU-Net trains on it) may be mirrored, and why.

    Attributes:
        allowed_axes: a subset of (0, 1, 2), ascending.
        left_right_axis: the axis of the transposed array that runs left-right in all cases; None where unknown.
        pairs: (left, right) label names.
        reason: one sentence for the user.
        warning: what the user should look into, or None.
    """

    allowed_axes: tuple[int, ...]
    left_right_axis: int | None
    pairs: list[tuple[str, str]]
    reason: str
    warning: str | None


def paired_structures(label_names: Iterable[str]) -> list[tuple[str, str]]:
    """Find the labels that exist for both sides of the body, by their names.

    Both names must be equal apart from the side: ``left_kidney`` / ``right_kidney``, ``kidney_L`` / ``kidney_R``,
    ``leftKidney`` / ``rightKidney``, ``lkid`` / ``rkid``, ``Lung_LUL`` / ``Lung_RUL``, ``renalis_sin`` /
    ``renalis_dext``; spelling may be mixed.

    Returns:
        (left name, right name) of each pair, in the order of the labels; a name is in one pair at most.
    """
    names = list(dict.fromkeys(label_names))
    readings = {name: _readings(name) for name in names}
    pairs: list[tuple[str, str]] = []
    taken: set[str] = set()
    for name in names:
        for side, rest in () if name in taken else readings[name]:
            wanted = (_RIGHT if side == _LEFT else _LEFT, rest)
            partner = next((other for other in names if other not in taken and wanted in readings[other]), None)
            if partner is not None:
                pairs.append((name, partner) if side == _LEFT else (partner, name))
                taken |= {name, partner}
                break
    return pairs


def left_right_axis(direction: Sequence[float]) -> int | None:
    """The array axis that runs mostly along the patient's left-right direction.

    Args:
        direction: SimpleITK's direction cosines, 9 numbers, row by row; column j is image axis j (x, y, z) in the
            left-posterior-superior frame.

    Returns:
        0, 1 or 2 in SimpleITK's array order (z, y, x); None if these are not 3 x 3 finite numbers, or all its first
        row is zero.
    """
    cosines = np.asarray(direction, dtype=float)
    if cosines.size != 9 or not np.isfinite(cosines).all():
        return None
    along_left = np.abs(cosines.reshape(3, 3)[0])
    return 2 - int(along_left.argmax()) if along_left.any() else None


def decide_mirroring(
    label_names: Iterable[str],
    directions: Mapping[str, Sequence[float] | None],
    transpose_forward: Sequence[int],
) -> MirrorDecision:
    """Allow every axis that does not swap a left structure for a right one.

    Args:
        label_names: all label names of the data set.
        directions: direction cosines of each case (see `left_right_axis`); None where a file format has none.
        transpose_forward: nnU-Net's transposition of the array axes, a permutation of 0, 1, 2.

    Returns:
        All axes where no structure is paired. Where some are: all axes but the left-right one; no axis at all where
        that one differs between cases (the warning names the minority) or is unknown. The warning also names cases
        in which it is the same axis, but points the other way.
    """
    label_names = list(label_names)
    pairs = paired_structures(label_names)
    axes = {case: None if cosines is None else left_right_axis(cosines) for case, cosines in directions.items()}
    agreed = next(iter(axes.values())) if len(set(axes.values())) == 1 else None
    transposed = None if agreed is None else list(transpose_forward).index(agreed)
    if not pairs:
        alone = [name for name in label_names if any(_side_of_word(token.lower()) for token in _TOKEN.findall(name))]
        but = f" (one side alone: {_listed(alone)})" if alone else ""
        return MirrorDecision(ALL_AXES, transposed, pairs, f"no label exists for both sides of the body{but}", None)
    named = f"left and right have labels of their own ({_listed([' / '.join(pair) for pair in pairs])})"
    if transposed is not None:
        allowed = tuple(axis for axis in ALL_AXES if axis != transposed)
        reason = f"{named}, and axis {transposed} runs left-right"
        return MirrorDecision(allowed, transposed, pairs, reason, _warn_of_opposed(directions, agreed))
    reason, warning = _why_unknown(axes)
    return MirrorDecision((), None, pairs, f"{named}, but {reason}", warning)


def _why_unknown(axes: Mapping[str, int | None]) -> tuple[str, str | None]:
    """(reason, warning) for cases that have no left-right axis in common."""
    unknown = [case for case, axis in axes.items() if axis is None]
    if unknown or not axes:
        warning = f"The direction cosines of these cases are unknown, of others not: {_listed(unknown)}."
        return "the image files do not say which axis runs left-right", warning if len(unknown) < len(axes) else None
    majority = Counter(axes.values()).most_common(1)[0][0]
    minority = [case for case, axis in axes.items() if axis != majority]
    warning = f"The left-right axis of these cases differs from that of most: {_listed(minority)}."
    return "the left-right axis is not the same in all cases", warning


def _warn_of_opposed(directions: Mapping[str, Sequence[float] | None], axis: int) -> str | None:
    """nnU-Net's usual readers ignore direction cosines: images stored the other way round are mirror images to it."""
    signs = {
        case: np.asarray(cosines, dtype=float).reshape(3, 3)[0, 2 - axis] > 0 for case, cosines in directions.items()
    }
    majority = Counter(signs.values()).most_common(1)[0][0]
    opposed = [case for case, sign in signs.items() if sign != majority]
    if not opposed:
        return None
    return f"The left-right axis of these cases points the other way than that of most: {_listed(opposed)}."


def to_2d(allowed_axes: Sequence[int]) -> tuple[int, ...]:
    """The axes of a 2D configuration's patch: slices run along axis 0, so axes 1 and 2 become 0 and 1."""
    return tuple(axis - 1 for axis in allowed_axes if axis > 0)


def _readings(name: str) -> list[_Reading]:
    """All ways to read `name` as (side, the rest of its tokens), the surest first.

    Words for the side come before single letters, which may mean other things beside them ('left_L1_root'); a side
    glued to a token ('rkid', 'LUL') counts only in names without either.
    """
    tokens = _TOKEN.findall(name)
    lowered = [token.lower() for token in tokens]
    by_word = [_side_of_word(token) for token in lowered]
    by_letter = [next((side for side, letter in _LETTERS.items() if token == letter), None) for token in lowered]
    for sides in (by_word, by_letter):
        if len(set(sides) - {None}) == 1:
            side = next(filter(None, sides))
            plain = [token for token, found in zip(tokens, sides, strict=True) if found is None]
            # 'right adrenal gland (RAG)': the acronym carries the side as well
            short = [_without_side(token, side) for token in plain]
            rests = (tuple(token.lower() for token in rest) for rest in (plain, short))
            return [(side, rest) for rest in dict.fromkeys(rests)]
        if len(set(sides)) > 1:  # both sides in one name: no side
            return []
    return _glued_readings(lowered)


def _glued_readings(tokens: list[str]) -> list[_Reading]:
    """A side written into one of the tokens; most of these readings mean nothing, and find no partner."""
    found: dict[_Reading, None] = {}
    for position, token in enumerate(tokens):
        for side in _LETTERS:
            for match in (_GLUED_FIRST[side].match(token), _GLUED_LAST[side].search(token)):
                if match is not None:
                    rest = token[: match.start()] + token[match.end() :]
                    found[side, (*tokens[:position], *([rest] if rest else []), *tokens[position + 1 :])] = None
    return list(found)


def _side_of_word(token: str) -> str | None:
    return next((side for side, pattern in _WORDS.items() if pattern.fullmatch(token)), None)


def _without_side(token: str, side: str) -> str:
    is_acronym = token.isupper() and len(token) > 1
    return token[1:] if is_acronym and token.lower().startswith(_LETTERS[side]) else token


def _listed(names: list[str]) -> str:
    rest = len(names) - _CASES_NAMED
    return ", ".join(names[:_CASES_NAMED]) + (f" and {rest} more" if rest > 0 else "")
