"""Left and right in label names and in direction cosines."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from diffseg_nnunet.planning.mirroring import decide_mirroring, left_right_axis, paired_structures, to_2d

IDENTITY = (1.0, 0, 0, 0, 1, 0, 0, 0, 1)
# image axis y runs left-right
SWAPPED = (0.0, 1, 0, 1, 0, 0, 0, 0, 1)
KIDNEYS = ["background", "left_kidney", "right_kidney"]

BTCV = """background,spleen,right kidney,left kidney,gallbladder,esophagus,liver,stomach,aorta,inferior vena cava,
portal vein and splenic vein,pancreas,right adrenal gland,left adrenal gland"""
BTCV_SHORT = "background,spleen,rkid,lkid,gall,eso,liver,sto,aorta,IVC,veins,pancreas,rad,lad"
FLARE22 = """background,Liver,Right kidney,Spleen,Pancreas,Aorta,Inferior Vena Cava (IVC),Right Adrenal Gland (RAG),
Left Adrenal Gland (LAG),Gallbladder,Esophagus,Stomach,Duodenum,Left kidney"""
FLARE22_SHORT = "background,liver,RK,spleen,pancreas,aorta,IVC,RAG,LAG,gallbladder,esophagus,stomach,duodenum,LK"
AMOS22 = """background,spleen,right kidney,left kidney,gall bladder,esophagus,liver,stomach,arota,postcava,pancreas,
right adrenal gland,left adrenal gland,duodenum,bladder,prostate/uterus"""
WORD = """background,liver,spleen,left_kidney,right_kidney,stomach,gallbladder,esophagus,pancreas,duodenum,colon,
intestine,adrenal,rectum,bladder,Head_of_femur_L,Head_of_femur_R"""
STRUCTSEG_HEAD = (
    "Brain Stem,Eye L,Eye R,Lens L,Lens R,Opt Chiasma,Pituitary,TMJ L,TMJ R,Mid Ear L,Mid Ear R,Spinal Cord"
)

TOTALSEGMENTATOR_BOTH = """kidney,adrenal_gland,lung_upper_lobe,lung_lower_lobe,iliac_artery,iliac_vena,
brachiocephalic_vein,subclavian_artery,common_carotid_artery,humerus,scapula,clavicula,femur,hip,gluteus_maximus,
gluteus_medius,gluteus_minimus,autochthon,iliopsoas,kidney_cyst"""
TOTALSEGMENTATOR_ALONE = """background,spleen,gallbladder,liver,stomach,pancreas,lung_middle_lobe_right,esophagus,
trachea,thyroid_gland,small_bowel,duodenum,colon,urinary_bladder,prostate,sacrum,vertebrae_S1,vertebrae_L5,vertebrae_L4,
vertebrae_L3,vertebrae_L2,vertebrae_L1,vertebrae_T12,vertebrae_T1,vertebrae_C7,vertebrae_C1,heart,aorta,pulmonary_vein,
brachiocephalic_trunk,atrial_appendage_left,superior_vena_cava,inferior_vena_cava,portal_vein_and_splenic_vein,
spinal_cord,brain,skull,sternum,costal_cartilages"""


def split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


@pytest.mark.parametrize(
    ("labels", "pairs"),
    [
        (BTCV, [("left kidney", "right kidney"), ("left adrenal gland", "right adrenal gland")]),
        (BTCV_SHORT, [("lkid", "rkid"), ("lad", "rad")]),
        (
            FLARE22,
            [("Left kidney", "Right kidney"), ("Left Adrenal Gland (LAG)", "Right Adrenal Gland (RAG)")],
        ),
        (FLARE22_SHORT, [("LK", "RK"), ("LAG", "RAG")]),
        (AMOS22, [("left kidney", "right kidney"), ("left adrenal gland", "right adrenal gland")]),
        (WORD, [("left_kidney", "right_kidney"), ("Head_of_femur_L", "Head_of_femur_R")]),
        (STRUCTSEG_HEAD, [(f"{part} L", f"{part} R") for part in ("Eye", "Lens", "TMJ", "Mid Ear")]),
        ("background,left,right", [("left", "right")]),
        ("background,L,R", [("L", "R")]),
    ],
)
def test_public_label_maps(labels: str, pairs: list[tuple[str, str]]) -> None:
    assert paired_structures(split(labels)) == pairs


def test_totalsegmentator() -> None:
    both = split(TOTALSEGMENTATOR_BOTH)
    names = [f"{name}_{side}" for name in both for side in ("left", "right")] + split(TOTALSEGMENTATOR_ALONE)
    names += [f"rib_{side}_{number}" for side in ("left", "right") for number in range(1, 13)]
    expected = {(f"{name}_left", f"{name}_right") for name in both}
    expected |= {(f"rib_left_{number}", f"rib_right_{number}") for number in range(1, 13)}
    assert set(paired_structures(names)) == expected


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("left_kidney", "right_kidney"),
        ("kidney_left", "kidney_right"),
        ("Left Kidney", "Right Kidney"),
        ("LEFT_KIDNEY", "RIGHT_KIDNEY"),
        ("kidney-left", "kidney-right"),
        ("leftKidney", "rightKidney"),
        ("KidneyLeft", "KidneyRight"),
        ("leftkidney", "rightkidney"),
        ("kidney_l", "kidney_r"),
        ("l_kidney", "r_kidney"),
        ("L kidney", "R kidney"),
        ("kidney_L", "kidney_R"),
        ("KidneyL", "KidneyR"),
        ("LKidney", "RKidney"),
        ("lkidney", "rkidney"),
        ("kidney lt", "kidney rt"),
        ("Lt. kidney", "Rt. kidney"),
        ("ren sinister", "ren dexter"),
        ("ren_sin", "ren_dex"),
        ("ren_sin", "ren_dext"),
        ("arteria renalis sinistra", "arteria renalis dextra"),
        ("ctx-lh-cuneus", "ctx-rh-cuneus"),
        ("Left-Lateral-Ventricle", "Right-Lateral-Ventricle"),
        ("lung_upper_lobe_left", "lung_upper_lobe_right"),
        ("left_L1_root", "right_L1_root"),
        ("left LN level 2", "right LN level 2"),
        ("rib_L1", "rib_R1"),
        ("left kidney", "kidney_R"),
    ],
)
def test_spellings(left: str, right: str) -> None:
    assert paired_structures(["background", right, "liver", left]) == [(left, right)]


@pytest.mark.parametrize(
    "names",
    [
        ["left_atrium", "myocardium"],
        ["right_hemisphere", "cerebellum"],
        ["left_atrium", "right_ventricle"],
        ["left_rib_1", "right_rib_2"],
        ["lung_left_upper_lobe", "lung_right_lower_lobe"],
        ["vertebrae_L1", "vertebrae_L2", "vertebrae_T1"],
        ["liver", "rectum", "lung", "rib", "lens", "retina"],
        ["sinus", "dextrose"],
        ["left_right_commissure", "commissure"],
        ["bright tissue", "cleft"],
        ["kidney", "left_kidney"],
        ["left_kidney", "left kidney"],
        ["tumour", "edema"],
        ["", "_", "1", "2"],
        [],
    ],
)
def test_traps(names: list[str]) -> None:
    assert paired_structures(names) == []


def test_a_name_is_in_one_pair_at_most() -> None:
    pairs = paired_structures(["left kidney", "kidney_left", "right kidney", "kidney_right", "r kidney"])
    names = [name for pair in pairs for name in pair]
    assert len(pairs) == 2
    assert len(set(names)) == len(names)


def image_with(direction: np.ndarray) -> sitk.Image:
    image = sitk.Image(4, 5, 6, sitk.sitkUInt8)
    image.SetSpacing((0.7, 1.3, 2.5))
    image.SetOrigin((-30.0, 12.0, 400.0))
    image.SetDirection(direction.ravel().tolist())
    return image


def steps_along_left(image: sitk.Image) -> list[float]:
    """How far, in units of the spacing, one step along each ARRAY axis leads to the left; from SimpleITK itself."""
    origin = np.array(image.TransformIndexToPhysicalPoint((0, 0, 0)))
    steps = []
    for axis in range(3):
        index = [0, 0, 0]
        index[2 - axis] = 1
        step = np.array(image.TransformIndexToPhysicalPoint(index)) - origin
        steps.append(step[0] / image.GetSpacing()[2 - axis])
    return steps


@settings(deadline=None)
@given(
    st.permutations(range(3)),
    st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3),
    st.tuples(*[st.floats(-20, 20)] * 3),
)
def test_left_right_axis_as_simpleitk_sees_it(order: list[int], flips: tuple, tilt: tuple) -> None:
    """All orders and directions in which an image can be stored, and a tilt on top."""
    direction = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix() @ (np.eye(3)[:, order] * np.array(flips))
    image = image_with(direction)
    assert left_right_axis(image.GetDirection()) == int(np.argmax(np.abs(steps_along_left(image))))


@pytest.mark.parametrize(
    "direction", [(), (1.0, 0, 0, 1), [float("nan")] * 9, [0.0] * 9, tuple(np.eye(4).ravel()), (1.0,) * 8]
)
def test_left_right_axis_of_something_else(direction: tuple) -> None:
    assert left_right_axis(direction) is None


def test_nothing_is_paired() -> None:
    decision = decide_mirroring(["background", "liver"], {"a": IDENTITY, "b": SWAPPED}, (0, 1, 2))
    assert decision.allowed_axes == (0, 1, 2)
    assert decision.warning is None


@pytest.mark.parametrize("transpose_forward", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("direction", [IDENTITY, SWAPPED])
def test_the_left_right_axis_is_excluded_wherever_it_was_transposed(
    transpose_forward: tuple[int, ...], direction: tuple[float, ...]
) -> None:
    """Followed by an array that knows where left is: the value rises along left-right only."""
    along_left = np.broadcast_to(
        np.arange(3).reshape([-1 if a == left_right_axis(direction) else 1 for a in range(3)]), (3,) * 3
    )
    transposed = along_left.transpose(transpose_forward)  # as nnU-Net's preprocessor does
    rising = [axis for axis in range(3) if np.diff(transposed, axis=axis).any()]
    decision = decide_mirroring(KIDNEYS, {"a": direction, "b": direction}, transpose_forward)
    assert [decision.left_right_axis] == rising
    assert decision.allowed_axes == tuple(axis for axis in range(3) if axis not in rising)
    assert decision.pairs == [("left_kidney", "right_kidney")]
    assert "left_kidney / right_kidney" in decision.reason
    assert decision.warning is None


def test_cases_that_disagree() -> None:
    directions = {f"case_{n:02d}": SWAPPED if n < 7 else IDENTITY for n in range(20)}
    decision = decide_mirroring(KIDNEYS, directions, (0, 1, 2))
    assert decision.allowed_axes == ()
    assert decision.left_right_axis is None
    assert decision.warning is not None
    assert "case_00, case_01, case_02, case_03, case_04 and 2 more" in decision.warning
    assert "case_07" not in decision.warning


def test_cases_that_point_the_other_way() -> None:
    opposite = (-1.0, 0, 0, 0, -1, 0, 0, 0, 1)
    decision = decide_mirroring(KIDNEYS, {"a": IDENTITY, "b": opposite, "c": IDENTITY}, (0, 1, 2))
    assert decision.allowed_axes == (0, 1)
    assert decision.warning is not None
    assert decision.warning.endswith("most: b.")


@pytest.mark.parametrize("directions", [{}, {"a": None}, {"a": None, "b": None}, {"a": (1.0, 0, 0, 1)}])
def test_unknown_directions(directions: dict) -> None:
    decision = decide_mirroring(KIDNEYS, directions, (0, 1, 2))
    assert decision.allowed_axes == ()
    assert "do not say" in decision.reason
    assert decision.warning is None


def test_directions_known_of_some_cases_only() -> None:
    decision = decide_mirroring(KIDNEYS, {"a": IDENTITY, "b": None}, (0, 1, 2))
    assert decision.allowed_axes == ()
    assert decision.warning is not None
    assert decision.warning.endswith("not: b.")


@pytest.mark.parametrize(
    ("axes", "expected"), [((0, 1, 2), (0, 1)), ((0, 1), (0,)), ((1, 2), (0, 1)), ((0, 2), (1,)), ((0,), ()), ((), ())]
)
def test_to_2d(axes: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert to_2d(axes) == expected
