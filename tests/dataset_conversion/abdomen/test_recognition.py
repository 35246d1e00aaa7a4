"""Each format of abdominal scans recognises its own alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffseg_nnunet import registry

from .trees import amos22, btcv, flare22, flare23, hugging_face


@pytest.mark.parametrize("made", [btcv, flare22, hugging_face, flare23, amos22])
def test_each_format_recognises_its_own_alone(tmp_path: Path, made: Any) -> None:
    made(tmp_path / "download")
    formats = {name: registry.load("converters", name)() for name in ("btcv", "flare22", "flare23", "amos22")}
    recognised = [name for name, converter in formats.items() if converter.recognise(tmp_path / "download")]
    assert recognised == [{"hugging_face": "flare22"}.get(made.__name__, made.__name__)]
