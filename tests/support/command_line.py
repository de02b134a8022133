"""The command `twotower-spec`, run in this process."""

import sys
from collections.abc import Callable

import pytest

# Exit code, stdout, stderr.
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*args: object) -> tuple[int, str, str]:
        from twotower_spec.cli import main

        monkeypatch.setattr(sys, "argv", ["twotower-spec", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call
