"""Divisions of the cases into training and validation: the published ones as tables, and rules for any list of cases.

A published division is offered only where all of its cases are there: a figure on fewer cases is another figure, and
must not bear the name. Numbers are those of the data set's file names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from diffseg_nnunet.cross_validation import FOLDS, NNUNET_SEED, cross_validation
from diffseg_nnunet.errors import BadInputError
from diffseg_nnunet.patients import Groups, by_patient

from .description import ConversionPlan, SplitScheme

DRAWS, DRAW_SEED = 5, 2015
PSEUDO_LABELLED = "pseudo_labelled"
"""Entry of dataset.json whose 'cases' have labels that a model made."""

# --- BTCV (Synapse syn3193805): numbers of img0001 ... img0010, img0021 ... img0040 -----------------------------------

BTCV_CASES = (*range(1, 11), *range(21, 41))
BTCV_18_12_VALIDATION = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
"""TransUNet's test volumes (Beckschen/TransUNet lists/lists_Synapse), the "Synapse" split of the 8-organ papers."""
BTCV_24_6_VALIDATION = (35, 36, 37, 38, 39, 40)
"""MONAI's tutorials, UNETR and Swin UNETR (Project-MONAI/tutorials, research-contributions/UNETR/BTCV)."""
BTCV_24_6_SIX_LABELS = (1, 2, 3, 4, 5, 6)
"""Training cases of MONAI's dataset_0_init_6.json (tutorials, self_supervised_pretraining/vit_unetr_ssl)."""
BTCV_MONAI_FOLDS = (
    (35, 36, 37, 38, 39, 40),
    (29, 30, 31, 32, 33, 34),
    (23, 24, 25, 26, 27, 28),
    (7, 8, 9, 10, 21, 22),
    (1, 2, 3, 4, 5, 6),
)
"""Validation cases by fold, MONAI's btcv_folds.json (tutorials, auto3dseg/tasks/btcv)."""
BTCV_NNUNET_FOLDS = (
    (4, 9, 23, 26, 29, 37),
    (1, 7, 8, 31, 32, 35),
    (21, 22, 24, 30, 33, 34),
    (25, 27, 28, 36, 38, 40),
    (2, 3, 5, 6, 10, 39),
)
"""Validation cases by fold of nnU-Net's rule, KFold(5, shuffle, seed 12345), on all 30 cases sorted."""
BTCV_VOX2VEC_FOLDS = (
    (9, 10, 26, 28, 34, 38),
    (1, 5, 23, 27, 35, 39),
    (2, 3, 6, 22, 24, 33),
    (4, 29, 32, 36, 37, 40),
    (7, 8, 21, 25, 30, 31),
)
"""Test cases by fold of vox2vec, KFold(5, shuffle, seed 42) (mishgon/vox2vec)."""
BTCV_VOX2VEC_STOPPING = (21, 21, 23, 10, 22)
"""The one case a fold that vox2vec takes out of its training part to watch the training; it is in neither part here."""


def btcv(identifier: Callable[[int], str]) -> tuple[SplitScheme, ...]:
    """The published divisions of BTCV's 30 labelled cases; the first one is the default.

    24/6 comes first: the 13-organ figures of 3D networks (UNETR, Swin UNETR, MONAI's model zoo) are on it, and this
    data set has 13 organs. 18/12 belongs to papers that score 8 of them; the two are not comparable.

    Args:
        identifier: number of a case -> its identifier.
    """

    def part(numbers: Iterable[int]) -> tuple[str, ...]:
        return tuple(identifier(number) for number in sorted(numbers))

    def fold(validation: Iterable[int], left_out: Iterable[int] = ()) -> dict[str, tuple[str, ...]]:
        return {"train": part({*BTCV_CASES} - {*validation, *left_out}), "val": part(validation)}

    few = {"train": part(BTCV_24_6_SIX_LABELS), "val": part(BTCV_24_6_VALIDATION)}
    watched = zip(BTCV_VOX2VEC_FOLDS, BTCV_VOX2VEC_STOPPING, strict=True)
    return (
        SplitScheme("24/6", (fold(BTCV_24_6_VALIDATION),), "MONAI, UNETR, Swin UNETR (13 organs)"),
        SplitScheme("18/12", (fold(BTCV_18_12_VALIDATION),), "TransUNet, 'Synapse' (8 organs)"),
        SplitScheme("24/6-6-labels", (few,), "MONAI dataset_0_init_6.json"),
        SplitScheme("monai-5-fold", tuple(fold(each) for each in BTCV_MONAI_FOLDS), "MONAI btcv_folds.json"),
        SplitScheme("nnunet-5-fold", tuple(fold(each) for each in BTCV_NNUNET_FOLDS), "nnU-Net's rule, all 30 cases"),
        SplitScheme("vox2vec-5-fold", tuple(fold(test, (one,)) for test, one in watched), "vox2vec, KFold seed 42"),
    )


