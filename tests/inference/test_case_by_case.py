"""Whether steps overlap or not, every case is done or set aside, in order, and told once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.inference.case_by_case import FailedCase, Steps, in_turn
from diffseg_nnunet.raw_dataset import Case

STEPS = ("prepare", "predict", "export")
CASE = st.tuples(st.sampled_from((None, *STEPS)), st.sampled_from((ValueError, BadInputError, MemoryError)))


def cases(count: int) -> list[Case]:
    return [Case(f"case_{number}", (Path(f"case_{number}_0000.nii.gz"),), None) for number in range(count)]


class Work:
    """Steps that note what was done, and fail where they are told to."""

    def __init__(self, failing: list[tuple[str | None, type[Exception]]], once: bool = False):
        self.failing = {f"case_{number}": each for number, each in enumerate(failing)}
        self.once = once
        self.exported: list[str] = []
        self.told: list[str] = []
        self.predicting = threading.get_ident()

    def _do(self, step: str, case: Case) -> Case:
        at, error = self.failing[case.identifier]
        if at == step:
            if self.once:
                self.failing[case.identifier] = (None, error)
            raise BadInputError("bad", "mend") if error is BadInputError else error("bad")
        return case

    def predict(self, case: Case) -> Case:
        assert threading.get_ident() == self.predicting
        return self._do("predict", case)

    def export(self, case: Case, predicted: Case) -> None:
        assert predicted is case
        self.exported.append(self._do("export", case).identifier)

    def run(self, overlap: bool) -> list[FailedCase]:
        steps = Steps(
            lambda c: self._do("prepare", c), self.predict, self.export, lambda c: self.told.append(c.identifier)
        )
        return in_turn(cases(len(self.failing)), steps, overlap)


@pytest.mark.parametrize("overlap", [False, True])
@given(failing=st.lists(CASE, max_size=6))
@hypothesis_settings(deadline=None, max_examples=60)
def test_every_case_is_done_or_set_aside(overlap: bool, failing: list) -> None:
    work = Work(failing)
    failed = work.run(overlap)
    bad = [f"case_{number}" for number, (step, _) in enumerate(failing) if step is not None]
    assert [each.case for each in failed] == bad
    assert all("bad" in each.reason for each in failed)
    assert sorted([*work.exported, *bad]) == sorted(work.told) == sorted(work.failing)
    assert work.exported == sorted(work.exported)


@pytest.mark.parametrize("step", STEPS)
def test_what_is_too_large_beside_others_is_done_alone(step: str) -> None:
    work = Work([(None, ValueError), (step, MemoryError), (None, ValueError)], once=True)
    assert work.run(overlap=True) == []
    assert work.exported == work.told == ["case_0", "case_2", "case_1"]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_full_gpu_ends_the_run_and_keeps_what_is_done(overlap: bool) -> None:
    work = Work([(None, ValueError)] * 3)

    def predict(case: Case) -> Case:
        if case.identifier == "case_1":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return case

    with pytest.raises(StageFailedError, match=r"The GPU's memory does not suffice for case_1\."):
        in_turn(cases(3), Steps(lambda case: case, predict, work.export), overlap)
    assert work.exported == ["case_0"]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_gpu_that_failed_ends_the_run_and_keeps_what_is_done(overlap: bool) -> None:
    """No later case could be predicted: none is to be set aside for it."""
    work = Work([(None, ValueError)] * 3)

    def predict(case: Case) -> Case:
        if case.identifier == "case_1":
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return case

    with pytest.raises(StageFailedError, match=r"The GPU failed.*illegal memory access"):
        in_turn(cases(3), Steps(lambda case: case, predict, work.export), overlap)
    assert work.exported == ["case_0"]


@pytest.mark.parametrize("overlap", [False, True])
def test_memory_that_torch_does_not_get_is_no_property_of_the_case(overlap: bool) -> None:
    """Beside others it is too large, and done once more alone; alone it is set aside for its size."""
    tried = []

    def predict(case: Case) -> Case:
        tried.append(case.identifier)
        if tried.count("case_1") == 1 and case.identifier == "case_1":
            torch.empty(1 << 60, dtype=torch.uint8)
        return case

    failed = in_turn(cases(3), Steps(lambda case: case, predict, lambda case, predicted: None), overlap)
    if overlap:
        assert failed == []
        assert tried[-1] == "case_1"
    else:
        assert [each.case for each in failed] == ["case_1"]
        assert "the memory does not suffice for its size" in failed[0].reason


def test_an_error_of_the_disk_is_not_the_cases_fault() -> None:
    def export(case: Case, predicted: Case) -> None:
        raise OSError(28, "No space left on device")

    for overlap in (False, True):
        with pytest.raises(OSError, match="No space left"):
            in_turn(cases(2), Steps(lambda case: case, lambda case: case, export), overlap)
