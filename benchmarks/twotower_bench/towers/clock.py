"""Times of calls on a device's own clock, whole and by the parts of a model, and the speed of a copy."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from twotower_spec.state.transfer import Moment

# A call is repeated so often at least, and so long.
LEAST_CALLS = 3
MEASURED_S = 0.25
# Far more than caches hold.
COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
# By how much events in between may slow the host down, and what it takes to begin.
HOST_FACTOR, HOST_S = 3, 0.005


class CallTimes(NamedTuple):
    """Medians: how long a call took on the device, and how long the host was busy with it."""

    seconds: float
    host_s: float


@dataclass(frozen=True)
class DeviceClock:
    """A device's clock.

    Attributes:
        device: whose.
        bytes_per_s: read and written by a copy inside its memory.
    """

    device: torch.device
    bytes_per_s: float
    _copied: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, device: torch.device, copied_bytes: int | None = None) -> DeviceClock:
        """Measures the copy, for which it keeps two tensors of `copied_bytes` on the device."""
        num_bytes = copied_bytes or COPIED_BYTES[device.type]
        source, target = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
        seconds = time_calls(lambda: target.copy_(source), device).seconds
        return cls(device, 2 * num_bytes / seconds, (source, target))

    def time(self, call: Callable[[], object]) -> CallTimes:
        """Measures a call."""
        return time_calls(call, self.device)

    def by_part(
        self, call: Callable[[], object], parts: Mapping[nn.Module, str], rest: str, host_s: float
    ) -> dict[str, float]:
        """Measures how long a call spends in modules that do not contain each other, in seconds by their names.

        On CUDA the device first copies for so long that the host is ahead when the call begins: what is measured is the
        device's work, not its waits for the host.

        Args:
            call: runs the modules.
            parts: names of the modules.
            rest: name of all else.
            host_s: how long the host is busy with the call.
        """
        passes = [self._one_pass(call, parts, rest, host_s) for _ in range(LEAST_CALLS)]
        return {name: median(one[name] for one in passes) for name in passes[0]}

    def _one_pass(
        self, call: Callable[[], object], parts: Mapping[nn.Module, str], rest: str, host_s: float
    ) -> Counter[str]:
        begun: list[Moment] = []
        done: list[tuple[str, Moment]] = []
        with ExitStack() as hooks:
            for module, name in parts.items():

                def begin(*_: object) -> None:
                    begun.append(Moment(self.device))

                def end(*_: object, name: str = name) -> None:
                    done.append((name, Moment(self.device)))

                hooks.callback(module.register_forward_pre_hook(begin).remove)
                hooks.callback(module.register_forward_hook(end).remove)
            if self.device.type == "cuda":
                self._keep_busy(HOST_FACTOR * host_s + HOST_S)
            start = Moment(self.device)
            call()
            stop = Moment(self.device)
        stop.wait()
        found: Counter[str] = Counter()
        for one, (name, other) in zip(begun, done, strict=True):
            found[name] += one.seconds_until(other)  # type: ignore[assignment]  # a Counter adds any numbers
        found[rest] = start.seconds_until(stop) - sum(found.values())  # type: ignore[assignment]
        return found

    def _keep_busy(self, seconds: float) -> None:
        source, target = self._copied
        for _ in range(1 + int(seconds * self.bytes_per_s / (2 * source.nbytes))):
            target.copy_(source)


def time_calls(call: Callable[[], object], device: torch.device) -> CallTimes:
    """Measures a call that has been made once before, so that what is made once is made."""
    call()
    Moment(device).wait()
    times: list[CallTimes] = []
    began = time.perf_counter()
    while len(times) < LEAST_CALLS or time.perf_counter() - began < MEASURED_S:
        start, host_start = Moment(device), time.perf_counter()
        call()
        host_s, stop = time.perf_counter() - host_start, Moment(device)
        stop.wait()
        times.append(CallTimes(start.seconds_until(stop), host_s))
    return CallTimes(*(median(column) for column in zip(*times, strict=True)))
