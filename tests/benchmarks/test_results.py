"""What is kept is not computed twice."""

from __future__ import annotations

import results


def test_cached_computes_once(tmp_path):
    calls = []

    def compute() -> dict[str, float]:
        calls.append(1)
        return {"a": 0.5}

    path = tmp_path / "deep" / "kept.json"
    assert results.cached(path, compute) == results.cached(path, compute) == {"a": 0.5}
    assert len(calls) == 1


def test_interval_of_one_value_has_none():
    assert results.interval([1.0], 1) == "1.0"
    assert results.interval([1.0, 1.0], 1) == "1.0 [1.0, 1.0]"
