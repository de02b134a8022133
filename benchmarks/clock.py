"""Timing of kernels on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from twotower_bench.towers.capture import captured

COPIED_BYTES = 1 << 30


class Timing(NamedTuple):
    """Median and the two quantiles around it that hold 60 % of the calls."""

    median_ms: float
    low_ms: float
    high_ms: float


class Clock(Protocol):
    """Clock of the runner and the tuner; picklable, since calls run in another process."""

    def time(self, call: Callable[[], object]) -> Timing:
        """Measures how long a call takes on the device."""
        ...

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        """Captures the call as one graph; raises where that is not possible."""
        ...

    def extra_bytes(self, call: Callable[[], object]) -> int:
        """Measures the bytes of memory that a call needs beyond its inputs, results included."""
        ...


class CudaClock(NamedTuple):
    """Times with events, the L2 cache flushed before each call, as `triton.testing.do_bench` does.

    A graph holds one call and is timed in the same way. `do_bench_cudagraph` would put many calls into one graph, and
    from the second on they would find their inputs in the cache.

    Attributes:
        warmup_ms, measured_ms: how long to repeat a call; at least one call each.
    """

    warmup_ms: int = 10
    measured_ms: int = 60

    def time(self, call: Callable[[], object]) -> Timing:
        from triton.testing import do_bench

        return Timing(*do_bench(call, warmup=self.warmup_ms, rep=self.measured_ms, quantiles=[0.5, 0.2, 0.8]))

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        return captured(call)

    def extra_bytes(self, call: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def copy_gb_per_s(clock: Clock, device: str = "cuda", num_bytes: int = COPIED_BYTES) -> float:
    """Bytes read and written per second by a copy inside the device's memory."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / clock.time(lambda: target.copy_(source)).median_ms / 1e6
