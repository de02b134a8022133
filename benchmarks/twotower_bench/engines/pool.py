"""Several engines side by side, or one at a time where there is no room for more."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import torch

from twotower_bench.child_process import signals_held
from twotower_bench.engines.process import LONGEST_SILENCE_S, EngineProcess
from twotower_bench.fork_server import ForkServer, running_fork_server


@dataclass(frozen=True)
class EngineSpec:
    """An engine that can be started.

    Attributes:
        title: what errors call it.
        arguments: of `LLM()`.
        environment: variables beside those of all engines.
    """

    title: str
    arguments: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)


class EnginePool:
    """Engines by name; one that cannot be loaded raises a `ChildError`."""

    def __init__(
        self,
        specs: Mapping[str, EngineSpec],
        together: bool = True,
        longest_silence_s: float = LONGEST_SILENCE_S,
    ) -> None:
        """Starts nothing yet.

        Args:
            specs: by name.
            together: whether all can be held at once; else each is closed when another is used.
            longest_silence_s: see `EngineProcess`.
        """
        self.specs, self.together = dict(specs), together
        self._longest_silence_s = longest_silence_s
        self._engines: dict[str, EngineProcess] = {}
        self._forks: ForkServer | None = None
        self._num_started = 0

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="twotower-engines-")))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_all()
        self._forks = None
        self._stack.close()

    def start(self, names: Iterable[str]) -> None:
        """Lets engines load in the background; those that run already go on."""
        for name in names:
            if name not in self._engines:
                spec = self.specs[name]
                with signals_held():  # else one that ends us now would leave it behind
                    if self._num_started == 0:
                        self._forks = self._stack.enter_context(running_fork_server())
                    self._engines[name] = EngineProcess(
                        spec.title,
                        spec.arguments,
                        self._new_folder(),
                        self._longest_silence_s,
                        self._forks,
                        spec.environment,
                    )

    def load(self, names: Collection[str]) -> None:
        """Waits until engines are loaded, so that none loads while another is measured.

        Nothing where one is held at a time.
        """
        if not self.together:
            return
        # On a GPU one after the other: each sizes its cache by the memory that it finds free.
        if not torch.cuda.is_available():
            self.start(names)
        for name in names:
            self.start([name])
            self._engines[name].wait_until_ready()

    def use(self, name: str) -> EngineProcess:
        """An engine that is loaded."""
        if not self.together and name not in self._engines:
            self._close_all()
        self.start([name])
        engine = self._engines[name]
        engine.wait_until_ready()
        return engine

    def _new_folder(self) -> Path:
        # A number, because sockets in it must have short paths.
        folder = self._folder / str(self._num_started)
        folder.mkdir()
        self._num_started += 1
        return folder

    def _close_all(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
