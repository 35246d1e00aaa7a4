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
TOPCOW = "background,BA,R-PCA,L-PCA,R-ICA,R-MCA,L-ICA,L-MCA,R-Pcom,L-Pcom,Acom,R-ACA,L-ACA,3rd-A2"
HAN_SEG = """background,A_Carotid_L,A_Carotid_R,Arytenoid,Bone_Mandible,Brainstem,BuccalMucosa,Cavity_Oral,Cochlea_L,
Cochlea_R,Cricopharyngeus,Esophagus_S,Eye_AL,Eye_AR,Eye_PL,Eye_PR,Larynx_SG,Lips,Parotid_L,Parotid_R,Pituitary,
SpinalCord"""
TG_263 = "background,Lung_L,Lung_R,Lung_LUL,Lung_LLL,Lung_RUL,Lung_RML,Lung_RLL,Lungs"
# the heart's chambers: their walls tell them apart wherever they lie, but they are named by side, and taken for pairs
MM_WHS = "background,left ventricle,right ventricle,left atrium,right atrium,myocardium,aorta,pulmonary artery"
STRUCTSEG_HEAD = (
    "Brain Stem,Eye L,Eye R,Lens L,Lens R,Opt Chiasma,Pituitary,TMJ L,TMJ R,Mid Ear L,Mid Ear R,Spinal Cord"
)

# TotalSegmentator's class maps of version 1 (104 classes) and 2 (117): names with both sides, and the others
TOTALSEGMENTATOR_COMMON = """kidney,adrenal_gland,lung_upper_lobe,lung_lower_lobe,iliac_artery,iliac_vena,humerus,
scapula,clavicula,femur,hip,gluteus_maximus,gluteus_medius,gluteus_minimus,autochthon,iliopsoas"""
TOTALSEGMENTATOR = {
    104: (
        f"{TOTALSEGMENTATOR_COMMON},heart_atrium,heart_ventricle",
        """spleen,gallbladder,liver,stomach,aorta,inferior_vena_cava,portal_vein_and_splenic_vein,pancreas,
        lung_middle_lobe_right,esophagus,trachea,heart_myocardium,pulmonary_artery,brain,small_bowel,duodenum,colon,
        sacrum,face,urinary_bladder""",
    ),
    117: (
        f"""{TOTALSEGMENTATOR_COMMON},kidney_cyst,subclavian_artery,common_carotid_artery,brachiocephalic_vein""",
        """spleen,gallbladder,liver,stomach,pancreas,lung_middle_lobe_right,esophagus,trachea,thyroid_gland,small_bowel,
        duodenum,colon,urinary_bladder,prostate,sacrum,vertebrae_S1,heart,aorta,pulmonary_vein,brachiocephalic_trunk,
        atrial_appendage_left,superior_vena_cava,inferior_vena_cava,portal_vein_and_splenic_vein,spinal_cord,brain,
        skull,sternum,costal_cartilages""",
    ),
}
VERTEBRAE = [f"vertebrae_{part}{n}" for part, count in (("L", 5), ("T", 12), ("C", 7)) for n in range(count, 0, -1)]


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
        (TOPCOW, [(f"L-{part}", f"R-{part}") for part in ("PCA", "ICA", "MCA", "Pcom", "ACA")]),
        (HAN_SEG, [(f"{part}L", f"{part}R") for part in ("A_Carotid_", "Cochlea_", "Eye_A", "Eye_P", "Parotid_")]),
        (TG_263, [("Lung_L", "Lung_R"), ("Lung_LUL", "Lung_RUL"), ("Lung_LLL", "Lung_RLL")]),
        (MM_WHS, [("left ventricle", "right ventricle"), ("left atrium", "right atrium")]),
        (STRUCTSEG_HEAD, [(f"{part} L", f"{part} R") for part in ("Eye", "Lens", "TMJ", "Mid Ear")]),
        ("background,left,right", [("left", "right")]),
        ("background,L,R", [("L", "R")]),
    ],
)
def test_public_label_maps(labels: str, pairs: list[tuple[str, str]]) -> None:
    assert paired_structures(split(labels)) == pairs


