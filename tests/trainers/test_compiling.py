"""Whether a network is compiled: as nnU-Net says, where there is what torch.compile needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffseg_nnunet.planning.hardware import has_c_compiler
from diffseg_nnunet.trainers import DiffSegPretrainer, DiffSegTrainer


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Leaves nothing on the path but the programs that are named."""

    def only(*names: str) -> None:
        for name in names:
            (tmp_path / name).touch(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)

    return only


@pytest.mark.parametrize(("name", "found"), [("cc", True), ("gcc", True), ("clang", True), ("nvcc", False)])
def test_c_compilers(tools: Callable[..., None], name: str, found: bool) -> None:
    tools(name)
    assert has_c_compiler() is found


def test_an_exported_compiler_counts(tools: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    tools("icx")
    assert not has_c_compiler()
    monkeypatch.setenv("CC", "icx")
    assert has_c_compiler()


@pytest.mark.parametrize("trainer_class", [DiffSegPretrainer, DiffSegTrainer])
@pytest.mark.parametrize(
    ("device", "compiler", "variable", "expected"),
    [
        ("cuda", True, None, True),
        ("cuda", False, None, False),
        ("cuda", False, "t", False),
        ("cuda", True, "f", False),
        ("cpu", True, None, False),
    ],
)
def test_nothing_is_compiled_without_a_compiler(
    tools: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    trainer_class: type,
    device: str,
    compiler: bool,
    variable: str | None,
    expected: bool,
) -> None:
    tools(*(["gcc"] if compiler else []))
    monkeypatch.delenv("nnUNet_compile", raising=False)
    if variable is not None:
        monkeypatch.setenv("nnUNet_compile", variable)
    trainer: Any = object.__new__(trainer_class)  # the question is asked before there is a network
    trainer.device = torch.device(device)
    assert trainer._do_i_compile() is expected
