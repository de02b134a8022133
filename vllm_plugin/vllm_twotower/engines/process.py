"""The demo's end of an engine that runs in a process of its own: vLLM has one `LLM()` per process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from twotower_spec.errors import TwoTowerError
from vllm_twotower.demo.messages import Measured, MeasureOrder, Piece, Ready, StreamOrder
from vllm_twotower.demo.systems import engine_environment

LONGEST_SILENCE_S = 300.0
NUM_LAST_LINES = 8


class EngineError(TwoTowerError):
    """An engine of the demo has ended or does not answer."""


class EngineProcess:
    """Starts loading when it is made; what vLLM says goes to a file, of which only failures are shown."""

    def __init__(self, title: str, arguments: dict[str, Any], folder: Path) -> None:
        """Starts the process and returns at once.

        Args:
            title: what errors call it.
            arguments: of `LLM()`.
            folder: for its output and temporary files, its own.
        """
        self.title, self._log = title, folder / "log"
        self._ready: Ready | None = None
        self._connection, theirs = Pipe()
        with self._log.open("wb") as output, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_twotower.demo.worker", str(theirs.fileno())],
                env={**os.environ, **engine_environment(), "TMPDIR": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C reaches the demo alone, which closes its engines
            )
        self._send(arguments)

    def wait_until_ready(self) -> str:
        """Version of vLLM, when the models are loaded.

        Raises:
            EngineError: they cannot be.
        """
        if self._ready is None:
            self._ready = self._receive("while loading")
        return self._ready.version

    def measure(self, order: MeasureOrder) -> Measured:
        """Generates batches.

        Raises:
            EngineError: the engine has ended.
        """
        self._send(order)
        measured: Measured = self._receive("while generating")
        return measured

    def stream(self, prompt: str, max_new_tokens: int) -> Iterator[Piece]:
        """Generates one prompt; pieces come as they are made.

        Raises:
            EngineError: the engine has ended.
        """
        self._send(StreamOrder(prompt, max_new_tokens))
        is_last = False
        while not is_last:
            piece: Piece = self._receive("while streaming")
            yield piece
            is_last = piece.is_last

    def close(self) -> None:
        """Ends the process at once, with whatever it started: leaving by itself takes vLLM seconds."""
        self._connection.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _send(self, message: object) -> None:
        with suppress(ConnectionError):  # it has ended, which the next answer tells with the reason
            self._connection.send(message)

    def _receive(self, when: str) -> Any:
        try:
            if self._connection.poll(LONGEST_SILENCE_S):
                return self._connection.recv()
        except (EOFError, ConnectionError):
            code = self._process.wait()
            raise EngineError(self._what_happened(f"ended with exit code {code} {when}")) from None
        raise EngineError(self._what_happened(f"did not answer for {LONGEST_SILENCE_S:.0f} s {when}"))

    def _what_happened(self, what: str) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        last = "\n".join(f"  {line}" for line in lines[-NUM_LAST_LINES:]) or "  (nothing)"
        return f"the engine with {self.title} {what}; the last it said was:\n{last}"
