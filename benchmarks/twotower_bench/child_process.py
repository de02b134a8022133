"""Processes that we start, watch and end, each with a group and a log of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from twotower_spec.errors import TwoTowerError

NUM_LAST_LINES = 8
STOPPED_WITHIN_S = 20.0
LOOKS_EVERY_S = 0.05


class ChildError(TwoTowerError):
    """An engine, a server or the load generator has failed; its last lines are in the message."""


def failure_with_log(title: str, what: str, log: Path) -> ChildError:
    """An error with the last lines that a process said."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = "\n".join(f"  {line}" for line in lines[-NUM_LAST_LINES:]) or "  (nothing)"
    return ChildError(f"{title} {what}; the last it said was:\n{last}")


class WatchedProcess(ABC):
    """A process with a group and a log of its own, however it was started.

    Attributes:
        title: what errors call it.
        log: what it says.
    """

    title: str
    log: Path

    @property
    @abstractmethod
    def pid(self) -> int:
        """Process id, and that of its group."""

    @property
    @abstractmethod
    def exit_code(self) -> int | None:
        """None while it runs."""

    @abstractmethod
    def wait(self) -> int:
        """Exit code of a process that is about to end."""

    def failure(self, what: str) -> ChildError:
        """An error with the last lines of its log."""
        return failure_with_log(self.title, what, self.log)

    def check(self, when: str) -> None:
        """Raises a `ChildError` if it has ended."""
        if self.exit_code is not None:
            raise self.failure(f"ended with exit code {self.exit_code} {when}")

    def ask_to_end(self) -> None:
        """Returns at once."""
        if self.exit_code is None:
            self._signal(signal.SIGINT)

    def close(self) -> None:
        """Waits for its end for a while, then ends it and whatever it started; Ctrl-C makes the while shorter."""
        try:
            self.ask_to_end()
            end = time.monotonic() + STOPPED_WITHIN_S
            while self.exit_code is None and time.monotonic() < end:
                time.sleep(LOOKS_EVERY_S)
        finally:
            # Its own children may be left.
            self.kill()

    def kill(self) -> None:
        """Ends it at once, with whatever it started."""
        self._signal(signal.SIGKILL)
        self.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)


class ChildProcess(WatchedProcess):
    """Starts when it is made; what it says goes to a file, of which only failures are shown."""

    def __init__(
        self,
        title: str,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Starts the process and returns at once.

        Args:
            title: what errors call it.
            command: with its arguments.
            folder: for its output and temporary files, its own.
            environment: variables beside ours.
            pass_fds: files that stay open in it.
        """
        self.title, self.log = title, folder / "log"
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment, "TMPDIR": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=pass_fds,
                start_new_session=True,  # Ctrl-C reaches us alone, and we end our children
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Exit code of a process that is about to end."""
        return self._process.wait()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Closes what is open when the command is ended or its terminal goes; under `nohup` the latter is ignored."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    ours = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]
    with _handled(ours, leave):
        yield


@contextmanager
def signals_held() -> Iterator[None]:
    """Signals that we handle are heeded when it ends: a process whose start one cuts short would be left to itself."""
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    ours = [one for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if callable(signal.getsignal(one))]
    try:
        with _handled(ours, remember):
            yield
    finally:
        for one in came:
            signal.raise_signal(one)


@contextmanager
def _handled(signals: Sequence[signal.Signals], by: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {one: signal.signal(one, by) for one in signals}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
