"""Tensors are tiny here."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def tiny_tensors(one_thread: None) -> None: ...
