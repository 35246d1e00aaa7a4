"""Outliers among few numbers, found without being misled by them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

OUTLIER_Z = 3.5
# fewer cases have no spread to speak of
LEAST_CASES = 8
_MAD_TO_STANDARD_DEVIATION = 1.4826
# of logarithms: where (almost) all cases are alike, less than a factor of exp(3.5 · 0.1) = 1.4 apart is alike, too
_LEAST_SPREAD = 0.1


def robust_z(values: Sequence[float]) -> NDArray[np.float64]:
    """How many standard deviations positive numbers (lengths, volumes) lie off their median, as logarithms.

    The standard deviation is estimated by the median absolute deviation (Iglewicz and Hoaglin, How to Detect and Handle
    Outliers, 1993, who call what exceeds 3.5 an outlier), and is at least 10 %. All 0 for fewer than 8 values.
    """
    logarithms = np.log(np.asarray(values, dtype=float))
    if logarithms.size < LEAST_CASES:
        return np.zeros(logarithms.size)
    off = logarithms - np.median(logarithms)
    return off / max(_MAD_TO_STANDARD_DEVIATION * float(np.median(np.abs(off))), _LEAST_SPREAD)
