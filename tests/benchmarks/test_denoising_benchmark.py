"""The search finds the best strength, and PSNR is what the books say."""

from __future__ import annotations

import math

import denoising
import pytest


@pytest.mark.parametrize("best", [0.03, 0.8, 1.0, 20.0])
def test_line_search_finds_the_best_strength(best):
    found, error = denoising.line_search(lambda strength: math.log(strength / best) ** 2)
    assert found == pytest.approx(best, rel=0.1)
    assert error < 0.01


def test_psnr():
    assert denoising.psnr(0.01, 1.0) == pytest.approx(20)
    assert denoising.psnr(0.01, 10.0) == pytest.approx(40)
