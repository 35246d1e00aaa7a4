"""Published figures, and when they may stand beside ours: same split, organs, rules and number of labels.

The table holds what is nearest to the protocols, with what is known of its making. What differs, or is not known, is
said: a figure on other test cases, on a resampled grid or with other rules for absent organs is another figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diffseg_nnunet.evaluation.names import canonical_name
from diffseg_nnunet.evaluation.protocols import BTCV_ORGANS, FLARE_TOLERANCES_MM, SYNAPSE_ORGANS

FLARE_ORGANS = tuple(FLARE_TOLERANCES_MM)
_MONAI_GRID = "scored on MONAI's resampled grid (1.5 x 1.5 x 2 mm), not on the scan's"
_MONAI_SSL = "Project-MONAI/tutorials self_supervised_pretraining/vit_unetr_ssl/README.md"
_BLACKBEAN = "doi:10.1007/978-3-031-23911-3_16"
_SWIN = "Project-MONAI/research-contributions SwinUNETR/BTCV/README.md"
_REVISITED = "arXiv:2404.09556; MIC-DKFZ/nnUNet documentation/resenc_presets.md"


@dataclass(frozen=True)
class PublishedFigure:
    """A mean DSC somebody has published.

    Attributes:
        dsc: in percent.
        method: and its pretraining, where it has one.
        converter: format of the data set.
        split: name of the division; None where it is not published.
        evaluation: the protocol of `diffseg evaluate` that has its rules.
        structures: canonical names.
        labelled_cases: that it was trained on; None where it is not published.
        source: where it is published.
        differs: what is known to be otherwise than in our evaluation; empty: nothing.
        remark: what a reader must know beside it.
    """

    dsc: float
    method: str
    converter: str
    split: str | None
    evaluation: str
    structures: tuple[str, ...]
    labelled_cases: int | None
    source: str
    differs: str = ""
    remark: str = ""


def _unetr(labels: int, split: str | None, scratch: float, pretrained: float) -> tuple[PublishedFigure, ...]:
    return tuple(
        PublishedFigure(dsc, f"UNETR, {how}", "btcv", split, "btcv", BTCV_ORGANS, labels, _MONAI_SSL, _MONAI_GRID)
        for dsc, how in ((scratch, "from scratch"), (pretrained, "pretrained on 771 CTs"))
    )


def _five_folds(dsc: float, method: str) -> PublishedFigure:
    return PublishedFigure(
        dsc,
        method,
        "btcv",
        "nnunet-5-fold",
        "btcv",
        BTCV_ORGANS,
        24,
        _REVISITED,
        remark="nnU-Net averages over cases first, then over organs",
    )


def _flare(dsc: float, method: str, source: str) -> PublishedFigure:
    return PublishedFigure(
        dsc, method, "flare22", "tuning", "flare22", FLARE_ORGANS, 50, source, remark="scored by the challenge's server"
    )


PUBLISHED = (
    *_unetr(6, "24/6-6-labels", 63.07, 70.09),
    *_unetr(12, None, 76.06, 79.55),
    *_unetr(24, "24/6", 78.91, 82.30),
    PublishedFigure(
        82.25, "Swin UNETR base, pretrained on 5050 CTs", "btcv", "24/6", "btcv", BTCV_ORGANS, 24, _SWIN, _MONAI_GRID
    ),
    PublishedFigure(79.79, "Swin UNETR small, scratch", "btcv", "24/6", "btcv", BTCV_ORGANS, 24, _SWIN, _MONAI_GRID),
    PublishedFigure(
        84.90,
        "MERIT",
        "btcv",
        "18/12",
        "synapse8",
        SYNAPSE_ORGANS,
        18,
        "arXiv:2303.16892 (second-hand)",
        "TransUNet's script counts an organ that the reference lacks as DSC 1 where it is predicted and as 0 where it "
        "is not (Beckschen/TransUNet utils.py)",
    ),
    _five_folds(83.08, "nnU-Net"),
    _five_folds(83.35, "nnU-Net ResEnc L"),
    _five_folds(85.04, "MedNeXt L k5"),
    PublishedFigure(
        78.0,
        "vox2vec, fine-tuned",
        "btcv",
        "vox2vec-5-fold",
        "btcv",
        BTCV_ORGANS,
        23,
        "mishgon/vox2vec README",
        "scored on a grid of 1 x 1 x 2 mm, not on the scan's",
    ),
    _flare(90.64, "nnU-Net with pseudo-labels of 2000 scans (blackbean, large)", _BLACKBEAN),
    _flare(87.73, "nnU-Net with pseudo-labels of 2000 scans (blackbean, small)", _BLACKBEAN),
    _flare(89.56, "PHTrans, two stages", "arXiv:2207.11512"),
    *(
        PublishedFigure(
            dsc,
            f"2D diffusion pretraining, {labels}",
            "flare22",
            None,
            "flare22",
            FLARE_ORGANS,
            None,
            "arXiv:2402.15216v2",
        )
        for dsc, labels in (
            (51.81, "four labelled slices"),
            (71.56, "1 % of the labels"),
            (78.51, "10 % of the labels"),
        )
    ),
)


@dataclass(frozen=True)
class Conditions:
    """What of a benchmark must be equal.

    Attributes:
        converter: format its data set was converted from.
        split: name of its division.
        complete: whether all folds of that division were run.
        evaluation: name of its protocol.
        structures: canonical names of those scored.
        labelled_cases: of the budgets that were run, where whole cases are labelled.
    """

    converter: str | None
    split: str
    complete: bool
    evaluation: str
    structures: tuple[str, ...]
    labelled_cases: tuple[int, ...]


def why_not(figure: PublishedFigure, conditions: Conditions) -> str | None:
    """Why a figure may not stand beside ours; None if it may."""
    if figure.split is None:
        return "its test cases are not published"
    if figure.split != conditions.split:
        return f"its split is {figure.split}, not {conditions.split}"
    if not conditions.complete:
        return "only some folds of its split were run"
    if figure.evaluation != conditions.evaluation:
        return f"its rules are {figure.evaluation}'s, not {conditions.evaluation}'s"
    if {*figure.structures} != {canonical_name(name) for name in conditions.structures}:
        return f"it is a mean over other organs ({len(figure.structures)}) than ours ({len(conditions.structures)})"
    if figure.labelled_cases not in conditions.labelled_cases:
        return f"it had {figure.labelled_cases} labelled cases"
    return figure.differs or None


def compared(
    conditions: Conditions, figures: Iterable[PublishedFigure] = PUBLISHED
) -> tuple[Sequence[PublishedFigure], Sequence[tuple[PublishedFigure, str]]]:
    """Of the figures on this data set: those that may stand beside ours, and the others with the reason."""
    beside, apart = [], []
    for figure in (each for each in figures if each.converter == conditions.converter):
        reason = why_not(figure, conditions)
        if reason is None:
            beside.append(figure)
        else:
            apart.append((figure, reason))
    return beside, apart
