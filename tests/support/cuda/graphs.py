"""Graphs, streams and events of emulated devices: everything happens at once, in the order in which it is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.support.cuda.tensors import Devices


def _devices() -> Devices:
    assert Devices.current is not None
    return Devices.current


class EmulatedStream:
    """A stream, in which all is done."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = torch.device("cuda", _devices().device) if device is None else torch.device(device)
        self.cuda_stream = 1000 + (self.device.index or 0)

    def wait_stream(self, other: EmulatedStream) -> None:
        """Does nothing: what the other one was told is done."""

    def wait_event(self, event: EmulatedEvent) -> None:
        """Does nothing likewise."""

    def synchronize(self) -> None:
        """Has the host wait."""
        _devices().wait("synchronize a stream")


class EmulatedEvent:
    """A moment that has passed when one asks for the second time; a device takes its time."""

    def __init__(self, enable_timing: bool = False, **kwargs: Any) -> None:
        self._time, self._asked = 0.0, False

    def record(self, stream: EmulatedStream | None = None) -> None:
        """Marks now."""
        self._time = time.perf_counter()

    def wait(self, stream: EmulatedStream | None = None) -> None:
        """Has a stream wait, not the host."""

    def query(self) -> bool:
        """Whether it has passed."""
        asked, self._asked = self._asked, True
        return asked

    def synchronize(self) -> None:
        """Has the host wait."""
        self._asked = True
        _devices().wait("synchronize an event")

    def elapsed_time(self, later: EmulatedEvent) -> float:
        """Milliseconds until another one."""
        return 1e3 * (later._time - self._time)


class EmulatedGraph:
    """Operators and kernels as they were called while it was captured, on the tensors of then."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._recorded: list[Callable[[], Any]] = []

    def capture_begin(self, *args: Any, **kwargs: Any) -> None:
        """Records from now on."""
        if _devices().recorded is not None:
            raise RuntimeError("a graph is being captured already")
        _devices().recorded = self._recorded

    def capture_end(self) -> None:
        """Stops."""
        _devices().recorded = None

    def replay(self) -> None:
        """Does everything again: one launch."""
        devices = _devices()
        devices.usage.kernels["graph"] += 1
        with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
            for run in self._recorded:
                run()

    def pool(self) -> tuple[int, int]:
        """Where its memory is."""
        return (0, 0)

    def reset(self) -> None:
        """Forgets everything."""
        self._recorded.clear()


@contextmanager
def emulated_capture(graph: EmulatedGraph, pool: Any = None, stream: Any = None, **kwargs: Any) -> Iterator[None]:
    """Does what `torch.cuda.graph` does; while it captures, nothing is computed on a real device, here it is."""
    graph.capture_begin()
    try:
        yield
    finally:
        graph.capture_end()
