"""A disk that takes no more ends a command with one sentence, wherever it writes."""

from __future__ import annotations

import errno
import os

import pytest

from twotower_spec.cli import app


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_command_says_what_cannot_be_written(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        raise OSError(number, os.strerror(number), "out/log.jsonl")

    assert app._exit_code(write) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out/log.jsonl cannot be written") and said.count("\n") == 1


def test_other_errors_of_the_system_are_not_taken_for_a_full_disk() -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        app._exit_code(fail)
