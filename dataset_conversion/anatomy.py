"""One spelling a structure, so that the structures of different data sets match by name.

The side comes first (``left_kidney``), words are joined by underscores, and names are those of the field's label files
where these agree. Converters number these names; they never spell their own.
"""

from __future__ import annotations

import re

from diffseg_nnunet.errors import BadInputError

# spelling -> other spellings in published label files, normalised as `canonical` does it
STRUCTURES: dict[str, tuple[str, ...]] = {
    "adrenal_glands": ("adrenal",),
    "aorta": ("arota",),  # the typo is in AMOS22's dataset.json
    "bladder": ("urinary_bladder",),
    "colon": (),
    "duodenum": ("duo",),
    "esophagus": ("oesophagus", "eso"),
    "gallbladder": ("gall_bladder", "gall"),
    "inferior_vena_cava": ("postcava", "ivc"),
    "intestine": (),
    "left_adrenal_gland": ("left_adrenal", "lag", "lad"),
    "left_femur": (),
    "left_kidney": ("lkid", "lk"),
    "lesion": ("tumor", "tumour"),
    "liver": (),
    "pancreas": (),
    "portal_and_splenic_veins": (
        "portal_vein_and_splenic_vein",
        "portal_and_splenic_vein",
        "portal_splenic_veins",
        "veins",
    ),
    "prostate_or_uterus": ("prostate_uterus",),
    "rectum": (),
    "right_adrenal_gland": ("right_adrenal", "rag", "rad"),
    "right_femur": (),
    "right_kidney": ("rkid", "rk"),
    "spleen": (),
    "stomach": ("sto",),
}
_SPELLINGS = {spelling: name for name, others in STRUCTURES.items() for spelling in (name, *others)}
_SIDES = {"left": "left", "right": "right", "l": "left", "r": "right"}


def canonical(name: str) -> str:
    """The one spelling of a structure's name; a name that is not known comes back in small letters and underscores.

    ``"Gall Bladder"`` gives ``gallbladder``, ``kidney_right`` and ``R kidney`` give ``right_kidney``, AMOS22's
    ``arota`` gives ``aorta``.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    if len(words) > 1:
        position = next((index for index in (0, len(words) - 1) if words[index] in _SIDES), None)
        if position is not None:
            words = [_SIDES[words[position]], *words[:position], *words[position + 1 :]]
    spelling = "_".join(words)
    return _SPELLINGS.get(spelling, spelling)


def numbered(*names: str) -> dict[str, int]:
    """Name -> value of a label file with the values 1, 2, 3, ... in this order; ValueError for an unknown spelling."""
    unknown = [name for name in names if name not in STRUCTURES]
    if unknown:
        raise ValueError(f"not the spelling of dataset_conversion.anatomy: {', '.join(unknown)}")
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