@pytest.mark.parametrize(("classes", "pairs"), [(104, 30), (117, 32)])
def test_totalsegmentator(classes: int, pairs: int) -> None:
    both, alone = (split(names) for names in TOTALSEGMENTATOR[classes])
    expected = {(f"{name}_left", f"{name}_right") for name in both}
    expected |= {(f"rib_left_{number}", f"rib_right_{number}") for number in range(1, 13)}
    names = [*alone, *VERTEBRAE, *itertools.chain(*sorted(expected))]
    assert (len(set(names)), len(expected)) == (classes, pairs)
    found = paired_structures(["background", *names])
    assert set(found) == expected
    assert len(found) == pairs


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
        ("L5", "R5"),
        ("hip_left", "hip_right"),
        ("kidneyl", "kidneyr"),
        ("kidneylt", "kidneyrt"),
        ("ltkidney", "rtkidney"),
        ("LtKidney", "RtKidney"),
        ("LV", "RV"),
        ("UL1", "UR1"),
        ("4L", "4R"),
        ("brachium sinistrum", "brachium dextrum"),
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
        ["lung_upper_lobe_left", "lung_middle_lobe_right", "lung_lower_lobe_right"],
        ["vertebrae_L1", "rib_R1"],
        ["vertebrae_L5", "vertebrae_S1", "R5"],
        ["L1", "R2", "L3"],
        ["LVC", "RV", "MLV"],
        ["hip_left", "hip", "femur_right"],
        ["renal vessel", "renal cortex", "ureter", "ulna", "radius", "lateral", "molar"],
        ["left_right_ventricle", "right_left_ventricle"],
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


def structure_at(position_from_right: int) -> sitk.Image:
    """A structure in an image of LPS orientation, whose x axis leads to the patient's left."""
    array = np.zeros((5, 6, 7), np.uint8)
    array[1:3, 2:4, position_from_right : position_from_right + 2] = 1
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.7, 1.3, 2.5))
    return image


ORIENTATIONS = [
    "".join(letters) for axes in itertools.permutations(("LR", "PA", "SI")) for letters in itertools.product(*axes)
]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(ORIENTATIONS),
    st.permutations(range(3)),
    st.tuples(*[st.floats(-12, 12)] * 3),
)
def test_structures_move_along_the_excluded_axis_alone(
    orientation: str, transpose_forward: list[int], tilt: tuple
) -> None:
    """SimpleITK stores the image in any of the 48 orientations; in nnU-Net's array the structure moves to the left."""
    centres, directions = [], {}
    for case, position in (("a", 1), ("b", 4)):
        image = sitk.DICOMOrient(structure_at(position), orientation)
        stored = np.array(image.GetDirection()).reshape(3, 3)
        image.SetDirection((Rotation.from_euler("xyz", tilt, degrees=True).as_matrix() @ stored).ravel().tolist())
        assert sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection()) == orientation
        directions[case] = image.GetDirection()
        array = sitk.GetArrayFromImage(image).transpose(transpose_forward)  # as nnU-Net's reader and preprocessor
        centres.append(np.argwhere(array).mean(axis=0))
    moved = tuple(int(axis) for axis in np.flatnonzero(centres[1] - centres[0]))
    decision = decide_mirroring(KIDNEYS, directions, transpose_forward)
    assert (decision.left_right_axis,) == moved
    assert decision.allowed_axes == tuple(axis for axis in range(3) if axis not in moved)
    # a 2D patch lacks axis 0; what is left of the excluded axis must not be among its mirrored ones
    planes = [axis + 1 for axis in to_2d(decision.allowed_axes)]
    assert planes == [axis for axis in (1, 2) if axis not in moved]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(ORIENTATIONS), min_size=1, max_size=6), st.permutations(range(3)))
def test_cases_stored_in_any_orientations(orientations: list[str], transpose_forward: list[int]) -> None:
    """Axes are mirrored only if left-right is the same axis of all cases; the cases that differ are named."""
    directions = {
        f"case{number}": sitk.DICOMOrientImageFilter.GetDirectionCosinesFromOrientation(orientation)
        for number, orientation in enumerate(orientations)
    }
    places = [2 - next(i for i, letter in enumerate(code) if letter in "LR") for code in orientations]
    decision = decide_mirroring(KIDNEYS, directions, transpose_forward)
    if len(set(places)) == 1:
        assert decision.allowed_axes == tuple(a for a in range(3) if transpose_forward[a] != places[0])
        return
    assert decision.allowed_axes == to_2d(decision.allowed_axes) == ()
    assert decision.left_right_axis is None
    assert decision.warning is not None
    most = max(places.count(place) for place in places)
    common = [place for place in set(places) if places.count(place) == most]
    named = {case for case in directions if case in decision.warning}
    assert named in [{f"case{n}" for n, place in enumerate(places) if place != usual} for usual in common]


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
    assert decision.reason == "no label exists for both sides of the body"


@pytest.mark.parametrize("name", ["left_atrium", "right_hemisphere", "lung_middle_lobe_right", "Lt. kidney"])
def test_one_side_alone_is_no_pair_and_is_named(name: str) -> None:
    decision = decide_mirroring(iter(["background", "liver", name]), {"a": IDENTITY}, (0, 1, 2))
    assert decision.allowed_axes == (0, 1, 2)
    assert decision.reason.endswith(f"(one side alone: {name})")


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
