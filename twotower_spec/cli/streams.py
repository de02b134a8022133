"""Standard streams that a shell has closed, or that stop taking what is written."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from twotower_spec.errors import TwoTowerError


class OutputError(TwoTowerError):
    """Standard output takes nothing any more."""


def open_standard_streams() -> None:
    """Makes failures of standard output an `OutputError`, and those of standard error nothing: who would be told?

    Streams that were closed when the process began are there again, and fail: files that are opened later would
    otherwise take their numbers, and get what is meant for them. Streams of a caller's own stay as they are.
    """
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115  # closed with the process
    for name, kind in (("stdout", _Output), ("stderr", _Errors)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _written_to(kind, stream))


def _written_to(kind: type[io.FileIO], stream: TextIO | None) -> TextIO:
    """Standard stream as it was; what its encoding lacks is shown escaped."""
    # Open for reading: who writes there is told what a closed stream would say.
    number = stream.fileno() if stream else os.open(os.devnull, os.O_RDONLY)
    raw = kind(number, "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=raw.isatty() or kind is _Errors,
    )


class _Output(io.FileIO):
    """Fails once; what is still in buffers when the process ends is dropped."""

    _has_failed = False

    def write(self, content: Any, /) -> int:
        if self._has_failed:
            return len(content)
        try:
            return super().write(content)
        except OSError as error:
            self._has_failed = True
            raise OutputError(
                f"standard output cannot be written ({error.strerror}); give it to what takes all of it"
            ) from error


class _Errors(io.FileIO):
    def write(self, content: Any, /) -> int:
        with suppress(OSError):
            return super().write(content)
        return len(content)
