"""Differences are paired by seed and case."""

from __future__ import annotations

import ablation
import numpy as np


def test_paired_differences():
    first = {0: {"a": 0.5, "b": 0.7}, 1: {"a": 0.6, "b": 0.8}}
    second = {0: {"a": 0.4, "b": 0.7}, 1: {"a": 0.3, "b": 0.8}}
    over_seeds, over_cases = ablation.paired(first, second)
    np.testing.assert_allclose(over_seeds, [0.05, 0.15])
    np.testing.assert_allclose(over_cases, [0.2, 0.0])
    np.testing.assert_allclose(ablation.seed_means(first), [0.6, 0.7])
