"""Handling of Ctrl-C that never loses an interrupt."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Interrupts:
    """Remembers an interrupt; `check` raises it again.

    Python raises KeyboardInterrupt wherever the main thread happens to be. Inside a callback of the garbage collector,
    for instance, it is printed and dropped, and a long run would go on.
    """

    def __init__(self) -> None:
        self._pressed = False

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._pressed = True
        signal.default_int_handler(number, frame)

    def check(self) -> None:
        """Raises KeyboardInterrupt if an interrupt came."""
        if self._pressed:
            raise KeyboardInterrupt
