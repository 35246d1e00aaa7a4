"""nnU-Net's cross-validation: the rule that divides cases where nobody chose a division."""

from __future__ import annotations

from collections.abc import Sequence

from diffseg_nnunet.patients import Groups, by_patient

FOLDS, NNUNET_SEED = 5, 12345


def cross_validation(cases: Sequence[str], folds: int = FOLDS, groups: Groups = ()) -> list[dict[str, list[str]]]:
    """The 'train' and 'val' cases of each fold: scikit-learn's KFold, shuffled, as nnU-Net calls it.

    Args:
        cases: at least two; nnU-Net passes them sorted, and another order gives other folds.
        folds: how many; fewer where there are fewer cases.
        groups: cases of one patient each, which stay together: then patients are divided, of whom there must be two.
    """
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    together = {case: [case] for case in cases}
    if groups:
        together = {patient[0]: patient for patient in by_patient(cases, groups)}
    parts = generate_crossval_split(list(together), seed=NNUNET_SEED, n_splits=min(folds, len(together)))
    return [
        {part: [case for first in members for case in together[str(first)]] for part, members in fold.items()}
        for fold in parts
    ]
