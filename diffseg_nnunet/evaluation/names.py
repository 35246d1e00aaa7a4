"""One name for one structure, however a data set spells it, and the pairs of structures of two data sets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_SIDES = {"left": "left", "l": "left", "lt": "left", "right": "right", "r": "right", "rt": "right"}
SPELLINGS = {
    "liver": (),
    "kidney": ("kid",),
    "spleen": ("spl",),
    "pancreas": ("pan", "panc"),
    "aorta": ("arota",),  # sic: AMOS22's dataset.json
    "inferior vena cava": ("ivc", "postcava", "post cava", "vena cava inferior"),
    "adrenal gland": ("adrenal", "adrenal glands", "adrenals", "ag", "suprarenal gland"),
    "gallbladder": ("gall bladder", "gall", "gb"),
    "esophagus": ("oesophagus", "eso"),
    "stomach": ("sto",),
    "duodenum": ("duo",),
    "portal and splenic veins": (
        "portal vein and splenic vein",
        "portal and splenic vein",
        "portal splenic veins",
        "portal splenic v",
        "portal veins and splenic veins",
        "portal vein splenic vein",
        "veins",
        "psv",
    ),
    "bladder": ("urinary bladder",),
    "lesion": ("lesions", "tumor", "tumors", "tumour", "tumours"),
    "lung": (),
    "parotid": ("parotid gland",),
    "femur": ("femoral head", "head of femur"),
    "prostate or uterus": ("prostate uterus",),
}
"""A structure's name -> how else it is spelled; sides apart."""
_CANONICAL = {spelling: name for name, spellings in SPELLINGS.items() for spelling in (name, *spellings)}
_GLUED = {
    f"{written}{short}": f"{side} {organ}"
    for written, side in (("l", "left"), ("r", "right"), ("left", "left"), ("right", "right"))
    for organ, shorts in (("kidney", ("k", "kid", "kidney")), ("adrenal gland", ("ag", "ad", "adrenal")))
    for short in shorts
}
# 'leftKidney' and 'LKidney' are two words, 'IVC' is one
_WORD_BEGINS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_BETWEEN_WORDS = re.compile(r"[\W_]+")
_WITH_ABBREVIATION = re.compile(r"(.+)\((.+)\)\s*")


def canonical_name(name: str) -> str:
    """The name of a structure in lower case, side first, common synonyms and abbreviations written out.

    "Kidney_R", "R kidney", "right-kidney" and "rkid" are "right kidney"; "postcava" and "IVC" are "inferior vena cava".
    "Left kidney (LK)" is one name said twice. A name that is not known is its words: "Rectus_Abdominis" is "rectus
    abdominis".
    """
    twice = _WITH_ABBREVIATION.fullmatch(name)
    said = {_by_words(part) for part in twice.groups()} if twice else set()
    return said.pop() if len(said) == 1 else _by_words(name)


def _by_words(name: str) -> str:
    """The canonical name by all words that are there."""
    words = _BETWEEN_WORDS.sub(" ", _WORD_BEGINS.sub(" ", name)).lower().split()
    phrase = " ".join(words)
    if phrase in _GLUED:
        return _GLUED[phrase]
    if phrase in _CANONICAL:
        return _CANONICAL[phrase]
    for side, rest in ((words[:1], words[1:]), (words[-1:], words[:-1])):
        if rest and side[0] in _SIDES:
            organ = " ".join(rest)
            return f"{_SIDES[side[0]]} {_CANONICAL.get(organ, organ)}"
    return phrase or name


def match_names(names: Sequence[str], others: Iterable[str]) -> dict[str, str]:
    """Pairs of names that mean one structure.

    Equal names are a pair; of the rest, those whose canonical name is equal and stands for one name on each side only.

    Returns:
        Name to the other side's name, in the order of `names`; what has no partner, or several, is left out.
    """
    others = list(others)
    pairs = {name: name for name in names if name in others}
    own = _by_canonical_name(name for name in names if name not in pairs)
    theirs = _by_canonical_name(name for name in others if name not in pairs)
    for canonical, spellings in own.items():
        partners = theirs.get(canonical, [])
        if len(spellings) == len(partners) == 1:
            pairs[spellings[0]] = partners[0]
    return {name: pairs[name] for name in names if name in pairs}


def _by_canonical_name(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(canonical_name(name), []).append(name)
    return found
