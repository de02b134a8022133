"""What the benchmarks share: the file that they write and go on with, lists of numbers, the progress bar."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from twotower_spec.cli.output import ResumableOutput
from twotower_spec.errors import ArgumentError
from twotower_spec.machine import machine_info

Number = TypeVar("Number", int, float)

VERSIONED = ("twotower-spec", "numpy", "safetensors")


class MeasurementFile:
    """JSON lines, each a measurement that is done and where it was made; a stopped run goes on with its file."""

    def __init__(self, run: str, versioned: Sequence[str] = ()) -> None:
        """Of a run that may have no file: then nothing is kept.

        Args:
            run: fingerprint of all that must be the same for measurements to stand in one file, see `fingerprint`.
            versioned: packages whose versions are kept beside those that all measurements name.
        """
        self.run = run
        self._versioned = (*VERSIONED, *versioned)
        self._file: ResumableOutput | None = None
        self._num_rows = 0

    @contextmanager
    def opened(self, path: Path | None, overwrite: bool) -> Iterator[list[dict[str, Any]]]:
        """The rows that a file holds; more can be added while it is open.

        Raises:
            ArgumentError: it cannot be written, or belongs to another run.
        """
        if path is None:
            yield []
            return
        with ResumableOutput(path, self.run, overwrite, option="--json") as self._file:
            lines = [] if overwrite else path.read_text(encoding="utf-8").splitlines()
            self._num_rows = len(lines)
            yield [json.loads(line) for line in lines]

    def append(self, kind: str, row: dict[str, Any]) -> None:
        """Adds a row; it is on disk when this returns."""
        if self._file is None:
            return
        # A run may go on elsewhere, so every row says where it was measured.
        self._file.append([{"index": self._num_rows, "kind": kind, **row, **self.where}])
        self._num_rows += 1

    @cached_property
    def where(self) -> dict[str, Any]:
        """Machine, versions and command, as in every row."""
        return {
            "machine": machine_info(),
            "versions": {name: _version(name) for name in self._versioned},
            "command": shlex.join(["twotower-spec", *sys.argv[1:]]),
        }


def fingerprint(content: Any) -> str:
    """A short text that is the same for the same JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Numbers with commas between them.

    Raises:
        ArgumentError: it is no such list.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentError(f"{option} {text!r} is not a list of numbers; give them with commas, like 4,8") from error


def progress_bar() -> Progress:
    """On stderr; nothing when stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
