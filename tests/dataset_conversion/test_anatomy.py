"""One spelling a structure, whatever the label file calls it."""

from __future__ import annotations

import json

import pytest

from diffseg_nnunet.dataset_conversion.amos22 import AMOS22Converter
from diffseg_nnunet.dataset_conversion.anatomy import canonical, numbered, structure
from diffseg_nnunet.dataset_conversion.btcv import BTCVConverter
from diffseg_nnunet.dataset_conversion.flare22 import FLARE22Converter
from diffseg_nnunet.dataset_conversion.flare23 import FLARE23Converter
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.planning.mirroring import paired_structures

# as MONAI's BTCV list, AMOS22's dataset.json, FLARE's and TotalSegmentator's lists spell them
BTCV_MONAI = [
    "spleen",
    "rkid",
    "lkid",
    "gall",
    "eso",
    "liver",
    "sto",
    "aorta",
    "IVC",
    "veins",
    "pancreas",
    "rad",
    "lad",
]
AMOS22 = json.loads(
    """{"0": "background", "1": "spleen", "2": "right kidney", "3": "left kidney", "4": "gall bladder",
    "5": "esophagus", "6": "liver", "7": "stomach", "8": "arota", "9": "postcava", "10": "pancreas",
    "11": "right adrenal gland", "12": "left adrenal gland", "13": "duodenum", "14": "bladder",
    "15": "prostate/uterus"}"""
)
FLARE22 = [
    "liver",
    " right kidney",
    " spleen",
    " pancreas",
    " aorta",
    " inferior vena cava",
    " right adrenal gland",
    " left adrenal gland",
    "\n    gallbladder",
    " esophagus",
    " stomach",
    " duodenum",
    " left kidney",
]
CONVERTERS = (BTCVConverter, AMOS22Converter, FLARE22Converter, FLARE23Converter)


def test_published_spellings_give_the_converters_labels() -> None:
    assert [canonical(name) for name in BTCV_MONAI] == list(BTCVConverter.labels)
    assert {canonical(name): int(value) for value, name in AMOS22.items() if value != "0"} == AMOS22Converter.labels
    assert [canonical(name) for name in FLARE22] == list(FLARE22Converter.labels)


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("kidney_right", "right_kidney"),
        ("L kidney", "left_kidney"),
        ("Kidney (R)", "right_kidney"),
        ("adrenal_gland_left", "left_adrenal_gland"),
        ("portal_vein_and_splenic_vein", "portal_and_splenic_veins"),
        ("RAG", "right_adrenal_gland"),
        ("Oesophagus", "esophagus"),
        ("Tumour", "lesion"),
        ("femur L", "left_femur"),
        ("no such thing", "no_such_thing"),
        ("left", "left"),
        ("", ""),
    ],
)
def test_spellings(spelled: str, expected: str) -> None:
    assert canonical(spelled) == expected


@pytest.mark.parametrize("converter", CONVERTERS)
def test_the_canonical_spelling_is_its_own(converter: type) -> None:
    assert [canonical(name) for name in converter.labels] == list(converter.labels)


def test_shared_organs_have_the_same_names() -> None:
    btcv, flare, amos = (set(each.labels) for each in (BTCVConverter, FLARE22Converter, AMOS22Converter))
    assert btcv - flare == {"portal_and_splenic_veins"}
    assert flare - btcv == {"duodenum"}
    assert amos - flare == {"bladder", "prostate_or_uterus"}


@pytest.mark.parametrize("converter", CONVERTERS)
def test_planning_finds_left_and_right(converter: type) -> None:
    assert set(paired_structures(converter.labels)) == {
        ("left_kidney", "right_kidney"),
        ("left_adrenal_gland", "right_adrenal_gland"),
    }


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="not the spelling"):
        numbered("liver", "left kidney")
    assert structure(" 2 ", FLARE22Converter.labels, "x") == "right_kidney"
    with pytest.raises(BadInputError, match=r"x: there is no structure 'colon'\. Known are liver, "):
        structure("colon", FLARE22Converter.labels, "x")
