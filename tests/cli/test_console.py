"""What goes where: answers to standard output, news to standard error."""

from __future__ import annotations

import subprocess
import sys

import pytest

from diffseg_nnunet.cli.console import news_to_standard_error


def test_news_leave_standard_output_to_the_answer(capfd: pytest.CaptureFixture[str]) -> None:
    """What other processes print, as nnU-Net's workers do, included."""
    with news_to_standard_error(True):
        print("of this process")
        subprocess.run([sys.executable, "-S", "-c", "print('of another')"], check=True)
    print("the answer")
    out, err = capfd.readouterr()
    assert out == "the answer\n"
    assert {"of this process", "of another"} <= set(err.splitlines())


def test_standard_output_is_given_back_after_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="bad"), news_to_standard_error(True):
        raise ValueError("bad")
    with news_to_standard_error(False):
        print("both")
    assert capfd.readouterr() == ("both\n", "")
