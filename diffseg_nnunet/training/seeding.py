"""One seed reaches every generator; batch k depends on (seed, stream, k) alone.

Stock nnU-Net seeds nothing, and all its augmentation workers share one torch stream. Seeding each batch by its index
makes the stream of batches the same for any number of workers, and the same after a resume.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices) of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derived_seed(*key: int) -> int:
    """A 63-bit seed from a tuple of non-negative integers; different tuples give independent streams."""
    # with its length in front: SeedSequence fills up with zeros, so (0,) and (0, 0) would be one stream
    low, high = np.random.SeedSequence((len(key), *key)).generate_state(2, np.uint32)
    return int(low) | (int(high) & 0x7FFFFFFF) << 32


@contextmanager
def random_stream(*key: int) -> Iterator[None]:
    """Within the block python, numpy and the CPU generator of torch follow the stream `key`; afterwards their own."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        seed = derived_seed(*key)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.random.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
