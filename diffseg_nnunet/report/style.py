"""matplotlib's own style, whatever else was drawn in the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib


@contextmanager
def plain_style() -> Iterator[None]:
    """Draw in matplotlib's own style: nnU-Net's plot of a training leaves seaborn's large fonts behind."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield
