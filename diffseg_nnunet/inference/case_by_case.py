"""Cases one after the other, each prepared, predicted and exported; where a GPU predicts, the three overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from diffseg_nnunet.errors import BadInputError, StageFailedError
from diffseg_nnunet.raw_dataset import Case
from diffseg_nnunet.torch_errors import errors_of_torch_told_apart


@dataclass(frozen=True)
class FailedCase:
    """A case that was set aside, and why."""

    case: str
    reason: str


@dataclass(frozen=True)
class Steps:
    """What is done with a case.

    Attributes:
        prepare: reads it.
        predict: of what was prepared; in the calling thread.
        export: writes what was predicted, not None.
        tell: called when the case is done, or set aside.
    """

    prepare: Callable[[Case], Any]
    predict: Callable[[Any], Any]
    export: Callable[[Case, Any], None]
    tell: Callable[[Case], None] = lambda case: None


def in_turn(cases: Sequence[Case], steps: Steps, overlap: bool) -> list[FailedCase]:
    """Do all cases; one that cannot be done is no reason to leave the others undone.

    Args:
        overlap: prepare the next case, and export the last one, in threads while one is predicted. Three cases are in
            memory at once then; one that this is too much for is done once more, alone.

    Returns:
        The cases that were set aside, in their order.

    Raises:
        StageFailedError: the GPU's memory does not suffice for a case, or the GPU failed.
    """
    turn = _Turn(steps)
    if overlap and cases:
        turn.overlapped(cases)
    for case in turn.too_large if overlap else cases:
        turn.alone(case)
    return [FailedCase(case.identifier, turn.failed[case]) for case in cases if case in turn.failed]


@dataclass
class _Turn:
    """The cases that were set aside, with their reasons, and those that were too large beside others."""

    steps: Steps
    failed: dict[Case, str] = field(default_factory=dict)
    too_large: list[Case] = field(default_factory=list)

    def alone(self, case: Case) -> None:
        with self._set_aside(case, beside_others=False):
            self.steps.export(case, self.steps.predict(self.steps.prepare(case)))
            self.steps.tell(case)

    def overlapped(self, cases: Sequence[Case]) -> None:
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(1) as behind:
            following, written = ahead.submit(self.steps.prepare, cases[0]), None
            for case, after in zip(cases, [*cases[1:], None], strict=True):
                prepared, predicted = following, None
                following = None if after is None else ahead.submit(self.steps.prepare, after)
                with self._set_aside(case, beside_others=True):
                    predicted = self.steps.predict(prepared.result())
                del prepared
                self._finish(written)
                written = None if predicted is None else (case, behind.submit(self.steps.export, case, predicted))
            self._finish(written)

    def _finish(self, written: tuple[Case, Future] | None) -> None:
        """Wait for an export."""
        if written is not None:
            case, export = written
            with self._set_aside(case, beside_others=True):
                export.result()
                self.steps.tell(case)

    @contextmanager
    def _set_aside(self, case: Case, beside_others: bool) -> Iterator[None]:
        """Where the block fails by what the case is."""
        try:
            with errors_of_torch_told_apart():
                yield
        except torch.OutOfMemoryError as error:
            raise StageFailedError(
                f"The GPU's memory does not suffice for {case.identifier}.",
                "Free the GPU of other work, or predict with --device cpu; finished cases are kept.",
            ) from error
        except MemoryError as error:
            if beside_others:
                self.too_large.append(case)
                return
            self._fail(case, f"the memory does not suffice for its size: {error}")
        except (BadInputError, RuntimeError, ValueError, AssertionError) as error:
            self._fail(case, str(error) or type(error).__name__)

    def _fail(self, case: Case, reason: str) -> None:
        self.failed[case] = reason
        self.steps.tell(case)
