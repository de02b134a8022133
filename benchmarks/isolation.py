"""Calls in a process that may die: after a kernel's illegal access, its process can no longer use the device."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import TypeVar

import torch

Result = TypeVar("Result")


class CallFailed(Exception):
    """A call raised, took too long or ended its process; the text says which."""


class Isolated:
    """One process for many calls, so that caches last; it is replaced once it can no longer be used."""

    def __init__(self) -> None:
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: Callable[..., Result], *args: object, seconds: float) -> Result:
        """Calls `function(*args)` in the process; function, arguments and result must be picklable.

        Raises:
            CallFailed: there is no result, or not within that time.
        """
        process, connection = self._running()
        connection.send((function, args))
        try:
            if not connection.poll(seconds):
                self.close()
                raise CallFailed(f"took more than {seconds:.0f} s")
            done, result, usable = connection.recv()
        except (EOFError, ConnectionError):
            process.join()
            self.close()
            raise CallFailed(f"its process ended with exit code {process.exitcode}") from None
        if not usable:
            self.close()
        if not done:
            raise CallFailed(result)
        returned: Result = result
        return returned

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process = self._connection = None

    def _running(self) -> tuple[SpawnProcess, Connection]:
        if self._process is None or self._connection is None:
            spawn = multiprocessing.get_context("spawn")
            self._connection, theirs = spawn.Pipe()
            self._process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()  # otherwise the connection would stay open after the process has ended
        return self._process, self._connection


def _serve(connection: Connection) -> None:
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            done, result = True, function(*args)
        except Exception as error:
            done, result = False, in_one_line(error)
        connection.send((done, result, _device_usable()))


def in_one_line(error: BaseException) -> str:
    """Describes an error, short enough for the cell of a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__


def _device_usable() -> bool:
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
