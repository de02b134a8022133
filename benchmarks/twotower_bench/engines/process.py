"""Our end of an engine that runs in a process of its own: vLLM has one `LLM()` per process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from twotower_bench.child_process import ChildError
from twotower_bench.connected_process import ConnectedProcess
from twotower_bench.engines.messages import Piece, Ready, Served, ServeOrder
from twotower_bench.environment import engine_environment
from twotower_bench.fork_server import ForkedProcess, ForkServer

LONGEST_SILENCE_S = 300.0
WORKER = "twotower_bench.engines.worker"


class EngineProcess:
    """Starts loading when it is made; what vLLM says goes to a file, of which only failures are shown.

    Whatever asks it raises a `ChildError` where it has ended or is silent for too long.
    """

    def __init__(
        self,
        title: str,
        arguments: Mapping[str, Any],
        folder: Path,
        longest_silence_s: float = LONGEST_SILENCE_S,
        fork_server: ForkServer | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Starts the process and returns at once.

        Args:
            title: what errors call it.
            arguments: of `LLM()`.
            folder: for its output and temporary files, its own.
            longest_silence_s: after which it counts as dead, while it loads or works on an order.
            fork_server: forks the process; None for a fresh one, as one with workers of its own always is.
            environment: variables beside those of all engines.
        """
        self.title, self._longest_silence_s = title, longest_silence_s
        self._has_workers = any(arguments.get(f"{kind}_parallel_size", 1) > 1 for kind in ("tensor", "pipeline"))
        self._ready: Ready | None = None
        name, variables = f"the engine with {title}", {**engine_environment(), **(environment or {})}
        self._process: ConnectedProcess | ForkedProcess
        if fork_server is None or self._has_workers:
            self._process = ConnectedProcess(name, WORKER, folder, variables)
        else:
            self._process = fork_server.fork(name, f"{WORKER}:serve", (), folder, variables, is_connected=True)
        assert self._process.connection is not None
        self._connection = self._process.connection
        self._send(dict(arguments))

    def wait_until_ready(self) -> Ready:
        """Waits until the models are loaded, and returns what the engine then says of itself."""
        if self._ready is None:
            self._ready = self._receive("while loading")
        return self._ready

    def tokenize(self, texts: Sequence[str], chat: bool = False) -> tuple[tuple[int, ...], ...]:
        """Reads texts as the verifier does; where they are what a user says, in its chat template."""
        self._send(("tokenize", tuple(texts), chat))
        token_ids: tuple[tuple[int, ...], ...] = self._receive("while reading prompts")
        return token_ids

    def draft_by(self, knobs: Mapping[str, Any]) -> None:
        """Lets TwoTower draft by these knobs from now on, as far as they concern its policy."""
        self._send(("draft_by", dict(knobs)))
        self._receive("while changing how it drafts")

    def serve(self, order: ServeOrder) -> Served:
        """Generates for prompts."""
        self._send(("serve", order))
        served: Served = self._receive("while generating")
        return served

    def stream(self, prompt: str, max_new_tokens: int) -> Iterator[Piece]:
        """Generates one prompt; pieces come as they are made."""
        self._send(("stream", prompt, max_new_tokens))
        is_last = False
        while not is_last:
            piece: Piece = self._receive("while streaming")
            yield piece
            is_last = piece.is_last

    def close(self) -> None:
        """Ends the process, at once if it is one alone: leaving by itself takes vLLM seconds."""
        self._connection.close()
        if self._has_workers:  # which leave shared memory behind when they are killed
            self._process.close()
        else:
            self._process.kill()

    def failure(self, what: str) -> ChildError:
        """An error with the last that it said."""
        return self._process.failure(what)

    def _send(self, message: object) -> None:
        with suppress(ConnectionError):  # it has ended, which the next answer tells with the reason
            self._connection.send(message)

    def _receive(self, when: str) -> Any:
        try:
            if self._connection.poll(self._longest_silence_s):
                return self._connection.recv()
        except (EOFError, ConnectionError):
            code = self._process.wait()
            raise self.failure(f"ended with exit code {code} {when}") from None
        raise self.failure(f"did not answer for {self._longest_silence_s:.0f} s {when}")
