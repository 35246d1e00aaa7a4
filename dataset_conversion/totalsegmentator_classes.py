"""TotalSegmentator's classes by release and group, in the order of their published values.

Source: wasserth/TotalSegmentator, totalsegmentator/map_to_binary.py ("total_v1", "total", "total_mr" and the maps of
the models' parts). The groups are what each of the five models, of v1 and of v2, was trained on.
"""

from __future__ import annotations

from collections.abc import Iterable

GROUPS = ("organs", "vertebrae", "cardiac", "muscles", "ribs")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _spine(first: str) -> tuple[str, ...]:
    return tuple(f"vertebrae_{name}" for name in _names(f"{first} L5 L4 L3 L2 L1")) + tuple(
        f"vertebrae_{part}{number}" for part, count in (("T", 12), ("C", 7)) for number in range(count, 0, -1)
    )


def _both(names: str, sides: str = "left right") -> tuple[str, ...]:
    return tuple(f"{name}_{side}" for name in names.split() for side in sides.split())


_ABDOMEN = _names("spleen kidney_right kidney_left gallbladder liver stomach")
_LUNGS = _names(
    "lung_upper_lobe_left lung_lower_lobe_left lung_upper_lobe_right lung_middle_lobe_right lung_lower_lobe_right"
)
_ADRENALS = _both("adrenal_gland", "right left")
_ILIAC = _both("iliac_artery iliac_vena")
_BONES = _both("humerus scapula clavicula femur hip")
_GLUTEI = _both("gluteus_maximus gluteus_medius gluteus_minimus autochthon iliopsoas")
_RIBS = tuple(f"rib_{side}_{number}" for side in ("left", "right") for number in range(1, 13))

V1 = {
    "organs": (
        *_ABDOMEN,
        *_names("aorta inferior_vena_cava portal_vein_and_splenic_vein pancreas"),
        *_ADRENALS,
        *_LUNGS,
    ),
    "vertebrae": _spine(""),
    "cardiac": (
        *_names("esophagus trachea heart_myocardium heart_atrium_left heart_ventricle_left heart_atrium_right"),
        *_names("heart_ventricle_right pulmonary_artery brain"),
        *_ILIAC,
        *_names("small_bowel duodenum colon urinary_bladder face"),
    ),
    "muscles": (*_BONES, "sacrum", *_GLUTEI),
    "ribs": _RIBS,
}
V2 = {
    "organs": (
        *_ABDOMEN,
        "pancreas",
        *_ADRENALS,
        *_LUNGS,
        *_names("esophagus trachea thyroid_gland small_bowel duodenum colon urinary_bladder prostate"),
        *_both("kidney_cyst"),
    ),
    "vertebrae": ("sacrum", *_spine("S1")),
    "cardiac": (
        *_names("heart aorta pulmonary_vein brachiocephalic_trunk"),
        *_both("subclavian_artery common_carotid_artery", "right left"),
        *_both("brachiocephalic_vein"),
        *_names("atrial_appendage_left superior_vena_cava inferior_vena_cava portal_vein_and_splenic_vein"),
        *_ILIAC,
    ),
    "muscles": (*_BONES, "spinal_cord", *_GLUTEI, "brain", "skull"),
    "ribs": (*_RIBS, "sternum", "costal_cartilages"),
}
MR = {
    "organs": (
        *_ABDOMEN,
        "pancreas",
        *_ADRENALS,
        *_names("lung_left lung_right esophagus small_bowel duodenum colon urinary_bladder prostate"),
        *_names("sacrum vertebrae intervertebral_discs spinal_cord heart aorta inferior_vena_cava"),
        "portal_vein_and_splenic_vein",
        *_ILIAC,
    ),
    "muscles": (*_BONES, *_GLUTEI, "brain"),
}

Release = dict[str, tuple[str, ...]]


def all_classes(release: Release) -> tuple[str, ...]:
    """All classes in the order of their published values."""
    if release is not V1:
        return tuple(name for group in release.values() for name in group)
    *cardiac, bladder, face = V1["cardiac"]
    bones, rest = V1["muscles"][: len(_BONES) + 1], V1["muscles"][len(_BONES) + 1 :]
    return (*V1["organs"], *V1["vertebrae"], *cardiac, *V1["ribs"], *bones, face, *rest, bladder)


def release_of(present: Iterable[str], is_mr: bool) -> tuple[str, Release]:
    """Name and classes of the release that has most of these classes; of equals the newer one."""
    releases = {"MR": MR} if is_mr else {"v2": V2, "v1": V1}
    names = set(present)
    best = max(releases, key=lambda release: len(names & set(all_classes(releases[release]))))
    return best, releases[best]


def unified(name: str) -> str:
    """One spelling over data sets: the side comes first, and the names that other abdominal sets share are theirs."""
    stem, _, side = name.rpartition("_")
    name = f"{side}_{stem}" if side in ("left", "right") else name
    return {"urinary_bladder": "bladder", "portal_vein_and_splenic_vein": "portal_and_splenic_veins"}.get(name, name)
