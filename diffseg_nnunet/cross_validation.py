"""nnU-Net's cross-validation: the rule that divides cases where nobody chose a division."""

from __future__ import annotations

from collections.abc import Sequence

FOLDS, NNUNET_SEED = 5, 12345


def cross_validation(cases: Sequence[str], folds: int = FOLDS) -> list[dict[str, list[str]]]:
    """The 'train' and 'val' cases of each fold: scikit-learn's KFold, shuffled, as nnU-Net calls it.

    Args:
        cases: at least two; nnU-Net passes them sorted, and another order gives other folds.
        folds: how many; fewer where there are fewer cases.
    """
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    parts = generate_crossval_split(cases, seed=NNUNET_SEED, n_splits=min(folds, len(cases)))
    return [{part: [str(case) for case in members] for part, members in fold.items()} for fold in parts]
