"""How structures are scored, by name: official rules, the literature's, and ours.

Sources: FLARE22 and FLARE23: JunMa11/FLARE, FLARE22/Evaluation/FLARE22_DSC_NSD_Eval.py (2022-06-21 and 2024-03-29) and
FLARE23/FLARE23_DSC_NSD_Eval.py (2024-03-18); BTCV: Synapse syn3193805; the eight organs: TransUNet, arXiv:2102.04306.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.evaluation.metrics import ABSENT_STRUCTURE_RULES

FLARE_TOLERANCES_MM = {
    "liver": 5.0,
    "right kidney": 3.0,
    "spleen": 3.0,
    "pancreas": 5.0,
    "aorta": 2.0,
    "inferior vena cava": 2.0,
    "right adrenal gland": 2.0,
    "left adrenal gland": 2.0,
    "gallbladder": 2.0,
    "esophagus": 3.0,
    "stomach": 5.0,
    "duodenum": 7.0,
    "left kidney": 3.0,
}
FLARE_TUBES = ("aorta", "inferior vena cava", "esophagus")
FLARE_NAMES = (
    *("Liver", "RK", "Spleen", "Pancreas", "Aorta", "IVC", "RAG", "LAG"),
    *("Gallbladder", "Esophagus", "Stomach", "Duodenum", "LK"),
)
BTCV_ORGANS = (
    *("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta"),
    *("inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland"),
)
SYNAPSE_ORGANS = (*("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach"),)


@dataclass(frozen=True)
class SliceRule:
    """Structures that are scored within the slices of their reference only.

    Attributes:
        structures: canonical names.
        drops_last: whether the reference's last slice is left out, so that one slice alone leaves nothing to score.
    """

    structures: tuple[str, ...]
    drops_last: bool


@dataclass(frozen=True)
class Protocol:
    """What is scored, and how.

    Attributes:
        name: as the command takes it.
        summary: one sentence.
        structures: canonical names of what is scored, in order; empty: every structure that the labels name.
        tolerances_mm: NSD's tolerance by canonical name; empty: the user's.
        revision: of the official script; None where there is but one.
        both_empty: "perfect": DSC = IoU = NSD = 1; "left out": undefined, and so in no mean.
        slices: structures scored within some slices only, along the last axis of the file (nibabel's axis 2, the first
            of SimpleITK's arrays).
        least_dsc_for_nsd: below this DSC, NSD is 0.
        crashes_on_empty_crop: the official script ends there with an error; its scores are undefined, and reported.
        empty_prediction_first: a structure missed altogether scores 0 before any slice is cut.
        digits: decimals to which DSC and NSD of each case are rounded; None: not at all.
        cast: type to which label values are cut before they are compared, with whatever wraps around; None: values
            must be whole and known.
        same_grid: whether spacing, origin and direction must agree; otherwise the size alone must.
        file_axes: surfaces are made along (x, y, z), as nibabel gives arrays, not (z, y, x); the two differ in the
            area of surface elements whose shape is ambiguous.
        official_names: the official column of each structure; empty: there is no official table.
        organ_mean_without: structures left out of Organ_DSC and Organ_NSD; None: there are no such means.
    """

    name: str
    summary: str
    structures: tuple[str, ...] = ()
    tolerances_mm: Mapping[str, float] = field(default_factory=dict)
    revision: str | None = None
    both_empty: Literal["perfect", "left out"] = "perfect"
    slices: SliceRule = SliceRule((), drops_last=False)
    least_dsc_for_nsd: float = 0.0
    crashes_on_empty_crop: bool = False
    empty_prediction_first: bool = True
    digits: int | None = None
    cast: Literal["uint8", "int8"] | None = None
    same_grid: bool = True
    file_axes: bool = False
    official_names: tuple[str, ...] = ()
    organ_mean_without: tuple[str, ...] | None = None

    def absent_structure_rules(self) -> str:
        """What becomes of structures that are empty in the reference or the prediction."""
        if self.both_empty == "perfect":
            return ABSENT_STRUCTURE_RULES
        one = ABSENT_STRUCTURE_RULES.split(". ", 1)[1]
        return f"Structure empty in both reference and prediction: undefined, left out of all means and counted. {one}"

    def rules(self) -> tuple[str, ...]:
        """Everything in which this differs from scoring plain masks, one sentence each."""
        rules = [self.absent_structure_rules()]
        if self.slices.structures:
            last = ", the last one left out" if self.slices.drops_last else ", all of them"
            rules.append(
                f"{', '.join(self.slices.structures)}: every score but the volumes within the reference's slices along "
                f"the file's third axis{last}; emptiness is tested on the whole volume first."
            )
        if self.crashes_on_empty_crop:
            rules.append(
                "A reference of exactly one slice leaves no voxel: the official script ends with an error there; here "
                "the scores are undefined, left out of all means and reported."
            )
        if not self.empty_prediction_first:
            rules.append("This revision does not test for an empty prediction before it cuts the slices.")
        if self.least_dsc_for_nsd > 0:
            rules.append(f"DSC below {self.least_dsc_for_nsd:g}: NSD = 0.")
        if self.digits is not None:
            rules.append(f"DSC and NSD of each case are rounded to {self.digits} decimals.")
        if self.cast is not None:
            rules.append(f"Label values are cast to {self.cast}; values that are no structure's count as background.")
        if not self.same_grid:
            rules.append("Sizes must be equal; the spacing is the reference's, origin and direction are not compared.")
        if self.official_names:
            rules.append("IoU, HD95, ASSD and volumes are not part of the official rules.")
        return tuple(rules)

    def as_plain(self) -> dict[str, Any]:
        """All settings and the rules in words, as JSON has them, for a report."""
        return json.loads(json.dumps({**asdict(self), "rules": self.rules()}))


PLAIN = Protocol("plain", "Every structure that the labels name, over the whole volume, at one tolerance.")
_FLARE22 = Protocol(
    "flare22",
    "The 13 organs of FLARE22 as its official script scores them.",
    structures=tuple(FLARE_TOLERANCES_MM),
    tolerances_mm=FLARE_TOLERANCES_MM,
    revision="2024",
    slices=SliceRule(FLARE_TUBES, drops_last=True),
    least_dsc_for_nsd=0.2,
    crashes_on_empty_crop=True,
    digits=4,
    cast="uint8",
    same_grid=False,
    file_axes=True,
    official_names=FLARE_NAMES,
)
_FLARE23 = replace(
    _FLARE22,
    name="flare23",
    summary="The 13 organs and the lesion of FLARE23 as its official script scores them.",
    structures=(*FLARE_TOLERANCES_MM, "lesion"),
    tolerances_mm={**FLARE_TOLERANCES_MM, "lesion": 2.0},
    revision=None,
    cast="int8",
    official_names=(*FLARE_NAMES, "Lesion"),
    organ_mean_without=("lesion",),
)
_REVISIONS = {
    "flare22": {
        "2024": _FLARE22,
        "2022": replace(_FLARE22, revision="2022", least_dsc_for_nsd=0.0, empty_prediction_first=False),
    }
}
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        PLAIN,
        _FLARE22,
        _FLARE23,
        Protocol(
            "flare-clean",
            "FLARE22's organs, tolerances and slices without its quirks: the last slice counts, NSD is always "
            "computed, nothing is rounded or cast. A proposal of this project.",
            structures=tuple(FLARE_TOLERANCES_MM),
            tolerances_mm=FLARE_TOLERANCES_MM,
            slices=SliceRule(FLARE_TUBES, drops_last=False),
        ),
        Protocol(
            "btcv",
            "The 13 organs of BTCV; an organ that is in neither map is left out, as nnU-Net does.",
            structures=BTCV_ORGANS,
            both_empty="left out",
        ),
        Protocol(
            "synapse8",
            "The 8 organs that TransUNet and its successors report on BTCV ('Synapse'), per case in 3D; an organ that "
            "is in neither map is left out, a distance to nothing is undefined (never 0 or 1 mm, as in some scripts).",
            structures=SYNAPSE_ORGANS,
            both_empty="left out",
        ),
    )
}


def find_protocol(name: str, revision: str | None = None) -> Protocol:
    """The protocol of a name.

    Raises:
        BadInputError: there is no such protocol, or no such revision of it; the message lists those there are.
    """
    if name not in PROTOCOLS:
        raise BadInputError(f"There is no protocol '{name}'.", f"Choose one of: {', '.join(PROTOCOLS)}.")
    if revision is None:
        return PROTOCOLS[name]
    revisions = _REVISIONS.get(name, {})
    if revision not in revisions:
        mend = f"Choose one of: {', '.join(revisions)}." if revisions else "Leave the revision out."
        raise BadInputError(f"The protocol '{name}' has no revision '{revision}'.", mend)
    return revisions[revision]
