"""What is of the whole process, and a test gives back as it found it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

OURS = ("nnUNet_", "DIFFSEG_")
"""How the names of nnU-Net's environment variables and of ours begin."""


@contextmanager
def environment_restored() -> Iterator[None]:
    """nnU-Net's variables and ours: those of the caller neither matter within the block nor change."""
    kept = dict(os.environ)
    for variable in kept:
        if variable.startswith(OURS):
            del os.environ[variable]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)
