"""How stages talk to the user, without knowing whether that is a terminal, a log or a test."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives news of a stage; the CLI prints them."""

    def info(self, text: str) -> None:
        """One line worth reading."""

    def warn(self, text: str) -> None:
        """One line the user should act upon."""

    def progress(self, stage: str, done: int, total: int, news: str = "") -> None:
        """`done` of `total` steps of a stage; `news` is a line worth keeping, or empty."""


class Silent:
    """A reporter that drops everything."""

    def info(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def progress(self, stage: str, done: int, total: int, news: str = "") -> None: ...
