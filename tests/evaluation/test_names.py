"""Names of structures: one for every spelling, and pairs of two data sets; protocols and tolerances by name."""

from __future__ import annotations

import pytest

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.evaluation.names import SPELLINGS, canonical_name, match_names
from diffseg_nnunet.evaluation.protocols import BTCV_ORGANS, FLARE_TOLERANCES_MM, PLAIN, PROTOCOLS, find_protocol
from diffseg_nnunet.evaluation.structures import match_structures, parse_tolerances

BTCV = (
    *("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta"),
    *("inferior vena cava", "portal vein and splenic vein", "pancreas", "right adrenal gland", "left adrenal gland"),
)
AMOS = (
    *("spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "arota", "postcava"),
    *("pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus"),
)
FLARE = (
    *("liver", "RK", "spleen", "pancreas", "aorta", "IVC", "RAG", "LAG", "Gallbladder", "Esophagus"),
    *("Stomach", "Duodenum", "LK"),
)
TOTALSEGMENTATOR = (
    *("spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "pancreas", "adrenal_gland_right"),
    *("adrenal_gland_left", "esophagus", "duodenum", "aorta", "inferior_vena_cava", "portal_vein_and_splenic_vein"),
)


def numbered(names: tuple[str, ...]) -> dict[str, int]:
    return {name: value for value, name in enumerate(names, start=1)}


@pytest.mark.parametrize(
    ("canonical", "spellings"),
    [
        ("right kidney", "rightkidney, Right kidney (RK)"),
        (
            "right kidney",
            "kidney_right, R kidney, Right-Kidney, rk, RKid, kidneyRight, RKidney, kidney (R), rt kidney",
        ),
        ("left kidney", "left kidney, KIDNEY_L, leftKidney, LK, lkid, L. kidney, lkidney, left kidney (LK)"),
        ("inferior vena cava", "IVC, postcava, Inferior Vena Cava, inferior_vena_cava, ivc, Postcava (IVC)"),
        ("right adrenal gland", "RAG, right adrenal gland, adrenal_gland_right, R adrenal, right-adrenal, rad"),
        ("aorta", "arota, Aorta"),
        ("gallbladder", "gall bladder, gall_bladder, Gallbladder, GB, gall"),
        ("esophagus", "oesophagus, Oesophagus, eso"),
        (
            "portal and splenic veins",
            "portal vein and splenic vein, portal_vein_and_splenic_vein, veins, portal_splenic_v, "
            "portal vein & splenic vein",
        ),
        ("lesion", "tumor, Tumour, lesions"),
        ("bladder", "urinary_bladder"),
        ("rectus abdominis", "Rectus_Abdominis"),
        ("l", "L"),
        ("kidneys", "kidneys"),
        ("liver lesion", "liver (lesion)"),
    ],
)
def test_spellings_have_one_name(canonical: str, spellings: str) -> None:
    assert {canonical_name(spelling) for spelling in spellings.split(", ")} == {canonical}


def test_canonical_names_are_their_own() -> None:
    for name in (*FLARE_TOLERANCES_MM, *BTCV_ORGANS, "lesion"):
        assert canonical_name(name) == name


@pytest.mark.parametrize(
    ("names", "others", "shared"),
    [
        (BTCV, FLARE, 12),
        (BTCV, AMOS, 12),
        (FLARE, AMOS, 13),
        (TOTALSEGMENTATOR, FLARE, 13),
        (BTCV, TOTALSEGMENTATOR, 13),
    ],
)
def test_public_data_sets_share_their_organs(names: tuple[str, ...], others: tuple[str, ...], shared: int) -> None:
    pairs = match_names(names, others)
    assert len(pairs) == shared
    assert match_names(others, names) == {theirs: name for name, theirs in pairs.items()}
    for name, theirs in pairs.items():
        assert canonical_name(name) == canonical_name(theirs)


def test_equal_names_come_first_and_doubtful_ones_are_left_out() -> None:
    assert match_names(["lesion", "tumor"], ["tumor", "liver"]) == {"tumor": "tumor"}
    assert match_names(["cyst", "lesion"], ["tumor", "tumour"]) == {}
    assert match_names(["L", "R"], ["l", "kidney"]) == {"L": "l"}
    assert match_names(["adrenal_glands"], ["adrenal"]) == {"adrenal_glands": "adrenal"}, "WORD's, ours and its own"


def test_a_spelling_belongs_to_one_structure() -> None:
    spellings = [spelling for name, others in SPELLINGS.items() for spelling in (name, *others)]
    assert len(spellings) == len(set(spellings))


def test_btcv_scores_predictions_with_flare22s_numbers() -> None:
    matching = match_structures(numbered(BTCV), numbered(FLARE), PLAIN)
    values = {structure.name: (structure.reference, structure.prediction) for structure in matching.structures}
    assert len(values) == 12
    assert values["right kidney"] == ((2,), (2,))
    assert values["left kidney"] == ((3,), (13,))
    assert values["inferior vena cava"] == ((9,), (6,))
    assert matching.unmatched_reference == ("portal vein and splenic vein",)
    assert matching.unmatched_prediction == ("Duodenum",)
    assert matching.missing == ()


def test_protocols_choose_by_name() -> None:
    eight = match_structures(numbered(BTCV), None, find_protocol("synapse8"))
    assert [structure.reference[0] for structure in eight.structures] == [8, 4, 3, 2, 6, 11, 1, 7]  # TransUNet's order
    assert len(eight.unmatched_reference) == 5
    flare = match_structures(numbered(BTCV), None, find_protocol("flare22"))
    assert flare.missing == ("duodenum",)
    assert {structure.name: structure.tolerance_mm for structure in flare.structures} == {
        name: mm for name, mm in FLARE_TOLERANCES_MM.items() if name != "duodenum"
    }
    assert len(match_structures(numbered(AMOS), None, find_protocol("flare22")).structures) == 13


def test_nothing_in_common_is_refused_with_both_lists() -> None:
    with pytest.raises(
        BadInputError, match=r"No structure is matched.*the reference has heart.*the prediction has brain"
    ):
        match_structures({"heart": 1}, {"brain": 1}, PLAIN)
    with pytest.raises(BadInputError, match="the protocol has spleen"):
        match_structures({"heart": 1}, None, find_protocol("btcv"))


def test_tolerances_by_name() -> None:
    assert parse_tolerances(["2", "R kidney=3.5", "liver = 5"]) == (2.0, {"R kidney": 3.5, "liver": 5.0})
    matching = match_structures(numbered(BTCV), None, PLAIN, 2.0, {"R kidney": 3.5})
    tolerances = {structure.name: structure.tolerance_mm for structure in matching.structures}
    assert (tolerances["right kidney"], tolerances["left kidney"]) == (3.5, 2.0)
    assert match_structures({"liver": 1}, None, PLAIN).structures[0].tolerance_mm == 1.0


@pytest.mark.parametrize("text", ["liver", "liver=", "=", "2mm"])
def test_what_is_no_tolerance_is_named(text: str) -> None:
    with pytest.raises(BadInputError, match="no tolerance"):
        parse_tolerances([text])


def test_wrong_tolerances_are_refused() -> None:
    with pytest.raises(BadInputError, match="Two tolerances"):
        parse_tolerances(["1", "2"])
    with pytest.raises(BadInputError, match=r"heart, which is not scored. Scored: liver"):
        match_structures({"liver": 1}, None, PLAIN, None, {"heart": 2.0})
    for arguments in ((-1.0, {}), (None, {"liver": -2.0}), (float("nan"), {})):
        with pytest.raises(BadInputError, match="mm is below 0"):
            match_structures({"liver": 1}, None, PLAIN, *arguments)
    for arguments in ((1.0, {}), (None, {"liver": 2.0})):
        with pytest.raises(BadInputError, match="fixes the tolerances"):
            match_structures({"liver": 1}, None, find_protocol("flare22"), *arguments)


def test_protocols_are_found_by_name_and_revision() -> None:
    assert find_protocol("flare22") == find_protocol("flare22", "2024") != find_protocol("flare22", "2022")
    with pytest.raises(BadInputError, match="Choose one of: plain, flare22, flare23, flare-clean, btcv, synapse8"):
        find_protocol("flare21")
    with pytest.raises(BadInputError, match=r"no revision '2023'. Choose one of: 2024, 2022"):
        find_protocol("flare22", "2023")
    with pytest.raises(BadInputError, match="Leave the revision out"):
        find_protocol("btcv", "2024")


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_every_protocol_states_its_rules(protocol) -> None:
    plain = protocol.as_plain()
    assert plain["rules"][0] == protocol.absent_structure_rules()
    assert "empty in both" in plain["rules"][0]
    assert "mpty in exactly one: DSC = IoU = NSD = 0" in plain["rules"][0]
    assert set(protocol.slices.structures) <= set(protocol.structures)
    assert not protocol.tolerances_mm or set(protocol.tolerances_mm) == set(protocol.structures)
    assert len(protocol.official_names) in (0, len(protocol.structures))
