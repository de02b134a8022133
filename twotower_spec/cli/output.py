"""JSON-lines output that a stopped bulk run can resume."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from twotower_spec.errors import ArgumentError
from twotower_spec.reading import parse_json


class ResumableOutput:
    """Rows by prompt index, appended batch by batch and synced to disk, so that a kill loses no finished batch.

    Every row carries the fingerprint of the run, so that only the run that began a file can resume it.
    """

    def __init__(self, path: Path, run: str, overwrite: bool = False, option: str = "--output") -> None:
        """Opens or creates the file; a half-written last line is cut off.

        With `overwrite` the present content is replaced when the first new rows are written, not before. `option` is
        what messages call the file.

        Raises:
            ArgumentError: it cannot be written, is in use, or belongs to a run with other prompts or settings.
        """
        self.path, self.run, self._option = path, run, option
        self.done: set[int] = set()
        self._begin_anew = overwrite
        try:
            if path.exists() and not path.is_file():
                raise ArgumentError(f"output file {path} is not a regular file; give another")
            # Unbuffered, so that closing does not try to write again what a failed write left in a buffer.
            self._file = path.open("ab+", buffering=0)
        except OSError as error:
            raise ArgumentError(f"output file {path} cannot be written ({error.strerror}); give another") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ArgumentError(f"output file {path} is being written by another run; give another file") from error
        try:
            if not overwrite:
                self._read_done()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ResumableOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Writes finished rows; they are on disk when this returns.

        Raises:
            ArgumentError: the disk is full or fails; rows written earlier are kept.
        """
        left = "".join(json.dumps({**row, "run": self.run}) + "\n" for row in rows).encode()
        end = 0 if self._begin_anew else self._file.seek(0, os.SEEK_END)
        try:
            if self._begin_anew:
                self._file.truncate(0)
                self._begin_anew = False
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)  # half a row, which readers would stumble over
            raise ArgumentError(
                f"output file {self.path} cannot be written ({error.strerror}); free space and start again, "
                f"finished rows are kept"
            ) from error

    def _read_done(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = parse_json(line.decode(), self.path, "", number)
                index, run = row["index"], row["run"]
                if type(index) is not int:
                    raise TypeError
            except (ValueError, KeyError, TypeError) as error:
                raise ArgumentError(
                    f"{self.path}:{number} is not a row of such a run; give another {self._option}, or --overwrite"
                ) from error
            if run != self.run:
                raise ArgumentError(
                    f"{self.path} was begun with other prompts or settings (run {run}, now {self.run}); give another "
                    f"{self._option}, or --overwrite"
                )
            self.done.add(index)
        if len(whole) < len(content):
            self._file.truncate(len(whole))
