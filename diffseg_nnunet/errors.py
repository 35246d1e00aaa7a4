"""Errors a user can mend, and their exit codes.

Every message answers three questions: what is wrong, where (file or case), and which command or setting mends it.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2


class DiffSegError(Exception):
    """Base of all errors that are reported as one message, without a traceback.

    Args:
        message: what is wrong and where.
        mend: the command or setting that mends it, one sentence; printed after the message.
    """

    exit_code = EXIT_FAILURE

    def __init__(self, message: str, mend: str | None = None):
        super().__init__(message)
        self.message = message
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.message} {self.mend}" if self.mend else self.message


class BadInputError(DiffSegError):
    """Usage or data is wrong: the user can mend it. Exit code 2."""

    exit_code = EXIT_BAD_INPUT


class StageFailedError(DiffSegError):
    """A stage failed for a reason that is not the user's input. Exit code 1."""