# --- rules for any list of cases --------------------------------------------------------------------------------------


def cases_of(scheme: SplitScheme) -> set[str]:
    """All cases that a scheme names."""
    return {case for fold in scheme.folds for part in fold.values() for case in part}


def divided(schemes: Iterable[SplitScheme], cases: Iterable[str]) -> tuple[list[SplitScheme], dict[str, list[str]]]:
    """(schemes all of whose cases are there, name of each other scheme -> the cases it lacks)."""
    there = set(cases)
    whole, lacking = [], {}
    for scheme in schemes:
        if gone := sorted(cases_of(scheme) - there):
            lacking[scheme.name] = gone
        else:
            whole.append(scheme)
    return whole, lacking


def k_fold(
    cases: Iterable[str], folds: int = FOLDS, always: Iterable[str] = (), groups: Groups = ()
) -> tuple[SplitScheme, ...]:
    """nnU-Net's cross-validation of the cases, in the order of their names; nothing where there are fewer than two.

    Args:
        cases: those that are divided, and validate once each.
        folds: how many; fewer where there are fewer cases.
        always: further cases that train in every fold and never validate (pseudo-labelled ones).
        groups: cases of one patient each, which stay on one side: then two patients are needed.
    """
    ordered, always = sorted(set(cases)), tuple(sorted(set(always)))
    if len(by_patient(ordered, groups)) < 2:
        return ()
    parts = cross_validation(ordered, folds, groups)
    return (
        SplitScheme(
            f"{len(parts)}-fold",
            tuple({"train": (*fold["train"], *always), "val": tuple(fold["val"])} for fold in parts),
            f"nnU-Net's rule: KFold{' of patients' if groups else ''}, shuffled, seed {NNUNET_SEED}",
        ),
    )


def one_fold(name: str, train: Iterable[str], val: Iterable[str], source: str) -> tuple[SplitScheme, ...]:
    """A single division; nothing where one of its parts is empty."""
    train, val = tuple(sorted(train)), tuple(sorted(val))
    return (SplitScheme(name, ({"train": train, "val": val},), source),) if train and val else ()


def few_labels(
    scheme: SplitScheme, count: int, among: Sequence[str] | None = None, seed: int = DRAW_SEED
) -> SplitScheme:
    """A scheme whose folds train on `count` drawn cases each and validate on what they did before.

    A scheme of one fold becomes one of five, each a draw of its own, because a few labels more or less lucky change a
    result more than most methods do. The same seed gives nested draws: those of fewer labels are in those of more.

    Args:
        scheme: what to draw from.
        count: cases a fold.
        among: the cases that may be drawn; None: all that train.
        seed: of the draws.

    Raises:
        BadInputError: a fold has fewer cases to draw from.
    """
    folds = scheme.folds * DRAWS if len(scheme.folds) == 1 else scheme.folds
    drawn = []
    for number, fold in enumerate(folds):
        train = sorted(set(fold["train"]) & set(fold["train"] if among is None else among))
        if not 1 <= count <= len(train):
            raise BadInputError(
                f"{count} cases cannot be drawn from the {len(train)} training cases of '{scheme.name}'.",
                f"Choose 1 to {len(train)}.",
            )
        order = np.random.default_rng([seed, number]).permutation(len(train))
        drawn.append({"train": tuple(sorted(train[index] for index in order[:count])), "val": fold["val"]})
    return SplitScheme(f"{scheme.name}:n={count}", tuple(drawn), f"{scheme.source}; {count} drawn by seed {seed}")


def chosen(plan: ConversionPlan, name: str | None) -> SplitScheme | None:
    """The scheme a user names: one of the plan's, or one of them with fewer labels (``24/6:n=6``).

    Returns:
        None where no name is given and the plan has no scheme; else the default is its first.

    Raises:
        BadInputError: there is no such scheme; the message lists those there are.
    """
    offered = {scheme.name: scheme for scheme in plan.splits}
    if name is None:
        return plan.splits[0] if plan.splits else None
    asked = re.fullmatch(r"(?P<scheme>.+?)(?::n=(?P<count>\d{1,6}))?", name)
    if asked is None or asked["scheme"] not in offered:
        raise BadInputError(
            f"'{name}' is no split of {plan.name}.",
            f"Choose {', '.join(offered) or 'none: its cases allow no published one'}; append :n=6 for six labels. A "
            "published split is offered where all of its cases are there.",
        )
    scheme = offered[asked["scheme"]]
    if asked["count"] is None:
        return scheme
    return few_labels(scheme, int(asked["count"]), labelled_by_people(plan))


def labelled_by_people(plan: ConversionPlan) -> list[str]:
    """The training cases, sorted, whose labels no model made: those that may validate."""
    made_by_model = set(plan.extra.get(PSEUDO_LABELLED, {}).get("cases", ()))
    return sorted(
        case.identifier for case in plan.cases if case.role == "training" and case.identifier not in made_by_model
    )
