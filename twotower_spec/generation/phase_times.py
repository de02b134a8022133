"""Seconds by phase, measured without waiting for a device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Phase = Literal["prefill", "extend", "denoise"]


class PhaseTimes:
    """Seconds that the towers take, by phase.

    On a CUDA device a phase lies between two events of its stream: measuring waits for nothing, but for such a phase
    before one on the host, which needs what it gives. Reading waits for what
    has been measured so far, so read when the work is over: after a call, or a round later.
    """

    def __init__(self) -> None:
        self._seconds: dict[Phase, float] = {"prefill": 0.0, "extend": 0.0, "denoise": 0.0}
        self._unread: list[tuple[Phase, torch.cuda.Event, torch.cuda.Event]] = []

    def __repr__(self) -> str:
        return f"PhaseTimes(prefill_s={self.prefill_s}, extend_s={self.extend_s}, denoise_s={self.denoise_s})"

    @contextmanager
    def measure(self, phase: Phase, device: torch.device) -> Iterator[None]:
        """Adds the time of the enclosed work on `device` to a phase; not that of work that raises."""
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        # Begins when the phase before it is over, also where each tower has its own device: no time counts twice.
        for _, _, before in self._unread[-1:]:
            before.synchronize() if stream is None else stream.wait_event(before)
        if stream is None:
            start = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - start
            return
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record(stream)
        yield
        ended.record(stream)
        self._unread.append((phase, begun, ended))

    @property
    def known(self) -> bool:
        """Whether reading waits for nothing: all that was measured is over."""
        return all(ended.query() for _, _, ended in self._unread)

    @property
    def prefill_s(self) -> float:
        """Seconds of the context tower over prompts."""
        return self._read("prefill")

    @property
    def extend_s(self) -> float:
        """Seconds of the context tower over committed tokens."""
        return self._read("extend")

    @property
    def denoise_s(self) -> float:
        """Seconds of denoiser passes (mask diffusion and mock-AR), with the choice of tokens."""
        return self._read("denoise")

    @property
    def total_s(self) -> float:
        """Sum of all phases."""
        return self.prefill_s + self.extend_s + self.denoise_s

    def _read(self, phase: Phase) -> float:
        unread, self._unread = self._unread, []
        for of_phase, begun, ended in unread:
            ended.synchronize()
            self._seconds[of_phase] += begun.elapsed_time(ended) / 1e3
        return self._seconds[phase]
